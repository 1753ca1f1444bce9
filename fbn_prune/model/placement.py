"""Which device holds which decoder layer of a model that fits on no single one, but on several together.

Layers are never split, and lie in order: hidden states cross from one device to the next once. All that is no decoder
layer (embeddings, the last norm) lies on the first device, where token ids enter and logits come out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.family import Family


def place_layers(layers: Sequence[int], rest: int, room: Sequence[int]) -> tuple[int, ...] | None:
    """The device of each layer, never falling, so that the fullest device has as much room left as can be.

    Parameters
    ----------
    layers
        Bytes of each layer.
    rest
        Bytes of what else the first device holds.
    room
        Bytes that weights may take of each device; a device with none is passed over.

    Returns
    -------
    None where no such placement fits.
    """

    def leaving(spare: int) -> tuple[int, ...] | None:
        """A placement that leaves so many bytes on each device in use: each takes what fits before the next does."""
        left = [size - spare for size in room]
        if not left or left[0] < rest:
            return None
        left[0] -= rest
        devices: list[int] = []
        device = 0
        for size in layers:
            while device < len(left) and left[device] < size:
                device += 1
            if device == len(left):
                return None
            left[device] -= size
            devices.append(device)
        return tuple(devices)

    best = leaving(0)
    if best is None:
        return None
    low, high = 0, max(room)
    while low < high:
        middle = (low + high + 1) // 2
        if (found := leaving(middle)) is None:
            high = middle - 1
        else:
            best, low = found, middle
    return best


def layer_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> tuple[list[int], int]:
    """Bytes of each decoder layer in `dtype`, and of all else."""
    sizes = [0] * checkpoint.family.num_layers(checkpoint.config)
    rest = 0
    for name, info in checkpoint.tensors.items():
        layer = checkpoint.family.layer_of(name)
        if layer is not None and layer < len(sizes):
            sizes[layer] += info.parameters * dtype.itemsize
        else:
            rest += info.parameters * dtype.itemsize
    return sizes, rest


def device_map(
    model: nn.Module, family: Family, layers: Sequence[torch.device], first: torch.device
) -> dict[str, str]:
    """Where each module goes, by name, in the form that transformers and accelerate take.

    Parameters
    ----------
    model
        The model, or its skeleton on the meta device.
    layers
        The device of each decoder layer.
    first
        The device of all else.
    """
    places = {f"{family.layers}.{layer}": str(device) for layer, device in enumerate(layers)}

    def walk(module: nn.Module, name: str) -> None:
        for child_name, child in module.named_children():
            path = f"{name}.{child_name}".lstrip(".")
            if path == family.layers:
                continue
            if family.layers.startswith(f"{path}."):
                walk(child, path)
            else:
                places[path] = str(first)

    walk(model, "")
    return places
