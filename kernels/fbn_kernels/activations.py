"""The activation functions that the kernels support, with their derivatives, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_FORWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda value: F.gelu(value, approximate="tanh"),
    "relu": F.relu,
}

_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": lambda grad, value: torch.ops.aten.silu_backward(grad, value),
    "gelu": lambda grad, value: torch.ops.aten.gelu_backward(grad, value),
    "gelu_tanh": lambda grad, value: torch.ops.aten.gelu_backward(grad, value, approximate="tanh"),
    "relu": lambda grad, value: torch.ops.aten.threshold_backward(grad, value, 0),
}

_ALIASES = {
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}

ACTIVATIONS = tuple(_FORWARD)


def canonical_activation(name: str) -> str:
    """Return the kernels' name of an activation, given by that name or by the name in transformers.

    Raises
    ------
    ValueError
        The kernels do not support the activation.
    """
    canonical = _ALIASES.get(name, name)
    if canonical not in _FORWARD:
        known = ", ".join((*ACTIVATIONS, *_ALIASES))
        raise ValueError(f"activation {name!r} is not one of {known}")
    return canonical


def activate(name: str, value: Tensor) -> Tensor:
    """Apply the activation `name` (a canonical name) elementwise."""
    return _FORWARD[name](value)


def activation_backward(name: str, grad: Tensor, value: Tensor) -> Tensor:
    """Return `grad` times the activation's derivative at `value`."""
    return _BACKWARD[name](grad, value)
