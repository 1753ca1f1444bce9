"""Spatial ICA finds planted maps, streams, and says so when it has not converged."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import FastICA
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from fbn_prune.errors import InvalidInput
from fbn_prune.networks import ica
from fbn_prune.networks.eigen import TokenGram, top_eigenvectors

few = settings(max_examples=8, deadline=None)


def planted(
    k: int = 6, tokens: int = 80, neurons: int = 3000, noise: float = 0.1, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Raw activations [tokens, neurons] mixed from sparse heavy-tailed maps [k, neurons]."""
    g = torch.Generator().manual_seed(seed)
    maps = torch.randn(k, neurons, generator=g) ** 3
    mixing = torch.randn(tokens, k, generator=g)
    raw = mixing @ maps + noise * torch.randn(tokens, neurons, generator=g)
    return raw, maps


def standardised(k: int = 6, neurons: int = 3000, noise: float = 8.0, seed: int = 0) -> Tensor:
    """Planted activations, z-scored; the noise keeps neurons apart that only one map holds."""
    return ica.standardise(planted(k, neurons=neurons, noise=noise, seed=seed)[0])[0]


def found(z: Tensor, k: int, seed: int = 0) -> ica.IcaResult:
    return ica.spatial_ica(lambda: [z], k, seed=seed)


def whitened(z: Tensor, k: int) -> Tensor:
    """[neurons, k] float64: the leading directions, of mean 0 and variance 1."""
    centred = z.T.double() - z.T.double().mean(0)
    return torch.linalg.svd(centred, full_matrices=False).U[:, :k] * len(centred) ** 0.5


def flat_spectrum(size: int, fall: float = 0.68) -> tuple[Tensor, Tensor]:
    """A Gram matrix whose eigenvalues fall as slowly as those of real activations do; and they."""
    g = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=g)).Q
    values = 1.7e6 * (1 + torch.arange(size, dtype=torch.float64)) ** -fall
    return ((vectors * values) @ vectors.T).float(), values


def test_planted_maps_are_recovered() -> None:
    raw, truth = planted()
    result = found(raw - raw.mean(0), 6)
    assert result.converged
    assert ica.matched_correlation(result.maps, truth).min() >= 0.99


def test_planted_maps_are_recovered_over_several_layers_of_standardised_activations() -> None:
    z = standardised(k=5, neurons=2400)
    layers = list(z.split([700, 1000, 700], dim=1))
    whole, streamed = found(z, 5), ica.spatial_ica(lambda: iter(layers), 5)
    assert ica.matched_correlation(whole.maps, streamed.maps).min() >= 0.9999
    torch.testing.assert_close(whole.maps, streamed.maps, atol=2e-3, rtol=0)
    torch.testing.assert_close(
        whole.explained_variance, streamed.explained_variance, rtol=1e-4, atol=0
    )


def test_maps_depend_on_the_seed_no_more_than_scikit_learns_do_and_settle_without_a_warning() -> (
    None
):
    z = standardised()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = found(z, 6)
    assert ours.converged
    assert torch.equal(ours.maps, found(z, 6).maps)
    assert ica.matched_correlation(ours.maps, found(z, 6, 1).maps).min() >= 0.99
    theirs = FastICA(6, fun="cube", whiten="unit-variance", random_state=0, max_iter=1000, tol=1e-6)
    maps = torch.from_numpy(theirs.fit_transform(z.T.double().numpy()).T)
    assert ica.matched_correlation(ours.maps, maps).min() >= 0.99


def test_fastica_takes_the_path_of_scikit_learn_from_the_same_start_and_in_float32_too() -> None:
    white = whitened(standardised(k=4), 4)
    start = np.random.default_rng(0).normal(size=(4, 4))
    theirs = FastICA(fun="cube", whiten=False, w_init=start, max_iter=500, tol=1e-9)
    theirs.fit(white.numpy())
    ours = ica.fastica(white, w_init=torch.from_numpy(start), max_iter=500, tol=1e-9)
    torch.testing.assert_close(ours.W, torch.from_numpy(theirs.components_), atol=1e-5, rtol=0)
    single, double = ica.fastica(white.float(), seed=1), ica.fastica(white, seed=1)
    torch.testing.assert_close(single.W, double.W, atol=1e-3, rtol=0)


