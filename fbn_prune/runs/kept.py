"""Results of a run that its store keeps. Each function loads a stored result, or computes and stores it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from safetensors.torch import load
from torch import Tensor

from fbn_prune.model.shards import packed
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.store import Put, Store


class Part(Store):
    """The parts of a store whose names begin with a prefix, as a store of their own without it."""

    def __init__(self, whole: Store, prefix: str) -> None:
        self._whole, self._prefix = whole, prefix

    def names(self, prefix: str) -> list[str]:
        own = self._whole.names(self._prefix + prefix)
        return [name.removeprefix(self._prefix) for name in own]

    def write(
        self, name: str, write: Callable[[Put], object], *, replaces: Iterable[str] = ()
    ) -> None:
        replaced = [self._prefix + other for other in replaces]
        self._whole.write(self._prefix + name, write, replaces=replaced)

    def _read(self, name: str) -> bytes | None:
        return self._whole._read(self._prefix + name)


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
