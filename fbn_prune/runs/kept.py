"""A run's results as its store keeps them: JSON, tensors, networks; each as kept, or computed and kept."""

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
    """A result that is plain JSON."""
    return store.kept(f"{name}.json", compute, lambda value: json.dumps(value).encode(), json.loads)


def tensors(store: Store, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors by their names; kept ones come back on the CPU."""
    return store.kept(f"{name}.safetensors", compute, packed, load)


def artifact(store: Store, compute: Callable[[], FunctionalNetworks]) -> FunctionalNetworks:
    """Networks, as the artifact that `discover` writes."""
    return store.kept(
        "networks.safetensors",
        compute,
        FunctionalNetworks.to_bytes,
        FunctionalNetworks.from_bytes,
    )
