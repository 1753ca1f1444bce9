"""Describe each network of an artifact by plain values, for the terminal, JSON output and the report."""

from __future__ import annotations

from typing import Any

import torch

from fbn_prune.networks.functional_networks import FunctionalNetworks

TIES = 5
"""Number of other networks that a card names: those with the strongest correlation of time courses."""


def network_cards(networks: FunctionalNetworks) -> list[dict[str, Any]]:
    """Return one dict for each network, in the artifact's order; facts that the artifact lacks are None or empty."""
    header = networks.header
    recurrence = header.get("recurrence") or {}
    return [
        {
            "id": index,
            "explained_variance": float(networks.explained_variance[index]),
            "energy": None if networks.energy is None else float(networks.energy[index]),
            "hubs": int(networks.hubs(index).sum()),
            "members": int(networks.members(index).sum()),
            "layers_spanned": len(networks.layers_spanned(index)),
            "members_by_layer": networks.members_by_layer(index),
            "experts_spanned": _experts(networks, index),
            **{
                key: float(recurrence[key][index]) if key in recurrence else None
                for key in ("iou_halves", "iou_seeds", "correlation_seeds", "shared_seeds")
            },
            "connected": _ties(networks, index),
            "tokens": _of(header.get("driving_tokens"), index),
            "contexts": _of(header.get("contexts"), index),
        }
        for index in range(len(networks.maps))
    ]


def _experts(networks: FunctionalNetworks, index: int) -> int | None:
    """Return in how many experts of all layers a network has members; None if the model is no mixture of experts."""
    count = networks.header.get("experts")
    if not isinstance(count, int) or any(width % count for width in networks.widths):
        return None
    layers = networks.by_layer(networks.members(index))
    return sum(int(members.view(count, -1).any(1).sum()) for members in layers)


def _of(lists: list[list[Any]] | None, index: int) -> list[Any]:
    return lists[index] if lists and index < len(lists) else []


def _ties(networks: FunctionalNetworks, index: int) -> list[dict[str, Any]]:
    """The other networks with the largest abs correlation of time courses."""
    if networks.connectivity is None:
        return []
    row = networks.connectivity[index].clone()
    row[index] = 0.0
    strongest = torch.argsort(row.abs(), descending=True, stable=True)[:TIES].tolist()
    return [{"id": i, "correlation": float(row[i])} for i in strongest if i != index]
