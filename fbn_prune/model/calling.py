"""How a model calls its decoder layers, which stand-ins for layers must follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Calling:
    """How a model and its decoder layers call each other.

    Attributes
    ----------
    items
        Length of the tuple that a layer returns, hidden states first; 0 if it returns a tensor.
    needs_ids
        Whether the model must be given token ids, because it makes inputs of the layers from them.
    """

    items: int
    needs_ids: bool

    def output(self, hidden: Tensor) -> Any:
        """Return hidden states as a layer would."""
        return (hidden, *[None] * (self.items - 1)) if self.items else hidden
