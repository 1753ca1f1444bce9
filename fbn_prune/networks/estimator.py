"""Spatial ICA of an array, with scikit-learn's contract; the solver is :func:`fbn_prune.networks.ica.spatial_ica`."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import Tags, check_array, check_random_state, check_scalar
from sklearn.utils.validation import check_is_fitted, validate_data

from fbn_prune.errors import InvalidInput
from fbn_prune.networks.ica import spatial_ica, standardise

Floats = NDArray[np.floating[Any]]

_DTYPES = (np.float64, np.float32)
_MOST_BY_DEFAULT = 64


class SpatialICA(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Independent maps over features, and the time course of each map over samples.

    Every feature is standardised over samples to Z, and Z is decomposed as ``A @ maps``: the maps are
    statistically independent over *features*, as those of functional MRI are over voxels. For a language
    model the samples are tokens, the features are neurons, and the maps are its functional networks [1]_.
    scikit-learn's `FastICA` makes the columns of A independent over samples instead.

    Parameters
    ----------
    n_components : int or None, default=None
        Number of maps, from 1 to ``min(n_samples, n_features) - 1``. None takes 64, or that limit if it is lower.
    tol : float, default=1e-6
        FastICA stops when ``max_i | |<w_i, w_i before>| - 1 |`` is smaller, w_i being the rows of its rotation.
    max_iter : int, default=1000
        Most iterations of FastICA.
    random_state : int, RandomState instance or None, default=0
        Seed of FastICA's start and of the search for eigenvectors. The same int gives the same maps.

    Attributes
    ----------
    components_ : ndarray of shape (n_components, n_features)
        The maps. Each has mean 0, standard deviation 1 and a skewness of at least 0 over features. They are in the
        order of the variance they explain, largest first.
    mixing_ : ndarray of shape (n_features, n_components)
        The pseudo-inverse of `components_`: ``Z @ mixing_`` are the time courses, the least-squares solution A of
        ``A @ components_ = Z``.
    mean_ : ndarray of shape (n_features,)
        Mean of each feature over samples.
    scale_ : ndarray of shape (n_features,)
        Standard deviation (population) of each feature over samples; 0 for a feature that never changes, whose
        column of Z is 0 whatever its value.
    explained_variance_ratio_ : ndarray of shape (n_components,)
        Share of the variance of Z that each map explains.
    n_iter_ : int
        Iterations that FastICA took.
    n_features_in_ : int
        Number of features seen in `fit`.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of the features seen in `fit`, where X had names that are all strings.

    Warns
    -----
    IcaConvergenceWarning
        From `fit`, if the eigenvectors or the maps had not settled when the iterations ran out.

    See Also
    --------
    fbn_prune.networks.ica.spatial_ica : The solver, for layers that are read one at a time.

    Notes
    -----
    The maps have mean 0, so the part of Z that is equal in all features of a sample is outside the model:
    `inverse_transform` does not restore it. The solver works in float32, with float64 for all matrices of
    n_components by n_components. Attributes and results have the dtype of X, float32 or float64 (float64 if X
    is of another type).

    References
    ----------
    .. [1] "Brain-Inspired Exploration of Functional Networks and Key Neurons in Large Language Models",
       arXiv:2502.20408.
    .. [2] A. Hyvarinen, "Fast and Robust Fixed-Point Algorithms for Independent Component Analysis", IEEE
       Transactions on Neural Networks 10(3), 1999.

    Examples
    --------
    Two maps, each of a tenth of 1000 features, are mixed anew in each of 500 samples, and found again:

    >>> import numpy as np
    >>> from fbn_prune.networks.estimator import SpatialICA
    >>> rng = np.random.default_rng(0)
    >>> maps = rng.random((2, 1000)) < 0.1
    >>> X = 3 * rng.normal(size=(500, 2)) @ maps + rng.normal(size=(500, 1000))
    >>> ica = SpatialICA(n_components=2).fit(X)
    >>> ica.transform(X).shape
    (500, 2)
    >>> match = np.corrcoef(ica.components_, maps)[:2, 2:]
    >>> bool((match.max(axis=1) > 0.95).all())
    True
    """

    def __init__(
        self,
        n_components: int | None = None,
        *,
        tol: float = 1e-6,
        max_iter: int = 1000,
        random_state: int | np.random.RandomState | None = 0,
    ) -> None:
        self.n_components = n_components
        self.tol = tol
        self.max_iter = max_iter
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: object = None) -> SpatialICA:
        """Find the maps.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Finite values; at least 2 samples and 2 features.
        y : None
            Ignored.

        Returns
        -------
        SpatialICA
            The estimator itself.

        Raises
        ------
        ValueError
            If X or a parameter is out of range, or X has fewer than `n_components` independent directions.
        """
        x: Floats = validate_data(
            self, X, dtype=_DTYPES, ensure_min_samples=2, ensure_min_features=2
        )
        limit = min(x.shape) - 1
        k = min(_MOST_BY_DEFAULT, limit) if self.n_components is None else self.n_components
        check_scalar(k, "n_components", Integral, min_val=1, max_val=limit)
        check_scalar(self.tol, "tol", Real, min_val=0, include_boundaries="neither")
        check_scalar(self.max_iter, "max_iter", Integral, min_val=1)
        seed = self.random_state
        if not isinstance(seed, Integral):
            seed = check_random_state(seed).randint(np.iinfo(np.int32).max)
        # torch has no read-only tensors, so a read-only array such as a memory map is copied.
        z, mean, scale = standardise(torch.from_numpy(np.require(x, requirements="W")))
        try:
            found = spatial_ica(
                lambda: [z], int(k), seed=int(seed), tol=self.tol, max_iter=int(self.max_iter)
            )
        except InvalidInput as error:
            raise ValueError(str(error)) from error
        maps = found.maps.double().numpy()
        self.components_ = maps.astype(x.dtype)
        self.mixing_ = np.linalg.pinv(maps).astype(x.dtype)
        self.mean_, self.scale_ = mean.numpy().astype(x.dtype), scale.numpy().astype(x.dtype)
        self.explained_variance_ratio_ = found.explained_variance.numpy().astype(x.dtype)
        self.n_iter_ = found.ica_iterations
        return self

    def transform(self, X: ArrayLike) -> Floats:
        """Time courses: X standardised as in `fit`, times `mixing_`.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples, n_components)
            The activity of each map in each sample.
        """
        check_is_fitted(self)
        x: Floats = validate_data(self, X, dtype=_DTYPES, reset=False)
        inverse = np.divide(1, self.scale_, out=np.zeros_like(self.scale_), where=self.scale_ > 0)
        courses: Floats = (x - self.mean_) @ (self.mixing_ * inverse[:, None])
        return courses.astype(x.dtype, copy=False)

    def inverse_transform(self, X: ArrayLike) -> Floats:
        """Data with given time courses: ``X @ components_``, in the units of the data.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_components)
            Time courses.

        Returns
        -------
        ndarray of shape (n_samples, n_features)
        """
        check_is_fitted(self)
        x: Floats = check_array(X, dtype=_DTYPES)
        if x.shape[1] != len(self.components_):
            raise ValueError(
                f"X has {x.shape[1]} columns, not one for each of {len(self.components_)} maps"
            )
        data: Floats = x @ self.components_ * self.scale_ + self.mean_
        return data.astype(x.dtype, copy=False)

    @property
    def _n_features_out(self) -> int:
        return len(self.components_)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags
