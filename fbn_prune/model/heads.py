"""Attention heads: where they lie in a layer's tensors, and what cutting whole groups of them leaves of these.

A *group* is a key-value head with the query heads that read it, the least that can go. Which architectures have heads
that can be cut, and under which names, is in :mod:`fbn_prune.model.families`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fbn_prune.errors import FbnPruneError

if TYPE_CHECKING:  # slow to import, and the command line's help needs none of it
    import torch
    from torch import Tensor

Part = Literal["weight", "bias"]


@dataclass(frozen=True)
class HeadProjection:
    """One linear map (stored [out, in]) into or out of a layer's attention heads.

    Attributes
    ----------
    path : where it is, relative to the layer ("self_attn.q_proj").
    blocks : what follows one another on the axis of the heads: "query" (all query heads) or "key"
        (all key or all value heads).
    reads : whether it reads what the heads put out, which then lie on its second axis.
    """

    path: str
    blocks: tuple[Literal["query", "key"], ...]
    reads: bool = False


@dataclass(frozen=True)
class HeadLocation:
    """What a checkpoint's tensor is: a part of one attention projection of one layer."""

    layer: int
    projection: HeadProjection
    part: Part


@dataclass(frozen=True)
class HeadShape:
    """A layer's attention heads. A *group* is a key-value head with the query heads that read it.

    Attributes
    ----------
    groups : key-value heads.
    queries : query heads of each.
    size : channels of a head.
    """

    groups: int
    queries: int
    size: int

    @property
    def heads(self) -> int:
        return self.groups * self.queries

    @property
    def width(self) -> int:
        """Channels that the output projection reads of one group."""
        return self.queries * self.size

    def rows(self, block: Literal["query", "key"]) -> int:
        """Rows of one group in such a block."""
        return self.size * (self.queries if block == "query" else 1)


@dataclass(frozen=True)
class Attention:
    """Where a layer keeps its attention heads, in an architecture whose config gives them a size of their own.

    Only such a config can say that there are fewer of them. A norm over all heads at once would not
    be the same over those that stay, so architectures with one have no entry either.
    """

    module: str
    inputs: tuple[HeadProjection, ...]
    output: HeadProjection

    @property
    def projections(self) -> tuple[HeadProjection, ...]:
        return (*self.inputs, self.output)


@dataclass(frozen=True)
class HeadCut:
    """What the attention of one layer becomes.

    Attributes
    ----------
    kept : int64 [n], the groups that stay (see :class:`fbn_prune.model.families.HeadShape`), ascending.
    out_weight : float32 or float64 [hidden, n * width of a group], their new output weights.
    out_bias : [hidden], the new output bias in place of the old one; None where there is none.
    """

    kept: Tensor
    out_weight: Tensor
    out_bias: Tensor | None = None


def cut_heads(
    location: HeadLocation, tensor: Tensor, cut: HeadCut, shape: HeadShape, dtype: torch.dtype
) -> Tensor:
    """An attention tensor after the cut, contiguous.

    Parameters
    ----------
    shape
        The heads before the cut.
    dtype
        To which new output weights and biases are rounded.

    Raises
    ------
    FbnPruneError
        A new output weight does not fit the dtype.
    """
    if not location.projection.reads:
        rows = _head_rows(location, shape, cut.kept.to(tensor.device))
        return tensor.index_select(0, rows)
    if location.part == "weight":
        return rounded(cut.out_weight, dtype).contiguous()
    return tensor if cut.out_bias is None else rounded(cut.out_bias, dtype)


def head_tensor_shape(
    location: HeadLocation, old: tuple[int, ...], kept: int, shape: HeadShape
) -> tuple[int, ...]:
    """Shape that :func:`cut_heads` gives a tensor of shape `old` where it keeps so many groups."""
    if not location.projection.reads:
        rows = sum(shape.rows(block) for block in location.projection.blocks)
        return (rows * kept, *old[1:])
    return old if location.part == "bias" else (old[0], shape.width * kept)


def _head_rows(location: HeadLocation, shape: HeadShape, kept: Tensor) -> Tensor:
    """Rows of the kept groups in a projection into the heads, block after block."""
    import torch

    rows, start = [], 0
    for block in location.projection.blocks:
        size = shape.rows(block)
        inner = torch.arange(size, device=kept.device)
        rows.append((start + kept[:, None] * size + inner).flatten())
        start += shape.groups * size
    return torch.cat(rows)


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """New output weights in the type in which they are stored.

    Raises
    ------
    FbnPruneError
        One does not fit it.
    """
    result = values.to(dtype)
    if not bool(result.isfinite().all()):
        raise FbnPruneError(
            f"a new output weight is not finite in {dtype} "
            f"(largest magnitude {float(values.abs().max()):g}); raise the damping, or store the model in a wider dtype"
        )
    return result
