"""A small file beside a pruned mixture's weights: the experts, and their neurons, that each layer has kept."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fbn_prune.errors import InvalidInput
from fbn_prune.model.headers import one_line
from fbn_prune.model.mixture_family import MixtureFamily
from fbn_prune.model.routed import ExpertsCut
from fbn_prune.model.shards import save_tensors

KEPT_EXPERTS = "kept_experts.safetensors"
"""File with the kept experts and neurons of each layer, by their numbers in the source."""


def save_kept_experts(family: MixtureFamily, cuts: Sequence[ExpertsCut], path: Path) -> None:
    """Write the kept experts and neurons of each layer.

    The tensors are `layers.N.experts`, int64 [K], and `layers.N.neurons`, int64 [K, n], where N is the decoder layer.
    """
    kept: dict[str, Tensor] = {}
    for layer, cut in zip(family.mlp_layers, cuts, strict=True):
        kept[f"layers.{layer}.experts"] = cut.experts.cpu()
        kept[f"layers.{layer}.neurons"] = torch.stack([each.cpu() for each in cut.neurons])
    save_tensors(kept, path)


def read_kept_experts(path: Path) -> dict[int, list[int]]:
    """Return the kept experts of each decoder layer with experts.

    Raises
    ------
    InvalidInput
        The file is damaged.
    """
    found = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if (match := re.fullmatch(r"layers\.(\d+)\.experts", name)) is not None:
                    found[int(match[1])] = file.get_tensor(name).tolist()
    except (SafetensorError, OSError) as error:
        raise InvalidInput(f"{path}: damaged ({one_line(error)}); prune again") from error
    return dict(sorted(found.items()))