def test_fast_eigenvectors_span_the_exact_space_of_a_flat_spectrum() -> None:
    k = 40
    gram, values = flat_spectrum(1100)
    exact = torch.linalg.eigh(gram.double()).eigenvectors.flip(1)[:, :k]
    fast = top_eigenvectors(gram, k)
    assert fast.iterations > 0
    assert fast.converged
    cosines = torch.linalg.svdvals(exact.T @ fast.vectors.double())
    assert cosines.min() >= 0.9999
    torch.testing.assert_close(fast.values, values[:k], rtol=1e-4, atol=0)


def test_fast_eigenvectors_lead_to_the_maps_of_the_exact_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    g = torch.Generator().manual_seed(0)
    maps = torch.randn(400, 3000, generator=g) ** 3
    strengths = (1 + torch.arange(400)) ** -0.34
    z, _, _ = ica.standardise((torch.randn(1100, 400, generator=g) * strengths) @ maps)
    fast = found(z, 16)
    monkeypatch.setattr("fbn_prune.networks.eigen._EXACT_UP_TO", 2000)
    exact = found(z, 16)
    assert fast.eigen_iterations > 0
    assert exact.eigen_iterations == 0
    assert ica.matched_correlation(fast.maps, exact.maps).min() >= 0.99


def test_eigenvectors_settle_over_restarts_of_a_small_basis(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gram, values = flat_spectrum(1100)
    monkeypatch.setattr("fbn_prune.networks.eigen._BASES", 3)
    result = top_eigenvectors(gram, 40)
    assert result.iterations * 40 > 3 * (40 + 40)  # more columns than the basis holds
    assert result.converged
    torch.testing.assert_close(result.vectors.T @ result.vectors, torch.eye(40), atol=1e-5, rtol=0)
    torch.testing.assert_close(result.values, values[:40], rtol=1e-4, atol=0)


def test_eigenvectors_that_no_gap_separates_are_reported() -> None:
    with pytest.warns(ica.IcaConvergenceWarning, match="eigenvalue 40 may be too close"):
        result = top_eigenvectors(torch.eye(1100), 40)
    assert not result.converged


def test_fastica_that_runs_out_of_iterations_says_so() -> None:
    noise = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    with pytest.warns(ica.IcaConvergenceWarning, match="after 2 iterations"):
        result = ica.fastica(noise, max_iter=2)
    assert not result.converged


def test_steps_that_go_round_in_circles_are_damped_until_they_settle() -> None:
    white = whitened(standardised(k=3, neurons=1500, noise=3.0), 3)
    start = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs = FastICA(fun="cube", whiten=False, w_init=start.numpy(), max_iter=1000, tol=1e-6)
    with pytest.warns(ConvergenceWarning):
        theirs.fit(white.numpy())
    ours = ica.fastica(white, w_init=start)
    assert ours.converged
    assert ours.damped_from is not None


def test_each_layer_on_its_own_is_the_same_function_on_one_layer() -> None:
    raw, truth = planted(k=3, neurons=4000)
    for half in (slice(0, 2000), slice(2000, 4000)):
        z, _, std = ica.standardise(raw[:, half])
        maps = found(z * std, 3).maps
        assert ica.matched_correlation(maps, truth[:, half]).min() >= 0.99


def test_the_gram_is_handed_over_once() -> None:
    gram = TokenGram(4)
    gram.update(torch.ones(4, 3))
    gram.finish()
    with pytest.raises(RuntimeError, match="handed over"):
        gram.update(torch.ones(4, 3))


def test_a_dead_neuron_is_all_zero_after_standardising() -> None:
    raw = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    raw[:, 1], raw[:, 2] = 0.0, 0.1
    z, mean, std = ica.standardise(raw)
    assert torch.equal(z[:, 1:3], torch.zeros(50, 2))
    assert std[1:3].tolist() == [0.0, 0.0]
    torch.testing.assert_close(mean[1:3], torch.tensor([0.0, 0.1]))


def test_dead_neurons_and_dead_layers_leave_the_other_maps_as_they_were() -> None:
    alive = standardised(k=4)
    dead = torch.zeros(80, 300)
    layers = [torch.cat([alive[:, :1000], dead[:, :50]], dim=1), dead, alive[:, 1000:]]
    result = ica.spatial_ica(lambda: layers, 4)
    assert bool(torch.isfinite(result.maps).all())
    live = torch.cat([torch.arange(1000), torch.arange(1350, 3350)])
    assert ica.matched_correlation(result.maps[:, live], found(alive, 4).maps).min() >= 0.99
    corpses = result.maps[:, 1000:1350]
    assert bool((corpses == corpses[:, :1]).all())
    assert corpses.abs().max() < 0.2


def test_time_courses_are_the_least_squares_loadings_of_the_maps() -> None:
    z = standardised()
    result = found(z, 6)
    expected = (z.double() @ torch.linalg.pinv(result.maps.double())).float()
    torch.testing.assert_close(result.time_courses, expected, atol=1e-3, rtol=1e-3)


def test_explained_variance_is_ordered_and_sums_to_what_the_subspace_holds() -> None:
    z = standardised(noise=5.0)
    result = found(z, 6)
    assert torch.equal(
        result.explained_variance.sort(descending=True).values, result.explained_variance
    )
    singular = torch.linalg.svdvals((z - z.mean(1, keepdim=True)).double())
    share = singular[:6].square().sum() / z.double().square().sum()
    torch.testing.assert_close(result.explained_variance.sum(), share, rtol=1e-4, atol=0)


@pytest.mark.parametrize("k", [-1, 0, 40, 41])
def test_an_impossible_number_of_networks_is_refused(k: int) -> None:
    with pytest.raises(InvalidInput, match=rf"cannot find {k} networks .* ask for 1 to 39"):
        found(torch.randn(40, 100), k)


def of_rank_3() -> Tensor:
    raw, _ = planted(k=3, noise=0.0)
    return raw - raw.mean(0)


@pytest.mark.parametrize(
    ("layers", "k", "message"),
    [
        (lambda: [of_rank_3()], 5, "only 3 independent directions"),
        (lambda: [torch.full((40, 100), torch.nan)], 3, "NaN or infinite"),
        (
            lambda: [torch.randn(40, 10), torch.randn(41, 10)],
            3,
            r"shape \(41, 10\), not \[40, neurons\]",
        ),
        (lambda: [], 3, "there are no layers"),
    ],
)
def test_activations_that_cannot_be_decomposed_are_refused(
    layers: Callable[[], list[Tensor]], k: int, message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        ica.spatial_ica(layers, k)


@given(st.integers(0, 1000))
@few
def test_permuting_neurons_permutes_the_maps(seed: int) -> None:
    z = standardised(k=3, neurons=1500, seed=seed)
    order = torch.randperm(1500, generator=torch.Generator().manual_seed(seed))
    straight, shuffled = found(z, 3).maps, found(z[:, order], 3).maps
    torch.testing.assert_close(straight[:, order], shuffled, atol=5e-3, rtol=0)


@given(st.floats(1e-3, 1e3), st.floats(-5, 5))
@few
def test_scale_and_offset_of_a_neuron_change_nothing(scale: float, offset: float) -> None:
    raw, _ = planted(k=3, neurons=1500, noise=8.0)
    plain = ica.standardise(raw)[0]
    moved = ica.standardise((raw + offset) * scale)[0]
    torch.testing.assert_close(plain, moved, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found(plain, 3).maps, found(moved, 3).maps, atol=5e-3, rtol=0)


@given(st.integers(0, 1000), st.integers(1, 5))
@few
def test_maps_are_z_scores_with_positive_skewness(seed: int, k: int) -> None:
    z = standardised(k=5, neurons=1500, seed=seed)
    maps = found(z, k, seed).maps.double()
    torch.testing.assert_close(maps.mean(1), torch.zeros(k).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(maps.square().mean(1), torch.ones(k).double(), atol=1e-5, rtol=0)
    assert bool((maps.pow(3).mean(1) >= 0).all())


def test_matching_sees_through_order_and_sign() -> None:
    maps = torch.randn(5, 400, generator=torch.Generator().manual_seed(0))
    other = -maps[[3, 1, 4, 0, 2]]
    assert ica.matched_correlation(maps, other).min() > 0.999999
    assert ica.spatial_overlap(maps, other, 1.0).tolist() == [1.0] * 5


def test_overlap_is_intersection_over_union_of_the_members() -> None:
    a = torch.tensor([[3.0, 3.0, 3.0, 0.0, 0.0, 0.0]])
    b = torch.tensor([[3.0, 3.0, 0.0, -3.0, 0.0, 0.0]])
    assert ica.spatial_overlap(a, b, 2.0).tolist() == [0.5]
