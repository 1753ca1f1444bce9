"""What a launcher (`accelerate launch`, torchrun) tells each process by its environment; free of torch, for the CLI."""

from __future__ import annotations

import os


def processes() -> int:
    """How many processes were started for the job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return int(os.environ.get("RANK", "0")) == 0


def local_index() -> int | None:
    """This process's place on its machine; None where no launcher told it."""
    index = os.environ.get("LOCAL_RANK")
    return None if index is None else int(index)
