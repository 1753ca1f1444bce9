"""Results of a run that its store keeps. Each function loads a stored result, or computes and stores it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from safetensors.torch import load
from torch import Tensor

from fbn_prune.model.shards import packed
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.store import Store


def numbers(store: Store, name: str, compute: Callable[[], Any]) -> Any:
    """Return a result made of JSON values."""
    return store.kept(f"{name}.json", compute, lambda value: json.dumps(value).encode(), json.loads)


def tensors(store: Store, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return named tensors; stored ones are loaded onto the CPU."""
    return store.kept(f"{name}.safetensors", compute, packed, load)


def artifact(store: Store, compute: Callable[[], FunctionalNetworks]) -> FunctionalNetworks:
    """Return functional networks; stored in the format that `discover` writes."""
    return store.kept(
        "networks.safetensors",
        compute,
        FunctionalNetworks.to_bytes,
        FunctionalNetworks.from_bytes,
    )
