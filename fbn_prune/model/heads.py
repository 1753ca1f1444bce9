"""Attention heads: where they are in a layer's tensors, and how cutting groups of heads changes those tensors.

A *group*, the unit of a cut, is one key-value head with the query heads that read it. The entries in
:mod:`fbn_prune.model.families` say which architectures have heads that can be cut, and their tensors' names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fbn_prune.errors import FbnPruneError

if TYPE_CHECKING:  # torch is slow to import, and `--help` does not need it
    import torch
    from torch import Tensor

Part = Literal["weight", "bias"]


@dataclass(frozen=True)
class HeadProjection:
    """One linear map (stored [out, in]) into or out of a layer's attention heads.

    Attributes
    ----------
    path
        The module's path relative to the layer ("self_attn.q_proj").
    blocks
        The consecutive blocks along the axis of the heads: "query" is all query heads, "key" all key or value heads.
    reads
        Whether the projection reads the heads' output, so that the heads are on its second axis.
    """

    path: str
    blocks: tuple[Literal["query", "key"], ...]
    reads: bool = False


@dataclass(frozen=True)
class HeadLocation:
    """Which part of which layer's attention projection a checkpoint tensor is."""

    layer: int
    projection: HeadProjection
    part: Part


@dataclass(frozen=True)
class HeadShape:
    """The numbers and size of a layer's attention heads.

    Attributes
    ----------
    groups
        Number of key-value heads.
    queries
        Query heads of each group.
    size
        Channels of a head.
    """

    groups: int
    queries: int
    size: int

    @property
    def heads(self) -> int:
        return self.groups * self.queries

    @property
    def width(self) -> int:
        """Channels of one group in the input of the output projection."""
        return self.queries * self.size

    def rows(self, block: Literal["query", "key"]) -> int:
        """Rows of one group in a block of this kind."""
        return self.size * (self.queries if block == "query" else 1)


@dataclass(frozen=True)
class Attention:
    """The attention projections of an architecture whose heads can be cut.

    Its config must state the head size separately, to be valid with fewer heads. Architectures with a norm over all
    heads have no entry, because removing heads would change the norm of the others.
    """

    module: str
    inputs: tuple[HeadProjection, ...]
    output: HeadProjection

    @property
    def projections(self) -> tuple[HeadProjection, ...]:
        return (*self.inputs, self.output)


@dataclass(frozen=True)
class HeadCut:
    """The cut of one layer's attention.

    Attributes
    ----------
    kept
        int64 [n]: the groups to keep, ascending (see :class:`HeadShape`). With none the layer's attention is left out:
        it adds nothing, whatever its output bias was.
    out_weight
        float32 or float64 [hidden, n * width of a group]: their new output weights.
    out_bias
        [hidden]: the new output bias; None keeps the old one.
    """

    kept: Tensor
    out_weight: Tensor
    out_bias: Tensor | None = None


def cut_heads(
    location: HeadLocation, tensor: Tensor, cut: HeadCut, shape: HeadShape, dtype: torch.dtype
) -> Tensor:
    """Return an attention tensor after the cut, contiguous.

    Parameters
    ----------
    location
        Which attention tensor it is.
    tensor
        Its values before the cut.
    cut
        The groups to keep and the new output weights.
    shape
        The heads before the cut.
    dtype
        The dtype to which new output weights and biases are rounded.

    Raises
    ------
    FbnPruneError
        A new output weight is not finite in `dtype`.
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
    """Return the shape of an attention tensor of shape `old` after :func:`cut_heads` keeps `kept` groups."""
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
    """Convert new output weights to the dtype in which they are stored.

    Raises
    ------
    FbnPruneError
        A value is not finite in that dtype.
    """
    result = values.to(dtype)
    if not bool(result.isfinite().all()):
        raise FbnPruneError(
            f"a new output weight is not finite in {dtype} "
            f"(largest magnitude {float(values.abs().max()):g}); raise the damping, or store the model in a wider dtype"
        )
    return result
