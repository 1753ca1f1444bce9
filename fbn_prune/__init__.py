"""fbn-prune: find the functional networks of a causal language model, keep the key ones, make a smaller model.

    result = prune(model, tokenizer, texts, PruningConfig(sparsity=0.5))

prunes a transformers model in place; :func:`fbn_prune.prune` has an example that runs.
Everything public can be imported from here; what it needs (torch, transformers) is loaded when it is first used.
Data flows one way: data -> model -> networks -> pruning -> export; :mod:`fbn_prune.runs` puts it together.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fbn_prune.errors import FbnPruneError, InvalidInput

if TYPE_CHECKING:
    from fbn_prune.api import (
        FunctionalNetworkICA,
        FunctionalNetworks,
        PruneResult,
        PruningConfig,
        SpatialICA,
        amplify_networks,
        discover,
        mask_networks,
        prune,
        prune_checkpoint,
        register_criterion,
        retain_networks,
    )

__all__ = [
    "FbnPruneError",
    "FunctionalNetworkICA",
    "FunctionalNetworks",
    "InvalidInput",
    "PruneResult",
    "PruningConfig",
    "SpatialICA",
    "amplify_networks",
    "discover",
    "mask_networks",
    "prune",
    "prune_checkpoint",
    "register_criterion",
    "retain_networks",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("fbn_prune.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
