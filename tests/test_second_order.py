"""Claims about the second-order step: exact identities, and what a refit may never do."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fbn_prune.pruning.damping import centred, ridge
from fbn_prune.pruning.second_order import (
    choose_neurons,
    loss_root,
    nested_refits,
    output_error,
    refit,
    removal_costs,
    removal_order,
)


def problem(seed: int, tokens: int = 200, neurons: int = 12, outputs: int = 5):
    """W [outputs, neurons], x [tokens, neurons] with correlated columns, H."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(neurons, neurons, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, neurons, generator=generator, dtype=torch.float64) @ mixing
    weight = torch.randn(outputs, neurons, generator=generator, dtype=torch.float64)
    return weight, x, x.T @ x / tokens


def test_the_refit_is_the_least_squares_solution_as_the_damping_vanishes() -> None:
    weight, x, gram = problem(0)
    kept = torch.tensor([0, 2, 3, 7, 9])
    solution = torch.linalg.lstsq(x[:, kept], x @ weight.T).solution.T
    assert torch.allclose(refit(weight, gram, kept, damping=1e-12), solution, atol=1e-6)


def test_a_redundant_neuron_is_removed_without_any_loss() -> None:
    weight, x, _ = problem(1)
    x[:, 4] = 2 * x[:, 1] - x[:, 8]
    gram = x.T @ x / len(x)
    kept = choose_neurons(weight, gram, 11, damping=1e-6)
    new = refit(weight, gram, kept, damping=1e-9)
    assert not {1, 4, 8} <= set(kept.tolist())
    assert torch.allclose(x[:, kept] @ new.T, x @ weight.T, atol=1e-5)


def test_keeping_everything_changes_nothing() -> None:
    weight, _, gram = problem(2)
    kept = choose_neurons(weight, gram, 12, damping=1e-2)
    assert kept.tolist() == list(range(12))
    assert torch.allclose(refit(weight, gram, kept, damping=1e-3), weight, atol=1e-14, rtol=0)


def test_refits_to_several_widths_at_once_are_those_of_each_width() -> None:
    weight, _, gram = problem(2)
    best = removal_order(weight, gram, damping=1e-2).flip(0)
    widths = {12, 3, 9, 4}
    found = list(nested_refits(weight, gram, best, widths, damping=1e-2))
    assert [len(kept) for kept, _ in found] == [12, 9, 4, 3]
    for kept, new in found:
        assert torch.equal(kept, best[: len(kept)].sort().values)
        expected = refit(weight, gram, kept, damping=1e-2)
        torch.testing.assert_close(new, expected, rtol=1e-10, atol=1e-12)


def test_neurons_with_zero_output_weights_go_first_and_leave_the_others_alone() -> None:
    weight, _, gram = problem(3)
    weight[:, [2, 5, 6]] = 0
    kept = choose_neurons(weight, gram, 9, damping=1e-2)
    assert set(range(12)) - set(kept.tolist()) == {2, 5, 6}
    assert torch.allclose(refit(weight, gram, kept, damping=1e-3), weight[:, kept], atol=1e-12)


@given(seed=st.integers(0, 10_000), keep=st.integers(1, 12), damping=st.floats(1e-6, 10.0))
@settings(deadline=None, max_examples=40)
def test_a_refit_never_does_worse_than_no_refit(seed: int, keep: int, damping: float) -> None:
    weight, _, gram = problem(seed, tokens=8)  # fewer tokens than neurons: H is singular
    kept = choose_neurons(weight, gram, keep, damping=1e-2)
    plain = output_error(weight, gram, kept, weight[:, kept])
    fitted = output_error(weight, gram, kept, refit(weight, gram, kept, damping=damping))
    assert fitted <= plain * (1 + 1e-9) + 1e-9


@given(seed=st.integers(0, 10_000), keep=st.integers(1, 12))
@settings(deadline=None, max_examples=30)
def test_the_order_of_the_neurons_does_not_matter(seed: int, keep: int) -> None:
    weight, _, gram = problem(seed)
    permutation = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    kept = choose_neurons(weight, gram, keep, damping=1e-2)
    moved = choose_neurons(
        weight[:, permutation], gram[permutation][:, permutation], keep, damping=1e-2
    )
    assert set(permutation[moved].tolist()) == set(kept.tolist())


