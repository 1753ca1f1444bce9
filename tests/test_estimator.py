"""SpatialICA keeps scikit-learn's contract and gives the maps of the project's own solver."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.utils.estimator_checks import parametrize_with_checks

from fbn_prune.networks.estimator import SpatialICA
from fbn_prune.networks.ica import (
    IcaConvergenceWarning,
    matched_correlation,
    spatial_ica,
    standardise,
)

Array = NDArray[np.floating[Any]]


@pytest.fixture(scope="module")
def planted() -> tuple[Array, Array, Array]:
    """X [1000, 2000] mixed from 4 sparse maps and noise, the maps [4, 2000], and the unit of each feature."""
    rng = np.random.default_rng(0)
    maps = (rng.random((4, 2000)) < 0.1).astype(float)
    raw = 3 * rng.normal(size=(1000, 4)) @ maps + rng.normal(size=(1000, 2000))
    units = rng.uniform(0.5, 2, 2000)
    return raw * units + rng.normal(size=2000), maps, units


@pytest.fixture(scope="module")
def fitted(planted: tuple[Array, Array, Array]) -> SpatialICA:
    return SpatialICA(4).fit(planted[0])


def correlation(a: Array, b: Array) -> float:
    """The least of the correlations of maps matched one to one."""
    return float(matched_correlation(torch.tensor(a), torch.tensor(b)).min())


@parametrize_with_checks([SpatialICA()], expected_failed_checks=lambda _: {})
def test_scikit_learns_contract_without_an_exception(
    estimator: SpatialICA, check: Callable[[SpatialICA], None]
) -> None:
    check(estimator)


def test_planted_maps_are_recovered_in_the_units_of_standardised_features(
    planted: tuple[Array, Array, Array], fitted: SpatialICA
) -> None:
    _, maps, units = planted
    assert correlation(fitted.components_, maps * units / fitted.scale_) >= 0.99


def test_maps_and_time_courses_are_those_of_the_solver(
    planted: tuple[Array, Array, Array], fitted: SpatialICA
) -> None:
    z, mean, std = standardise(torch.tensor(planted[0]))
    found = spatial_ica(lambda: [z], 4, seed=0)
    np.testing.assert_array_equal(fitted.components_, found.maps.numpy())
    np.testing.assert_array_equal(
        fitted.explained_variance_ratio_, found.explained_variance.numpy()
    )
    np.testing.assert_array_equal(fitted.mean_, mean.numpy())
    np.testing.assert_array_equal(fitted.scale_, std.numpy())
    assert fitted.n_iter_ == found.ica_iterations
    courses = fitted.transform(planted[0])
    # Single values differ by the float32 rounding of eigenvectors and maps, which processors do differently.
    difference = np.linalg.norm(courses - found.time_courses.numpy())
    assert difference <= 2e-4 * np.linalg.norm(courses)
    np.testing.assert_allclose(courses, z @ np.linalg.pinv(fitted.components_), atol=2e-4)


def test_data_made_of_the_maps_come_back(fitted: SpatialICA) -> None:
    courses = np.random.default_rng(1).normal(size=(7, 4))
    np.testing.assert_allclose(
        fitted.transform(fitted.inverse_transform(courses)), courses, atol=1e-5
    )


def test_a_feature_that_never_changed_has_no_say(planted: tuple[Array, Array, Array]) -> None:
    x = planted[0].copy()
    x[:, 3] = 5.0
    ica = SpatialICA(4).fit(x)
    assert ica.scale_[3] == 0
    assert np.isfinite(ica.components_).all()
    moved = x.copy()
    moved[:, 3] = 1000.0
    np.testing.assert_array_equal(ica.transform(moved), ica.transform(x))
    np.testing.assert_array_equal(ica.inverse_transform(ica.transform(x))[:, 3], 5.0)


@pytest.mark.parametrize("copy", [clone, lambda ica: pickle.loads(pickle.dumps(ica))])
def test_copies_find_the_same_maps(
    planted: tuple[Array, Array, Array],
    fitted: SpatialICA,
    copy: Callable[[SpatialICA], SpatialICA],
) -> None:
    again = copy(fitted)
    assert again.get_params() == fitted.get_params()
    np.testing.assert_array_equal(again.fit(planted[0]).components_, fitted.components_)


def test_float32_is_kept_and_none_takes_what_the_data_hold() -> None:
    ica = SpatialICA().fit(np.random.default_rng(0).normal(size=(9, 40)).astype(np.float32))
    assert ica.components_.shape == (8, 40)
    learned = (ica.components_, ica.mixing_, ica.mean_, ica.scale_, ica.explained_variance_ratio_)
    assert {array.dtype for array in learned} == {np.dtype(np.float32)}
    assert list(ica.get_feature_names_out()[:2]) == ["spatialica0", "spatialica1"]


def test_too_few_iterations_are_said(planted: tuple[Array, Array, Array]) -> None:
    with pytest.warns(IcaConvergenceWarning, match="had not settled after 1 iterations"):
        SpatialICA(4, max_iter=1).fit(planted[0])


@pytest.mark.parametrize(
    ("parameters", "complaint"),
    [
        ({"n_components": 1000}, "n_components == 1000, must be <= 999"),
        ({"n_components": 0}, "n_components == 0, must be >= 1"),
        ({"tol": 0.0}, "tol == 0.0, must be > 0"),
        ({"max_iter": 0}, "max_iter == 0, must be >= 1"),
    ],
)
def test_parameters_out_of_range_are_refused(
    planted: tuple[Array, Array, Array], parameters: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        SpatialICA(**parameters).fit(planted[0])


def test_data_with_fewer_directions_than_maps_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="only 2 independent directions"):
        SpatialICA(5).fit(rng.normal(size=(20, 2)) @ rng.normal(size=(2, 100)))


def test_time_courses_of_another_number_of_maps_are_refused(fitted: SpatialICA) -> None:
    with pytest.raises(ValueError, match="X has 3 columns, not one for each of 4 maps"):
        fitted.inverse_transform(np.zeros((2, 3)))
