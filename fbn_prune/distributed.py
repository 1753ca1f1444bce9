"""Several processes on one job: each runs a share of the data, all know the sums, the first one writes.

`accelerate launch -m fbn_prune ...` and torchrun start the processes and tell each its place through its environment;
accelerate joins them (gloo between CPUs, nccl between GPUs), and torch.distributed carries the sums. In a process that
was started alone every function here does nothing, so stages are written one way for one process and for many. Every
process must make the same calls in the same order: whatever decides about a call must be equal in all of them.

torch is imported when it is first needed, so that the command line can ask for its place in the job without it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from fbn_prune.errors import FbnPruneError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Item = TypeVar("Item")


def processes() -> int:
    """How many processes the launcher started for the job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def local_index() -> int | None:
    """This process's index on its machine, or None when no launcher started it."""
    index = os.environ.get("LOCAL_RANK")
    return None if index is None else int(index)


def world() -> int:
    """How many processes have joined for the job."""
    if processes() == 1:
        return 1
    import torch.distributed as dist

    return int(dist.get_world_size()) if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's place among them, from 0."""
    if world() == 1:
        return 0
    import torch.distributed as dist

    return int(dist.get_rank())


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Join the processes that the launcher started, if it started several; leave them at the end.

    Raises
    ------
    FbnPruneError
        Another process ended before its time, or could not be reached.
    """
    if processes() == 1 or world() > 1:
        yield
        return
    import torch.distributed as dist
    from accelerate import PartialState

    PartialState(cpu=device.type == "cpu")
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, FbnPruneError) or not _is_lost_peer(error):
            raise
        raise FbnPruneError(
            f"process {rank()} of {world()} lost another one, whose own message says why; "
            "run the same command again to go on"
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
            PartialState._reset_state()


def local_device(device: torch.device) -> torch.device:
    """The GPU of this process, where `device` names no single one."""
    if device.type == "cuda" and device.index is None and local_index() is not None:
        import torch

        return torch.device("cuda", local_index())
    return device


def owner(index: int) -> int:
    """Which process does the index-th of many like pieces of work."""
    return index % world()


def share(items: Sequence[Item]) -> Sequence[Item]:
    """The items that are this process's, in order; together the processes hold each item once."""
    first, stop = (len(items) * place // world() for place in (rank(), rank() + 1))
    return items[first:stop]


def add_up(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over all processes."""
    if world() > 1:
        import torch.distributed as dist

        for tensor in tensors:
            dist.all_reduce(tensor)


def total(*numbers: float) -> list[float]:
    """Each number summed over all processes, in float64."""
    import torch

    sums = torch.tensor(numbers, dtype=torch.float64, device=_wire())
    add_up(sums)
    return sums.tolist()


def joined_rows(rows: Tensor) -> Tensor:
    """The rows of all processes one after another; the processes may have different numbers of them."""
    if world() == 1:
        return rows
    import torch
    import torch.distributed as dist

    counts = torch.zeros(world(), dtype=torch.int64, device=rows.device)
    counts[rank()] = len(rows)
    add_up(counts)
    parts = [rows.new_empty(count, *rows.shape[1:]) for count in counts.tolist()]
    for source, part in enumerate(parts):
        if source == rank():
            part.copy_(rows)
        dist.broadcast(part, src=source)
    return torch.cat(parts)


def broadcast(data: bytes | None, source: int = 0) -> bytes | None:
    """What one process holds, on all of them, whatever the others pass."""
    if world() == 1:
        return data
    import torch
    import torch.distributed as dist

    size = torch.tensor([-1 if data is None else len(data)], dtype=torch.int64, device=_wire())
    dist.broadcast(size, src=source)
    if int(size) < 0:
        return None
    wire = torch.empty(int(size), dtype=torch.uint8, device=_wire())
    if rank() == source and data:
        wire.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    dist.broadcast(wire, src=source)
    return wire.cpu().numpy().tobytes()


def wait() -> None:
    """Wait until all processes are here."""
    if world() > 1:
        import torch.distributed as dist

        dist.barrier()


def _wire() -> torch.device:
    """Where tensors must lie to be sent."""
    import torch
    import torch.distributed as dist

    if world() > 1 and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _is_lost_peer(error: RuntimeError) -> bool:
    import torch.distributed as dist

    words = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        sign in words
        for sign in ("gloo", "connection closed", "connection reset", "nccl", "timed out")
    )
