"""What one operation of each kind takes: rates measured in under a second, and how far a run stays behind them.

The factors are fitted by `eval/speed/scaling.py fit` to runs of many sizes (`eval/results/scaling.json`) on a CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from fbn_prune.runs.cost import KINDS, Counts

BASES = {
    "forward": "product",
    "gram": "float32",
    "token gram": "float32",
    "ica": "float32",
    "eigen": "float64",
    "double": "float64",
    "gathered": "memory",
    "moved": "memory",
}
"""Which measured rate a kind goes with: products in the model's type, in float32, in float64, or bytes moved."""

FACTORS = {
    "forward": 1.36,
    "gram": 0.79,
    "token gram": 1.09,
    "ica": 0.289,
    "eigen": 14.1,
    "double": 1.36,
    "gathered": 20.7,
    "moved": 2.64,
    "called": 3.01e-05,
    "read": 1.53e-09,
    "written": 7.86e-10,
    "exchanged": 1e-09,
    "told": 2e-09,
    "tokenised": 9.14e-06,
    "started": 5.35,
    "described": 0.722,
}
"""How many times as long as at the measured rate an operation of each kind takes; of kinds without one, the seconds.
What passes between processes (`exchanged`, `told`) is not fitted."""


def seconds_of_each(
    measured: Mapping[str, float], factors: Mapping[str, float] = FACTORS
) -> dict[str, float]:
    """Seconds of one unit of every kind, from what :func:`measured_rates` found."""
    return {
        kind: factors[kind] / (measured[BASES[kind]] if kind in BASES else 1.0) for kind in KINDS
    }


def seconds(counts: Counts, each: Mapping[str, float]) -> dict[str, float]:
    """Seconds of every stage."""
    return {
        stage: sum(amount * each[kind] for kind, amount in kinds.items())
        for stage, kinds in counts.items()
    }


def measured_rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What the device does in a second now, by the names in :data:`BASES`; takes less than a second itself.

    Products are large ones of square matrices (`product`: of `dtype`), `memory` the bytes that a copy reads and writes.
    """
    size = 1024 if device.type == "cpu" else 8192
    rates = {"float32": _product_rate(size, torch.float32, device, 0.25)}
    same = dtype == torch.float32
    rates["product"] = rates["float32"] if same else _product_rate(size, dtype, device, 0.15)
    rates["float64"] = _product_rate(size // 2 if size > 1024 else size, torch.float64, device, 0.2)
    source = torch.ones(2**24, device=device)
    target = torch.empty_like(source)
    rates["memory"] = _rate(lambda: target.copy_(source), 2.0 * source.nbytes, device, 0.1)
    return rates


def _product_rate(size: int, dtype: torch.dtype, device: torch.device, least: float) -> float:
    a = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    return _rate(lambda: torch.mm(a, a, out=out), 2.0 * size**3, device, least)


def _rate(work: Callable[[], object], amount: float, device: torch.device, least: float) -> float:
    def run() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    run()
    count, start = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - start < least:
        run()
        count += 1
    return count * amount / (time.perf_counter() - start)
