"""A batch with a set a row is cut into tiles that cover every row once, with its own set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fbn_kernels import NeuronSet, NeuronSets, Strategy

WIDTH = 256


def sets_of(*lists: range) -> NeuronSets:
    return NeuronSets.from_sets([NeuronSet.from_indices(list(one), WIDTH) for one in lists])


FOUR = sets_of(range(90), range(30, 130), range(200, 201), range(WIDTH))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=400))
def test_every_row_is_in_one_tile_of_its_own_set(ids: list[int]) -> None:
    batch = FOUR.route(ids)
    seen: list[int] = []
    for owner, start, stop in batch.tiles.tolist():
        assert stop - start <= batch.block_rows
        rows = batch.order[start:stop].tolist()
        assert all(ids[row] == owner for row in rows)
        seen += rows
    assert sorted(seen) == list(range(len(ids)))


@pytest.mark.parametrize(
    ("rows", "height"), [(4, 16), (255, 16), (256, 64), (511, 64), (512, 128), (4096, 128)]
)
def test_tiles_are_as_high_as_the_sets_fill_them(rows: int, height: int) -> None:
    assert FOUR.route(torch.arange(rows) % 4).block_rows == height


def test_a_sequence_gives_its_set_to_all_its_tokens() -> None:
    batch = FOUR.route([2, 0], tokens_per_row=3)
    assert batch.set_ids.tolist() == [2, 2, 2, 0, 0, 0]


def test_membership_tells_which_set_keeps_a_neuron_of_the_union() -> None:
    sets = sets_of(range(10), range(5, 70))
    assert sets.union.count == 70
    assert sets.membership[0].tolist() == [1] * 10 + [0] * 118
    assert sets.membership[1].tolist() == [0] * 5 + [1] * 65 + [0] * 58


def test_few_rows_read_the_union_and_many_rows_waste_no_products() -> None:
    sets = sets_of(range(100), range(50, 150), range(100, 200))
    assert sets.choose(3) is Strategy.UNION
    assert sets.choose(4096) is Strategy.ROUTED


def test_sets_that_share_everything_are_never_read_twice() -> None:
    sets = sets_of(range(64, 192), range(64, 192))
    assert {sets.choose(rows) for rows in (1, 64, 8192)} == {Strategy.UNION}


@pytest.mark.parametrize("wrong", [-1, 4])
def test_an_id_that_is_no_set_is_refused(wrong: int) -> None:
    with pytest.raises(ValueError, match=f"set {wrong} is outside the 4 sets"):
        FOUR.route([0, wrong])


def test_ids_must_be_a_flat_list_of_integers() -> None:
    with pytest.raises(ValueError, match="flat list of integers"):
        FOUR.route(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="flat list of integers"):
        FOUR.route(torch.zeros(2))


def test_sets_of_different_mlps_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="set 1 is for an MLP of 128 neurons, set 0 for 256"):
        NeuronSets.from_sets([NeuronSet.full(256), NeuronSet.full(128)])
    with pytest.raises(ValueError, match="at least one set"):
        NeuronSets.from_sets([])
