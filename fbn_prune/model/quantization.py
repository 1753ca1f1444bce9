"""Read from `config.json` how a model is quantized, and whether :mod:`fbn_prune.model.quantized_formats` can undo it.

This module imports no tensor library, so it is quick to import.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from fbn_prune.errors import InvalidInput

CONFIG_KEYS = ("quantization_config", "compression_config")
"""Keys of the quantization settings in config.json; older compressed-tensors versions wrote the second."""

METHODS = ("fp8", "compressed-tensors", "bitsandbytes")
"""Methods whose weights can be dequantized."""


def quantization_of(config: Mapping[str, Any]) -> Any:
    """Return a config's quantization settings, an object if the config is valid; None if there are none."""
    return next((config[key] for key in CONFIG_KEYS if config.get(key)), None)


def method_of(quantization: Any) -> str | None:
    """Return the method's name; None if the settings name none."""
    if not isinstance(quantization, Mapping):
        return None
    method = quantization.get("quant_method")
    if method is None and (quantization.get("load_in_8bit") or quantization.get("load_in_4bit")):
        return "bitsandbytes"  # old transformers versions wrote no name
    return method if isinstance(method, str) else None


def can_undo(quantization: Any) -> bool:
    """Whether the method is in `METHODS`; `stored_weights` may still refuse a particular format of it."""
    method = method_of(quantization)
    return method is not None and method in METHODS


def known_method(quantization: Any) -> str:
    """Return the method's name.

    Raises
    ------
    InvalidInput
        The method is not in `METHODS`.
    """
    method = method_of(quantization)
    if method is None or method not in METHODS:
        shown = (
            f"by {reprlib.repr(method)}" if method else "by a method that its config does not name"
        )
        raise InvalidInput(
            f"the model is quantized {shown}, which cannot be dequantized; supported: {', '.join(METHODS)}"
        )
    return method
