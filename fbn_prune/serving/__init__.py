"""Serve several tasks from one whole model, each through its own functional networks."""

from __future__ import annotations

from pathlib import Path

import torch

from fbn_prune.serving.attachment import Memory, Served, attach
from fbn_prune.serving.bundle import Bundle
from fbn_prune.serving.tasks import FullDown, LowRankDown, TaskSet

__all__ = ["Bundle", "FullDown", "LowRankDown", "Memory", "Served", "TaskSet", "attach", "load"]


def load(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Served:
    """Load a bundle that `fbn-prune bundle` wrote: its model, with its tasks attached.

    Parameters
    ----------
    dtype
        None for the dtype in which the checkpoint is stored.

    Raises
    ------
    InvalidInput
        If it is no bundle, or damaged.
    """
    return Bundle.open(Path(folder)).serve(device, dtype)
