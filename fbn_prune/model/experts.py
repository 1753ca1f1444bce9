"""Mixtures of experts: how a config says that it is one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_COUNTS = re.compile(r"(num|n|moe_num)(_local|_routed)?_experts")
"""Config keys with the number of experts of a layer. Other keys with "expert" keep a value in models without any."""


def mixture(fields: Mapping[str, Any]) -> str | None:
    """Return how a config says that its layers are mixtures of experts, as "key=value"; None if they are not.

    Parameters
    ----------
    fields
        The `config.json` object of a text model; a nested object that describes the MLPs counts too.
    """
    lists = (fields.get(key) for key in ("layers_block_type", "mlp_layer_types"))
    named = [kind for each in lists if isinstance(each, list) for kind in each]
    kinds = {kind for kind in ("mlp", "dense", "moe", "sparse") if kind in named}
    if kinds and not kinds & {"moe", "sparse"}:  # a count of experts that no layer has
        return None
    for key, value in fields.items():
        if _COUNTS.fullmatch(key) and isinstance(value, int) and value > 0:
            return f"{key}={value}"
    nested = (fields.get(key) for key in ("text_config", "ffn_config"))
    found = (mixture(each) for each in nested if isinstance(each, Mapping))
    return next(filter(None, found), None)
