"""A neuron set says how its rows lie in memory and refuses what is not a set."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fbn_kernels import BLOCK, Kind, NeuronSet
from fbn_kernels.neuron_set import runs_of

WIDTH = 320

kept = st.sets(st.integers(0, WIDTH - 1), min_size=1).map(sorted)


@pytest.mark.parametrize(
    ("indices", "kind"),
    [
        (range(1), Kind.PREFIX),
        (range(100), Kind.PREFIX),
        (range(WIDTH), Kind.PREFIX),
        (range(64, 128), Kind.BLOCK64),
        ([*range(64), *range(192, 320)], Kind.BLOCK64),
        (range(65, 129), Kind.ROWS),
        ([*range(64), *range(128, 191)], Kind.ROWS),
        ([7], Kind.ROWS),
    ],
)
def test_the_kind_follows_from_where_the_rows_lie(indices: range | list[int], kind: Kind) -> None:
    assert NeuronSet.from_indices(list(indices), WIDTH).kind is kind


@given(kept)
def test_the_list_is_padded_to_blocks_with_a_row_that_may_be_read(indices: list[int]) -> None:
    neurons = NeuronSet.from_indices(indices, WIDTH)
    assert neurons.indices.dtype == torch.int32
    assert neurons.indices.numel() == -(-len(indices) // BLOCK) * BLOCK
    assert neurons.rows().tolist() == indices
    assert set(neurons.indices[len(indices) :].tolist()) <= {indices[-1]}


@given(kept)
def test_runs_list_the_rows_once_and_cannot_be_joined(indices: list[int]) -> None:
    runs = runs_of(torch.tensor(indices))
    assert [row for first, stop in runs for row in range(first, stop)] == indices
    assert all(stop < first for (_, stop), (first, _) in itertools.pairwise(runs))


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([], "at least one neuron"),
        ([1, 5, 5, 9], r"neuron 5 is listed twice \(position 2\)"),
        ([1, 9, 5], "sorted: 5 at position 2 follows 9"),
        ([0, WIDTH], r"neuron 320 at position 1 is outside \[0, 320\)"),
        ([-1, 3], "neuron -1 at position 0 is outside"),
        ([[1, 2]], r"flat list, got shape \[1, 2\]"),
    ],
)
def test_what_is_no_set_is_refused(indices: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeuronSet.from_indices(indices, WIDTH)


@pytest.mark.parametrize("indices", [torch.ones(4, dtype=torch.bool), torch.tensor([0.5, 1.0])])
def test_masks_and_fractions_are_refused(indices: torch.Tensor) -> None:
    with pytest.raises(TypeError, match="must be integers"):
        NeuronSet.from_indices(indices, WIDTH)


def test_the_full_set_is_a_prefix() -> None:
    full = NeuronSet.full(WIDTH)
    assert (full.kind, len(full)) == (Kind.PREFIX, WIDTH)
