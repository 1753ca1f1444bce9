"""What `config.json` says of a model's quantisation."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from fbn_prune.errors import InvalidInput

CONFIG_KEYS = ("quantization_config", "compression_config")
"""Where config.json says how a model is quantised; the second is compressed-tensors' old place."""

METHODS = ("fp8", "compressed-tensors", "bitsandbytes")


def quantization_of(config: Mapping[str, Any]) -> Any:
    """What a config says of quantisation: an object, where it is in order; None if it says nothing."""
    return next((config[key] for key in CONFIG_KEYS if config.get(key)), None)


def method_of(quantization: Any) -> str | None:
    """The method's name; None if it has none."""
    if not isinstance(quantization, Mapping):
        return None
    method = quantization.get("quant_method")
    if method is None and (quantization.get("load_in_8bit") or quantization.get("load_in_4bit")):
        return "bitsandbytes"  # transformers wrote no name once
    return method if isinstance(method, str) else None


def can_undo(quantization: Any) -> bool:
    """Whether the method is one that `stored_weights` knows; a single format of it may still be refused."""
    method = method_of(quantization)
    return method is not None and method in METHODS


def known_method(quantization: Any) -> str:
    """The method's name.

    Raises
    ------
    InvalidInput
        It is none that `stored_weights` knows.
    """
    method = method_of(quantization)
    if method is None or method not in METHODS:
        shown = f"by {reprlib.repr(method)}" if method else "in a way that its config does not name"
        raise InvalidInput(
            f"the model is quantized {shown}, which cannot be undone here; {', '.join(METHODS)} can"
        )
    return method
