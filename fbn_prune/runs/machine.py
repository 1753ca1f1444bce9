"""The device, the dtype and the context that a recipe asks for."""

from __future__ import annotations

import torch

from fbn_prune import distributed
from fbn_prune.errors import InvalidInput, counted
from fbn_prune.recipe import Recipe

MAX_CONTEXT = 2048

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def chosen_context(recipe: Recipe, longest: int) -> int:
    """Return the tokens of a block.

    Raises
    ------
    InvalidInput
        The recipe asks for more than the `longest` that the model supports.
    """
    if recipe.context is not None and recipe.context > longest:
        raise InvalidInput(
            f"context = {recipe.context}: the model supports at most {longest} tokens: lower it"
        )
    return recipe.context or min(longest, MAX_CONTEXT)


def chosen_device(name: str) -> torch.device:
    """Return the device of a recipe's `device` key; "auto" prefers a GPU.

    Raises
    ------
    InvalidInput
        If there is no such device.
    """
    if name == "auto":
        return distributed.local_device(
            torch.device("cuda" if torch.cuda.is_available() else "cpu")
        )
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InvalidInput(f"device = {name!r}: write auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise InvalidInput(f"device = {name!r}: write auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidInput(
            f"device = {name!r}: this machine has {counted(torch.cuda.device_count(), 'CUDA device')}: "
            "give another, or auto"
        )
    return distributed.local_device(device)


def chosen_dtype(name: str, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """Return the dtype of a recipe's `dtype` key; "auto" is float32 on a CPU and the checkpoint's elsewhere."""
    if name != "auto":
        return _DTYPES[name]
    return torch.float32 if device.type == "cpu" else stored
