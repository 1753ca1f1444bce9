"""Serve several tasks from one unpruned model, each through its own functional networks."""

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
    """Load a bundle that `fbn-prune bundle` wrote, and attach its tasks to its model.

    Parameters
    ----------
    folder
        The bundle.
    device
        Where the model is loaded.
    dtype
        None for the dtype in which the checkpoint is stored.

    Returns
    -------
    Served
        The model with its tasks.

    Raises
    ------
    InvalidInput
        The folder is not a bundle, or a file is damaged.
    """
    return Bundle.open(Path(folder)).serve(device, dtype)
