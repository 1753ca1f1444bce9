"""Tensors of a training that can go on: one safetensors file, replaced whole, that says which training it is of."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def save_tensors(path: Path, key: str, tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors under a key that names the training and its stage."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(own, unfinished, metadata={"key": key})
    os.replace(unfinished, path)


def load_tensors(path: Path, key: str) -> dict[str, Tensor] | None:
    """What was written under this key; None if there is no such file, or it is of another training."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
