"""Run a batch whose rows use different sets of neurons.

There are two strategies. `UNION` computes the neurons that any set keeps once, and zeroes in each row those outside its
own set, so weights are read once. `ROUTED` sorts the rows by set and gives each tile of rows its own index list: no
product is wasted, but weights that two sets share are read twice. For few rows reading dominates, for many arithmetic.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .neuron_set import Kind, NeuronSet

RIDGE_TOKENS = 184
"""Number of rows for which the arithmetic of a weight row takes as long as reading it (H200, bfloat16)."""

ROUTED_ROWS = (128, 64, 16)
"""Numbers of rows in a tile of a routed batch: the largest that the sets fill on average, else the last."""


class Strategy(enum.Enum):
    """How a batch over several sets is run."""

    UNION = "union"
    ROUTED = "routed"


@dataclass(frozen=True, eq=False)
class NeuronSets:
    """Several sets of the same MLP, stored as index lists.

    Attributes
    ----------
    sets
        The sets, numbered from 0.
    indices
        int32: the padded index lists one after the other.
    table
        int32 [sets, 2]: the start of a set's list in `indices`, and its number of neurons.
    union
        The neurons that any of them keeps.
    membership
        uint8 [sets, padded union]: 1 where the set keeps that neuron of the union, 0 elsewhere and
        on the padding.
    """

    sets: tuple[NeuronSet, ...]
    indices: Tensor
    table: Tensor
    union: NeuronSet
    membership: Tensor

    @classmethod
    def from_sets(cls, sets: Sequence[NeuronSet]) -> NeuronSets:
        """Combine sets of one MLP.

        Raises
        ------
        ValueError
            There are no sets, or they differ in width or device.
        """
        if not sets:
            raise ValueError("at least one set is needed, got none")
        first = sets[0]
        for number, one in enumerate(sets):
            if one.width != first.width:
                raise ValueError(
                    f"set {number} is for an MLP of {one.width} neurons, set 0 for {first.width}"
                )
            if one.indices.device != first.indices.device:
                raise ValueError(
                    f"set {number} is on {one.indices.device}, set 0 on {first.indices.device}"
                )
        kept = torch.zeros(len(sets), first.width, dtype=torch.uint8)
        for number, one in enumerate(sets):
            kept[number, one.rows().cpu()] = 1
        device = first.indices.device
        union = NeuronSet.from_indices(torch.nonzero(kept.amax(0)).flatten(), first.width)
        membership = kept[:, union.indices.to(torch.int64)]
        membership[:, union.count :] = 0
        starts, total = [], 0
        for one in sets:
            starts.append(total)
            total += one.indices.numel()
        table = torch.tensor(
            [[start, one.count] for start, one in zip(starts, sets, strict=True)], dtype=torch.int32
        )
        return cls(
            sets=tuple(sets),
            indices=torch.cat([one.indices for one in sets]),
            table=table.to(device),
            union=union.to(device),
            membership=membership.to(device),
        )

    @property
    def width(self) -> int:
        """Neurons in the whole MLP."""
        return self.union.width

    @property
    def kind(self) -> Kind:
        """`BLOCK64` if every set is in aligned blocks, else `ROWS`."""
        blocks = all(one.kind is Kind.BLOCK64 for one in self.sets)
        return Kind.BLOCK64 if blocks else Kind.ROWS

    @property
    def largest(self) -> int:
        """Neurons of the largest set."""
        return max(one.count for one in self.sets)

    def to(self, device: torch.device | str) -> NeuronSets:
        """Return the same sets with their lists on `device`."""
        return NeuronSets(
            tuple(one.to(device) for one in self.sets),
            self.indices.to(device),
            self.table.to(device),
            self.union.to(device),
            self.membership.to(device),
        )

    def choose(self, rows: int) -> Strategy:
        """Return the cheaper strategy for `rows` rows spread evenly over the sets.

        The cost of a strategy, in weight rows read, is the larger of the rows it reads and the rows
        it multiplies over `RIDGE_TOKENS`.
        """
        present = min(rows, len(self.sets))
        kept = sum(one.count for one in self.sets) / len(self.sets)
        routed = max(kept * present, rows * kept / RIDGE_TOKENS)
        union = max(self.union.count, rows * self.union.count / RIDGE_TOKENS)
        return Strategy.UNION if union <= routed else Strategy.ROUTED

    def route(
        self,
        set_ids: Tensor | Sequence[int],
        *,
        tokens_per_row: int = 1,
        strategy: Strategy | None = None,
    ) -> NeuronBatch:
        """Assign a set to each row of a batch.

        Nothing is read back from the device, so the call can be captured in a CUDA graph. Route once for each forward
        pass and use the result in every layer whose sets have the same numbers.

        Parameters
        ----------
        set_ids
            int [batch]: the set of each row. Ids are checked on the CPU; on a GPU, and inside a compiled function,
            the caller must ensure that they are in range.
        tokens_per_row
            Number of consecutive rows of the flattened activations for each entry.
        strategy
            The strategy; by default that of `choose`.

        Raises
        ------
        ValueError
            The ids are not a flat list of integers, or one is out of range.
        """
        device = self.indices.device
        ids = torch.as_tensor(set_ids)
        if ids.dim() != 1 or ids.is_floating_point():
            raise ValueError(
                f"set ids must be a flat list of integers, got {ids.dtype} {ids.shape}"
            )
        if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= len(self.sets):
                wrong = low if low < 0 else high
                raise ValueError(f"set {wrong} is outside the {len(self.sets)} sets")
        ids = ids.to(device, torch.int32)
        if tokens_per_row != 1:
            ids = ids.repeat_interleave(tokens_per_row)
        rows = ids.numel()
        filled = (size for size in ROUTED_ROWS if rows >= size * len(self.sets))
        block_rows = next(filled, ROUTED_ROWS[-1])
        order, tiles = _tile_table(ids, len(self.sets), block_rows)
        return NeuronBatch(self, ids, order, tiles, block_rows, strategy or self.choose(rows))


@dataclass(frozen=True, eq=False)
class NeuronBatch:
    """The set of each row of a batch.

    Attributes
    ----------
    sets
        The sets.
    set_ids
        int32 [rows]: each row's set.
    order
        int32 [rows]: the rows sorted by set.
    tiles
        int32 [tiles, 3]: for each tile of rows its set and its range in `order`; surplus tiles have an empty range.
    block_rows
        Rows in a tile.
    strategy
        The strategy that runs the batch.
    """

    sets: NeuronSets
    set_ids: Tensor
    order: Tensor
    tiles: Tensor
    block_rows: int
    strategy: Strategy

    @property
    def width(self) -> int:
        """Neurons in the whole MLP."""
        return self.sets.width


def _tile_table(ids: Tensor, sets: int, block_rows: int) -> tuple[Tensor, Tensor]:
    """Sort rows by set and cut each set's rows into tiles, without reading anything back."""
    rows = ids.numel()
    order = torch.argsort(ids, stable=True)
    sorted_ids = ids[order].contiguous()
    numbers = torch.arange(sets, device=ids.device, dtype=torch.int32)
    starts = torch.searchsorted(sorted_ids, numbers)
    stops = torch.searchsorted(sorted_ids, numbers, right=True)
    tiles_of = (stops - starts + block_rows - 1) // block_rows
    ends = torch.cumsum(tiles_of, 0)
    # The number of tiles depends on the ids; this bound does not.
    bound = max(1, min(rows, rows // block_rows + sets))
    tile = torch.arange(bound, device=ids.device)
    owner = torch.searchsorted(ends, tile, right=True).clamp(max=sets - 1)
    within = tile - (ends - tiles_of)[owner]
    start = starts[owner] + within * block_rows
    stop = torch.minimum(start + block_rows, stops[owner])
    start = torch.minimum(start, stop)
    return order.to(torch.int32), torch.stack([owner, start, stop], 1).to(torch.int32)