def test_one_neuron_is_removed_exactly_as_an_exhaustive_search_would() -> None:
    weight, _, gram = problem(4, neurons=8)
    ridged = gram + ridge(gram, 1e-2) * torch.eye(len(gram), dtype=gram.dtype)
    kept = choose_neurons(weight, gram, 7, damping=1e-2)
    errors = {}
    for gone in range(8):
        rest = torch.tensor([i for i in range(8) if i != gone])
        new = refit(weight, ridged, rest, damping=1e-12)
        errors[gone] = output_error(weight, ridged, rest, new)
    best = min(errors, key=errors.__getitem__)
    assert set(range(8)) - set(kept.tolist()) == {best}
    cost = float(removal_costs(weight, gram, damping=1e-2).min())
    assert cost == pytest.approx(errors[best], rel=1e-6)


def test_greedy_removal_comes_close_to_the_best_of_all_subsets() -> None:
    weight, _, gram = problem(5, neurons=8)

    def error(kept: torch.Tensor) -> float:
        return output_error(weight, gram, kept, refit(weight, gram, kept, damping=1e-9))

    greedy = error(choose_neurons(weight, gram, 4, damping=1e-6))
    subsets = [error(torch.tensor(s)) for s in itertools.combinations(range(8), 4)]
    assert greedy <= 1.5 * min(subsets)
    assert greedy < sorted(subsets)[len(subsets) // 4]


def test_a_refit_adds_what_the_output_lacks() -> None:
    weight, x, gram = problem(6)
    lacking = 0.1 * torch.roll(x, 1, dims=1) @ weight.T
    kept = torch.arange(12)
    new = refit(weight, gram, kept, damping=1e-12, missing=lacking.T @ x / len(x))
    assert torch.allclose(x @ new.T, x @ weight.T + lacking, atol=1e-6)


def test_centring_leaves_the_mean_to_the_bias() -> None:
    weight, x, _ = problem(7)
    x = x + 3.0
    mean = x.mean(0)
    covariance = centred(x.T @ x / len(x), mean)
    kept = torch.tensor([1, 3, 4, 6, 10])
    new = refit(weight, covariance, kept, damping=1e-12)
    bias = weight @ mean - new @ mean[kept]
    design = torch.cat([x[:, kept], torch.ones(len(x), 1, dtype=torch.float64)], 1)
    solution = torch.linalg.lstsq(design, x @ weight.T).solution.T
    assert torch.allclose(new, solution[:, :-1], atol=1e-6)
    assert torch.allclose(bias, solution[:, -1], atol=1e-5)


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_a_dead_layer_is_handled(level: float) -> None:
    weight = problem(8)[0]
    gram = torch.full((12, 12), level, dtype=torch.float64)
    kept = choose_neurons(weight, gram, 6, damping=1e-2)
    new = refit(weight, gram, kept, damping=1e-3)
    assert len(kept) == 6
    assert torch.isfinite(new).all()


@given(seed=st.integers(0, 10_000), keep=st.integers(1, 11))
@settings(deadline=None, max_examples=30)
def test_the_removal_curve_is_that_of_the_choice(seed: int, keep: int) -> None:
    weight, _, gram = problem(seed)
    costs = removal_costs(weight, gram, damping=1e-2)
    kept = choose_neurons(weight, gram, keep, damping=1e-2)
    gone = [j for j in range(12) if j not in kept.tolist()]
    assert costs[gone].max() <= costs[kept].min()
    assert bool((costs > 0).all())


@pytest.mark.parametrize("rank", [5, 2])
def test_the_loss_root_is_a_root_also_of_a_singular_matrix(rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(rank, 5, generator=generator, dtype=torch.float64)
    root = loss_root(g.T @ g)
    torch.testing.assert_close(root.T @ root, g.T @ g)


def test_outputs_the_loss_does_not_feel_do_not_keep_a_neuron() -> None:
    weight, _, gram = problem(10, neurons=8, outputs=2)
    gram = torch.diag(gram.diagonal())
    weight[0, :4], weight[1, :4] = 10.0, 0.0
    weight[0, 4:], weight[1, 4:] = 0.0, 0.1
    felt = loss_root(torch.diag(torch.tensor([0.0, 1.0], dtype=torch.float64)))
    assert choose_neurons(weight, gram, 4, damping=1e-6).tolist() == [0, 1, 2, 3]
    assert choose_neurons(felt @ weight, gram, 4, damping=1e-6).tolist() == [4, 5, 6, 7]


@given(seed=st.integers(0, 1000), keep=st.integers(1, 149))
@settings(deadline=None, max_examples=20)
def test_one_removal_of_all_neurons_answers_for_every_width(seed: int, keep: int) -> None:
    weight, _, gram = problem(seed, neurons=150)
    order = removal_order(weight, gram, damping=1e-2)
    assert sorted(order.tolist()) == list(range(150))
    kept = choose_neurons(weight, gram, keep, damping=1e-2)
    assert order[150 - keep :].sort().values.tolist() == kept.tolist()
