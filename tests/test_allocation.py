"""Claims about widths: the budget is kept, the bounds too, and better neurons earn wider layers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.pruning.allocation import (
    blended_widths,
    member_scores,
    network_scores,
    ranked_widths,
)


def scores(*layers: list[float]) -> list[torch.Tensor]:
    return [torch.tensor(layer, dtype=torch.float64) for layer in layers]


def random_scores(full: list[int], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(width, generator=generator, dtype=torch.float64) for width in full]


def test_a_layer_is_as_wide_as_it_has_neurons_among_the_best_and_none_disappears() -> None:
    found = ranked_widths(scores([9, 8, 1, 0], [7, 6, 5, 0], [3, 2, 0, 0]), 6, 1)
    assert found == [2, 3, 1]
    assert ranked_widths(scores([9, 8, 7, 6], [1, 0, 0, 0], [5, 4, 3, 2]), 4, 1) == [2, 1, 1]


def test_whole_layers_keep_everything_and_the_others_share_the_rest() -> None:
    given_scores = scores([0, 0, 0, 0], [9, 8, 7, 1], [6, 2, 1, 1], [0, 0, 0, 0])
    assert ranked_widths(given_scores, 12, 1, whole={0, 3}) == [4, 3, 1, 4]


@given(
    layers=st.integers(1, 8),
    width=st.integers(8, 200),
    multiple=st.integers(1, 8),
    share=st.floats(0.0, 1.2),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=100)
def test_widths_keep_the_budget_and_the_bounds(
    layers: int, width: int, multiple: int, share: float, seed: int
) -> None:
    budget = round(share * layers * width)
    widths = ranked_widths(random_scores([width] * layers, seed), budget, multiple)
    assert all(multiple <= found <= width for found in widths)
    assert all(found % multiple == 0 or found == width for found in widths)
    feasible = min(max(budget, layers * multiple), layers * width)
    # A layer that is whole or as narrow as can be cannot take its share of the rounding.
    assert abs(sum(widths) - feasible) <= max(multiple / 2, width % multiple)


@given(seed=st.integers(0, 1000), budget=st.integers(4, 60))
@settings(deadline=None, max_examples=25)
def test_a_larger_budget_makes_no_layer_narrower(seed: int, budget: int) -> None:
    given_scores = random_scores([16] * 4, seed)
    less, more = (ranked_widths(given_scores, size, 1) for size in (budget, budget + 4))
    assert all(b >= a for a, b in zip(less, more, strict=True))


@given(seed=st.integers(0, 1000), factor=st.floats(0.01, 100.0))
@settings(deadline=None, max_examples=25)
def test_only_the_order_of_scores_matters(seed: int, factor: float) -> None:
    given_scores = random_scores([16] * 4, seed)
    scaled = [layer * factor for layer in given_scores]
    assert ranked_widths(given_scores, 30, 4) == ranked_widths(scaled, 30, 4)


def some_networks(maps: torch.Tensor, widths: list[int], std: torch.Tensor) -> FunctionalNetworks:
    ones = torch.ones(len(maps), dtype=torch.float64)
    return FunctionalNetworks(
        maps=maps,
        widths=widths,
        mean=torch.zeros_like(std),
        std=std,
        explained_variance=ones / 10,
        engagement=ones,
    )


def test_a_networks_score_is_part_in_any_network_times_output_carried() -> None:
    maps = torch.tensor([[1.0, -4.0, 0.5, 0.0], [2.0, 0.0, -0.5, 3.0]])
    networks = some_networks(maps, [2, 2], torch.tensor([1.0, 4.0, 0.0, 1.0]))
    weights = [torch.tensor([[3.0, 0.0], [4.0, 1.0]]), torch.eye(2)]
    first, second = network_scores(networks, weights)
    assert first.tolist() == pytest.approx([2 * 5**0.5, 4 * 2.0])
    assert second.tolist() == pytest.approx([0.0, 3.0])
    assert [layer.tolist() for layer in member_scores(networks, [0])] == [[1.0, 4.0], [0.5, 0.0]]


@given(
    layers=st.integers(1, 8),
    width=st.integers(8, 200),
    multiple=st.integers(1, 8),
    share=st.floats(0.0, 1.0),
    strength=st.floats(0.0, 1.0),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=100)
def test_widths_between_even_and_ranked_ones_keep_what_both_keep(
    layers: int, width: int, multiple: int, share: float, strength: float, seed: int
) -> None:
    full, budget = [width] * layers, round(share * layers * width)
    even = ranked_widths(scores(*[list(range(width, 0, -1))] * layers), budget, multiple)
    ranked = ranked_widths(random_scores(full, seed), budget, multiple)
    found = blended_widths(even, ranked, strength, full, multiple)
    assert all(min(multiple, width) <= w <= width for w in found)
    kept = sorted((sum(even), sum(ranked)))
    slack = max(multiple, width % multiple)
    assert kept[0] - slack <= sum(found) <= kept[1] + slack
    if multiple == 1:
        assert sum(found) == sum(even)
        bounds = [sorted(pair) for pair in zip(even, ranked, strict=True)]
        assert all(low <= w <= high for w, (low, high) in zip(found, bounds, strict=True))


def test_no_step_from_even_widths_is_even_and_a_whole_step_is_the_rules_own() -> None:
    even, ranked, full = [5, 5, 8], [8, 2, 8], [8, 8, 8]
    assert blended_widths(even, ranked, 0.0, full, 1, whole={2}) == even
    assert blended_widths(even, ranked, 1.0, full, 1, whole={2}) == ranked
    assert blended_widths(even, ranked, 0.5, full, 1, whole={2}) in ([7, 3, 8], [6, 4, 8])
