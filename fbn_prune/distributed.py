"""Communication between the processes of one job: each runs a share of the data, sums go to all, rank 0 writes.

`accelerate launch -m fbn_prune ...` or torchrun starts the processes and sets their ranks in the environment. The
process group uses gloo between CPUs and nccl between GPUs. In a single process the functions return their input, so
stages need no second code path. All processes must make the same calls in the same order; a condition that guards a
call must therefore have the same value in all of them.

torch is imported inside the functions, because the command line asks for the rank before it needs torch.
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
    """Return the number of processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Return whether this is rank 0, the process that writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def local_index() -> int | None:
    """Return the index of this process on its machine, or None without a launcher."""
    index = os.environ.get("LOCAL_RANK")
    return None if index is None else int(index)


def world() -> int:
    """Return the number of processes in the process group; 1 before :func:`joined`."""
    if processes() == 1:
        return 1
    import torch.distributed as dist

    return int(dist.get_world_size()) if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process in the process group."""
    if world() == 1:
        return 0
    import torch.distributed as dist

    return int(dist.get_rank())


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Create the process group if the launcher started several processes, and destroy it at the end.

    Parameters
    ----------
    device
        Device of this process; its type selects the backend.

    Raises
    ------
    FbnPruneError
        If another process ended early or cannot be reached.
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
            f"process {rank()} of {world()} lost the connection to another process, whose own message says why; "
            "run the same command again to continue"
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
            PartialState._reset_state()


def local_device(device: torch.device) -> torch.device:
    """Return the GPU of this process if `device` is "cuda" without an index, else `device`."""
    if device.type == "cuda" and device.index is None and local_index() is not None:
        import torch

        return torch.device("cuda", local_index())
    return device


def owner(index: int) -> int:
    """Return the rank that processes the item with this index when items are dealt out in turn."""
    return index % world()


def share(items: Sequence[Item]) -> Sequence[Item]:
    """Return this process's contiguous share of the items; each item belongs to exactly one process."""
    first, stop = (len(items) * index // world() for index in (rank(), rank() + 1))
    return items[first:stop]


def add_up(*tensors: Tensor) -> None:
    """Replace each tensor, in place, by its sum over all processes."""
    if world() > 1:
        import torch.distributed as dist

        for tensor in tensors:
            dist.all_reduce(tensor)


def total(*numbers: float) -> list[float]:
    """Return the sum of each number over all processes, computed in float64."""
    import torch

    sums = torch.tensor(numbers, dtype=torch.float64, device=_send_device())
    add_up(sums)
    return sums.tolist()


def of_first(number: float) -> float:
    """Return the number that rank 0 passes, so that all decide alike by what only it can measure, such as time."""
    return total(number if rank() == 0 else 0.0)[0] if world() > 1 else number


def joined_rows(rows: Tensor) -> Tensor:
    """Return the rows of all processes, concatenated by rank; the numbers of rows may differ."""
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
    """Return the bytes (or None) that the process `source` passes; what the other processes pass is ignored."""
    if world() == 1:
        return data
    import torch
    import torch.distributed as dist

    size = torch.tensor(
        [-1 if data is None else len(data)], dtype=torch.int64, device=_send_device()
    )
    dist.broadcast(size, src=source)
    if int(size) < 0:
        return None
    buffer = torch.empty(int(size), dtype=torch.uint8, device=_send_device())
    if rank() == source and data:
        buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    dist.broadcast(buffer, src=source)
    return buffer.cpu().numpy().tobytes()


def wait() -> None:
    """Wait until all processes have called this function."""
    if world() > 1:
        import torch.distributed as dist

        dist.barrier()


def _send_device() -> torch.device:
    """Return the device that the backend sends tensors from."""
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
