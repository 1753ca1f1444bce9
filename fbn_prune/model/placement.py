"""Assign decoder layers to devices, for a model that is too large for one device.

Layers are not split and stay in order, so hidden states move from each device to the next once. All other modules
(embeddings, final norm) are on the first device, which receives the token ids and returns the logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.family import Family


def place_layers(layers: Sequence[int], rest: int, room: Sequence[int]) -> tuple[int, ...] | None:
    """Choose the device of each layer so that the fullest device has as much free memory as possible.

    Parameters
    ----------
    layers
        Bytes of each layer.
    rest
        Bytes of the other modules, which are on the first device.
    room
        Bytes available for weights on each device; devices with 0 are not used.

    Returns
    -------
    The device index of each layer, non-decreasing; None if the model does not fit.
    """

    def leaving(spare: int) -> tuple[int, ...] | None:
        """Fill the devices in order, leaving `spare` bytes free on each; None if the model does not fit."""
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
    """Return the bytes of each decoder layer in `dtype`, and of all other tensors together."""
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
    """Return the device of each module by name, as transformers and accelerate expect it.

    Parameters
    ----------
    model
        The model, or its skeleton on the meta device.
    layers
        The device of each decoder layer.
    first
        The device of all other modules.
    """
    places = {}
    for number, _ in enumerate(model.get_submodule(family.layers).children()):
        layer = family.layer_of(f"{family.layers}.{number}.")
        assert layer is not None
        places[f"{family.layers}.{number}"] = str(layers[layer])

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
