"""Times the gathered MLP on a GPU beside what else one could do, and says where it loses.

Usage: python kernels/bench/bench_gpu.py [--width 4096] [--neurons 14336] [--output results.json]

Nothing is timed before every method agrees with the float64 reference. The result file holds device,
clocks, versions, commit, the measured copy bandwidth and matrix peak, and for each call the time,
the bytes a second and their share of the copy's. `plot.py` draws it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_common import (
    copy_bandwidth,
    environment,
    gate_of,
    matrix_peak,
    random_weights,
    replay_microseconds,
)
from sets import draw_set
from torch import Tensor

from fbn_kernels import Kind, NeuronSet, NeuronSets, Strategy, gathered_mlp, reference_mlp
from fbn_kernels.launch import Weights

logger = logging.getLogger("bench")

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
SHARES = (1.0, 0.7, 0.5, 0.3)
SET_COUNTS = (1, 2, 4, 8)
TOLERANCE = 1e-2
COMPACT = "compact, pre-gathered"
COMPILED_TOKENS = (1, 64, 2048)
"""Where torch.compile is timed too: each shape costs seconds of compilation."""


@dataclass(frozen=True)
class Copy:
    """One copy of the weights: whole, and the kept rows alone."""

    whole: Weights
    compact: Weights


Method = Callable[[Tensor, Copy], Tensor]


def dense(x: Tensor, weights: Weights) -> Tensor:
    """Run an ordinary gated MLP through cuBLAS."""
    return (F.silu(F.linear(x, gate_of(weights))) * F.linear(x, weights.up)) @ weights.down_t


def rows_of(weights: Weights, rows: Tensor) -> Weights:
    """Gather the kept rows."""
    parts = (weights.up, gate_of(weights), weights.down_t)
    up, gate, down_t = (part.index_select(0, rows) for part in parts)
    return Weights(up, gate, down_t, None, None, None)


def first_of(weights: Weights, count: int) -> Weights:
    """View the first neurons' rows."""
    parts = (weights.up, gate_of(weights), weights.down_t)
    up, gate, down_t = (part[:count] for part in parts)
    return Weights(up, gate, down_t, None, None, None)


def methods(neurons: NeuronSet, tokens: int) -> dict[str, Method]:
    """Return every way to run one set, by name; the first is the bar to beat."""
    rows = neurons.rows()
    found: dict[str, Method] = {
        COMPACT: lambda x, copy: dense(x, copy.compact),
        "dense": lambda x, copy: dense(x, copy.whole),
        "index_select a call": lambda x, copy: dense(x, rows_of(copy.whole, rows)),
    }

    if tokens in COMPILED_TOKENS:
        torch._dynamo.reset()  # else the limit of recompilations leaves later shapes uncompiled
        compiled = torch.compile(dense, dynamic=False)
        found["compact, torch.compile"] = lambda x, copy: compiled(x, copy.compact)

    def gathered(one: NeuronSet) -> Method:
        return lambda x, copy: gathered_mlp(
            x, copy.whole.up, copy.whole.down_t, one, gate=copy.whole.gate
        )

    found[f"gathered, {neurons.kind.value}"] = gathered(neurons)
    # The same kernel over consecutive rows: what is left over is the price of gathering.
    count = neurons.count
    padded = torch.arange(neurons.indices.numel(), device=rows.device).clamp(max=count - 1)
    consecutive = NeuronSet(neurons.width, count, Kind.ROWS, padded.to(torch.int32))
    found["kernel, consecutive rows"] = gathered(consecutive)
    prefix = NeuronSet.from_indices(torch.arange(count), neurons.width).to(rows.device)
    found["gathered, prefix"] = gathered(prefix)
    found["prefix view"] = lambda x, copy: dense(x, first_of(copy.whole, count))
    return found


def expected_rows(name: str, neurons: NeuronSet) -> NeuronSet:
    """Return the neurons a method runs through."""
    device = neurons.indices.device
    if name == "dense":
        return NeuronSet.full(neurons.width, device)
    if name in ("kernel, consecutive rows", "gathered, prefix", "prefix view"):
        return NeuronSet.from_indices(torch.arange(neurons.count), neurons.width).to(device)
    return neurons


def reference(x: Tensor, weights: Weights, neurons: NeuronSet) -> Tensor:
    """Run the float64 reference."""
    return reference_mlp(
        x.double(),
        weights.up.double(),
        weights.down_t.double(),
        neurons,
        gate=gate_of(weights).double(),
    )


def gate_correct(found: Tensor, expected: Tensor, what: str) -> float:
    """Return the relative error.

    Raises
    ------
    RuntimeError
        If it is not below the tolerance: a wrong kernel is not timed.
    """
    error = float((found.double() - expected).norm() / expected.norm())
    if not error < TOLERANCE:
        raise RuntimeError(f"{what} is wrong: relative error {error:.2e}")
    return error


