"""What the GPU scripts share: weights, clocks, and timing that the cache cannot flatter.

Calls are timed by replaying CUDA graphs over several copies of the weights, so that no copy is still
in the cache when its turn comes, and what Python takes to launch a call (longer than many calls run)
stays out. Only the ceilings, copy and matrix product, are medians of single calls.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from fbn_kernels.launch import Weights

MIN_COPIES = 4
MIN_BYTES = 1 << 30
REPLAYS = 20


def random_weights(
    neurons: int, width: int, dtype: torch.dtype, device: torch.device, copies: int | None = None
) -> list[Weights]:
    """Draw copies of an MLP: as many as outgrow any cache (at least 4, over 1 GiB together)."""
    one = 3 * neurons * width * dtype.itemsize
    copies = copies or max(MIN_COPIES, -(-MIN_BYTES // one))
    generator = torch.Generator(device=device).manual_seed(0)

    def draw(scale: float) -> Tensor:
        values = torch.randn(neurons, width, generator=generator, device=device)
        return (values * scale).to(dtype)

    return [
        Weights(draw(width**-0.5), draw(width**-0.5), draw(neurons**-0.5), None, None, None)
        for _ in range(copies)
    ]


def gate_of(weights: Weights) -> Tensor:
    """Return the gate of an MLP that has one."""
    if weights.gate is None:
        raise ValueError("the benchmarks time gated MLPs, this one has no gate")
    return weights.gate


def replay_microseconds(
    call: Callable[[Any], object], copies: list[Any], *, replays: int = REPLAYS
) -> float:
    """Return the median time of a call over rotating copies, replayed as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for copy in copies:
            call(copy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in copies:
            call(copy)
    graph.replay()
    times = []
    for _ in range(replays):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / len(copies))
    return statistics.median(times)


def call_microseconds(call: Callable[[], object]) -> float:
    """Return the median time of a call."""
    return float(triton.testing.do_bench(call, warmup=25, rep=100, return_mode="median")) * 1e3


def copy_bandwidth(device: torch.device) -> float:
    """Return the bytes a second (read and written) of a large copy."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = call_microseconds(lambda: target.copy_(source)) / 1e6
    return 2 * source.nbytes / seconds


def matrix_peak(dtype: torch.dtype, device: torch.device) -> float:
    """Return the operations a second of a large square product."""
    size = 8192
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = call_microseconds(lambda: left @ right) / 1e6
    return 2 * size**3 / seconds


def architecture() -> str:
    """Return the GPU's architecture as the tuning tables name it: sm_90, gfx942."""
    found = triton.runtime.driver.active.get_current_target().arch
    return f"sm_{found}" if isinstance(found, int) else str(found)


def environment(device: torch.device) -> dict[str, Any]:
    """Return device, clocks, versions, commit and date, for a result file."""
    return {
        "device": torch.cuda.get_device_name(device),
        "architecture": architecture(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "driver_and_clocks": _nvidia_smi(device),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def commit() -> str | None:
    """Return the commit of the working tree, with a plus sign if it has changes.

    Where only the files were copied, the variable FBN_COMMIT tells it.
    """
    if given := os.environ.get("FBN_COMMIT"):
        return given
    here = Path(__file__).parent
    done = subprocess.run(
        ["git", "describe", "--always", "--abbrev=40", "--dirty=+"],
        cwd=here,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or None


def _nvidia_smi(device: torch.device) -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
    done = subprocess.run(
        ["nvidia-smi", f"--id={device.index or 0}", f"--query-gpu={query}", "--format=csv"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or None
