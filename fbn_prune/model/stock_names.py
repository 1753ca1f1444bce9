"""Names in a written config that every loader knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fbn_prune.model.building import stock_class
from fbn_prune.model.family import as_config


def with_stock_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a `config.json` object without names of code that is not exported.

    `auto_map` is dropped: the files that it names are not written, and the stock classes compute the same. Where
    `architectures` does not name the stock class, it does so afterwards: loaders such as vLLM choose their code by it.
    """
    named = {key: value for key, value in config.items() if key != "auto_map"}
    stock = stock_class(as_config(config))
    architectures = named.get("architectures")
    if not isinstance(architectures, list) or stock.__name__ not in architectures:
        named["architectures"] = [stock.__name__]
    return named