def bench_one_set(
    copies_of: list[Weights], tokens: tuple[int, ...], bandwidth: float, peak: float
) -> list[dict[str, object]]:
    """Time every method, kind and share."""
    results = []
    neurons_total, width = copies_of[0].up.shape
    element = copies_of[0].up.element_size()
    for share, kind in itertools.product(SHARES, (Kind.BLOCK64, Kind.ROWS)):
        neurons = draw_set(neurons_total, share, kind).to(copies_of[0].up.device)
        rows = neurons.rows()
        copies = [Copy(whole, rows_of(whole, rows)) for whole in copies_of]
        for count in tokens:
            x = torch.randn(count, width, device=rows.device, dtype=copies_of[0].up.dtype)
            times: dict[str, float] = {}
            for name, method in methods(neurons, count).items():
                through = expected_rows(name, neurons)
                expected = reference(x, copies[0].whole, through)
                error = gate_correct(method(x, copies[0]), expected, f"{name}, {count} tokens")
                times[name] = replay_microseconds(lambda copy: method(x, copy), copies)  # noqa: B023
                seconds = times[name] / 1e6
                read = 3 * through.count * width * element
                done = 6 * count * through.count * width
                results.append(
                    {
                        "method": name,
                        "tokens": count,
                        "share": share,
                        "kind": neurons.kind.value,
                        "microseconds": times[name],
                        "gigabytes_a_second": read / seconds / 1e9,
                        "share_of_copy_bandwidth": read / seconds / bandwidth,
                        "share_of_matrix_peak": done / seconds / peak,
                        "against_compact": times[name] / times[COMPACT],
                        "relative_error": error,
                    }
                )
            logger.info("r=%.1f %s %d tokens: %s", share, neurons.kind.value, count, times)
    return results


def bench_many_sets(copies: list[Weights], rows_a_set: tuple[int, ...]) -> list[dict[str, object]]:
    """Time a batch of different sets beside running them one by one."""
    results = []
    neurons_total, width = copies[0].up.shape
    device, dtype = copies[0].up.device, copies[0].up.dtype
    for number, share, rows in itertools.product(SET_COUNTS, (0.5, 0.3), rows_a_set):
        sets = [
            draw_set(neurons_total, share, Kind.ROWS, seed).to(device) for seed in range(number)
        ]
        stack = NeuronSets.from_sets(sets)
        ids = torch.arange(number).repeat_interleave(rows)
        x = torch.randn(number * rows, width, device=device, dtype=dtype)
        times: dict[str, float] = {}

        def one_by_one(copy: Weights) -> Tensor:
            parts = x.view(number, rows, width)  # noqa: B023
            return torch.cat(
                [
                    gathered_mlp(part, copy.up, copy.down_t, one, gate=copy.gate)
                    for part, one in zip(parts, sets, strict=True)  # noqa: B023
                ]
            )

        times["one by one"] = replay_microseconds(one_by_one, copies)
        for strategy in Strategy:
            batch = stack.route(ids, strategy=strategy)

            def at_once(copy: Weights) -> Tensor:
                return gathered_mlp(x, copy.up, copy.down_t, batch, gate=copy.gate)  # noqa: B023

            gate_correct(at_once(copies[0]), one_by_one(copies[0]).double(), strategy.value)
            times[strategy.value] = replay_microseconds(at_once, copies)
        chosen = stack.choose(number * rows).value
        results.append(
            {
                "sets": number,
                "share": share,
                "rows_a_set": rows,
                "microseconds": times,
                "chosen": chosen,
                "speed_up": times["one by one"] / times[chosen],
            }
        )
        logger.info("%d sets, r=%.1f, %d rows each: %s", number, share, rows, times)
    return results


def main() -> None:
    """Run the sweep and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--neurons", type=int, default=14336)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--output", type=Path, default=Path("results.json"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a GPU; bench_cpu.py is the one for CPUs")
    device = torch.device("cuda", torch.cuda.current_device())
    dtype = getattr(torch, options.dtype)
    bandwidth, peak = copy_bandwidth(device), matrix_peak(dtype, device)
    copies = random_weights(options.neurons, options.width, dtype, device)
    report = {
        "environment": environment(device),
        "shape": {"width": options.width, "neurons": options.neurons, "dtype": options.dtype},
        "copy_bytes_a_second": bandwidth,
        "matrix_operations_a_second": peak,
        "one_set": bench_one_set(copies, tuple(options.tokens), bandwidth, peak),
        "many_sets": bench_many_sets(copies, (1, 8, 64, 256)),
    }
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    logger.info("\n".join(summary(report)))


def summary(report: dict[str, Any]) -> list[str]:
    """Return what the gathered calls reached, a line each."""
    lines = [
        f"copy {report['copy_bytes_a_second'] / 1e12:.2f} TB/s, "
        f"matrix {report['matrix_operations_a_second'] / 1e12:.0f} TFLOP/s",
        "share kind tokens us of_copy of_peak against_compact",
    ]
    lines += [
        f"{one['share']:.1f} {one['kind']:8} {one['tokens']:5} {one['microseconds']:8.1f} "
        f"{one['share_of_copy_bandwidth']:.2f} {one['share_of_matrix_peak']:.2f} "
        f"{one['against_compact']:.3f}"
        for one in report["one_set"]
        if one["method"].startswith("gathered")
    ]
    lines += [
        f"{one['sets']} sets r={one['share']} {one['rows_a_set']} rows: {one['chosen']}, "
        f"{one['speed_up']:.2f} times one by one, {one['microseconds']}"
        for one in report["many_sets"]
    ]
    return lines


if __name__ == "__main__":
    main()
