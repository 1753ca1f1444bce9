"""Check the headers of a checkpoint: plain weights, and the MLPs that its config implies."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fbn_prune.errors import InvalidInput, counted
from fbn_prune.model import remedies
from fbn_prune.model.family import Family, as_config
from fbn_prune.model.shards import TensorInfo

WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
PACKED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|SCB|absmax|quant_map|quant_state\..+|weight_packed|weight_scale(_inv|_2)?|weight_format)$"
)
"""Suffixes of tensor names that occur only in GPTQ, AWQ, bitsandbytes, compressed-tensors and fp8 checkpoints."""


def refuse_quantized(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse quantized weights, whatever the config says. Masks and position ids may be integers."""
    for name, info in tensors.items():
        if PACKED.search(name):
            raise InvalidInput(
                f"{path / info.file}: {name} belongs to a quantized model; prune the unquantized model"
            )
        if name.endswith(".weight") and info.dtype not in WEIGHT_DTYPES:
            raise InvalidInput(
                f"{path / info.file}: {name} is stored as {info.dtype}; prune the unquantized model"
            )


def widths_by_tensors(
    family: Family, config: dict[str, Any], tensors: Mapping[str, TensorInfo]
) -> tuple[dict[str, Any], str | None]:
    """Return the config with the widths of the stored MLPs, and a line on what it said before; None if they agree.

    The config is left as it is, for :func:`check_mlps` to refuse, where the tensors give no one width for each layer.
    """
    said, hidden = family.widths(config), family.hidden_size(config)
    found = family.stored_widths({name: info.shape for name, info in tensors.items()})
    if found == said or len(found) != len(said) or not all(found):
        return config, None
    for name, info in tensors.items():
        location = family.locate(name)
        if location is None:
            continue
        if location.layer >= len(found) or info.shape != family.tensor_shape(
            location, hidden, found[location.layer]
        ):
            return config, None
    return family.with_widths(config, found), (
        f"config.json says {_widths(said)}, but the stored tensors have {_widths(found)}: the tensors count, and "
        f"whatever is written says so ({family.width_key})"
    )


def _bias_cure(family: Family) -> str:
    if isinstance(family.biased, str):
        return f': write "{family.biased}": true there if the biases are the model\'s'
    return "; take both from one model"


def _widths(widths: Sequence[int]) -> str:
    least, most = min(widths), max(widths)
    if least == most:
        return f"{counted(least, 'neuron')} in each layer"
    return f"{least:,} to {counted(most, 'neuron')}"


def check_mlps(
    path: Path, family: Family, config: dict[str, Any], tensors: Mapping[str, TensorInfo]
) -> None:
    """Check that every layer has exactly the MLP tensors that the config implies, in the right shapes."""
    typed = as_config(config)
    layers, widths = family.num_layers(typed), family.widths(typed)
    hidden = family.hidden_size(typed)
    biased = family.has_bias(typed)
    found: set[tuple[int, str, str]] = set()
    for name, info in tensors.items():
        location = family.locate(name)
        if location is None or location.layer >= layers:
            continue
        expected = family.tensor_shape(location, hidden, widths[location.layer])
        if info.shape != expected:
            raise InvalidInput(
                f"{path / info.file}: {name} has shape {list(info.shape)}, but config.json requires {list(expected)}; "
                "take both from one model"
            )
        if info.dtype not in WEIGHT_DTYPES:
            raise InvalidInput(
                f"{path / info.file}: {name} is stored as {info.dtype}, which is no floating-point weight type; "
                "prune the unquantized model"
            )
        if location.part == "bias" and not biased:
            raise InvalidInput(
                f"{path / info.file} has {name}, but config.json says no MLP bias{_bias_cure(family)}"
            )
        found.add((location.layer, location.projection.path, location.part))
    if layers < 1:
        raise InvalidInput(
            f"{path / 'config.json'} says {layers} layers: correct it, a model has at least one"
        )
    if biased and isinstance(family.biased, str) and not any(part == "bias" for *_, part in found):
        raise InvalidInput(
            f'{path}: config.json says "{family.biased}": true, but no MLP has a bias: write false there if the '
            "weights are right"
        )
    for layer in range(layers):
        for projection in family.projections:
            for part in ("weight", "bias") if biased else ("weight",):
                if (layer, projection.path, part) not in found:
                    raise InvalidInput(
                        f"{path}: no tensor {family.layers}.{family.decoder_layer(layer)}.{projection.path}.{part}, "
                        f"though config.json says {layers} layers{remedies.missing_tensor(tensors)}"
                    )
