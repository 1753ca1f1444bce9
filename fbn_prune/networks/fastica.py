"""Symmetric FastICA with the cube contrast (Hyvarinen 1999), after scikit-learn's ``_fastica.py``.

Differences from scikit-learn: steps that go round in circles are damped, a failure to converge has its own warning
class, and the k by k algebra is in float64 whatever the data's dtype.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fbn_prune.errors import InvalidInput
from fbn_prune.networks.eigen import IcaConvergenceWarning
from fbn_prune.networks.gram import quick_products

_ROWS_PER_CHUNK = 4096
_PATIENCE = 20


@dataclass(frozen=True)
class Unmixing:
    """Rotation `W` [k, k] float64, orthogonal: the sources are ``x_white @ W.T``.

    `change` is the change of W in the last step; `damped_from` the first iteration with a damped step, or None.
    """

    W: Tensor
    iterations: int
    converged: bool
    change: float
    damped_from: int | None


@quick_products()
def fastica(
    x_white: Tensor,
    *,
    seed: int = 0,
    w_init: Tensor | None = None,
    tol: float = 1e-6,
    max_iter: int = 1000,
    on_step: Callable[[], None] = lambda: None,
) -> Unmixing:
    """Find the rotation of whitened data that makes its components independent.

    Parameters
    ----------
    x_white
        [n, k], float32 or float64: centred, with unit covariance. The iterations run in its dtype.
    seed
        Seed of the Gaussian start; not used with `w_init`.
    w_init
        Start [k, k], which is decorrelated first.
    tol
        The iterations stop when max_i abs(abs(<w_i, w_i before>) - 1), for an undamped step, is smaller; as in
        scikit-learn.
    on_step
        Called after each iteration.

    Raises
    ------
    InvalidInput
        `w_init` has another shape than [k, k].

    Warns
    -----
    IcaConvergenceWarning
        The rotation has not settled after `max_iter` steps.

    Notes
    -----
    The steps are scikit-learn's, W <- polar(E[y^3 x^T] - 3 W), as long as they make progress. They can end in a
    cycle. If for 20 steps neither the sum of abs kurtosis (the quantity that they increase) nor the change reaches a
    new best, the steps become polar(S (E[y^3 x^T] - 3 W) + d W), with S the signs of the kurtosis. d doubles whenever
    the sum falls. The fixed points are the same, and the sum of abs kurtosis grows.
    """
    k = x_white.shape[1]
    if w_init is None:
        w_init = torch.randn(
            k, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        )
    if w_init.shape != (k, k):
        raise InvalidInput(f"w_init has shape {tuple(w_init.shape)}, not ({k}, {k})")
    rounding = torch.finfo(x_white.dtype).eps
    w = before = _decorrelate(w_init.to(x_white.device, torch.float64))
    gradient = gradient_before = torch.zeros_like(w)
    iteration, since_best, damping, damped_from = 0, 0, 0.0, None
    change = least_change = float("inf")
    climbed = highest = 0.0
    while iteration < max_iter and not change < tol:
        iteration += 1
        on_step()
        gradient = _gradient(x_white, w)
        kurtosis = (gradient * w).sum(dim=1)
        height = float(kurtosis.abs().sum())
        if damped_from is None:
            since_best = 0 if height > highest or change < least_change else since_best + 1
            highest, least_change = max(highest, height), min(least_change, change)
            if since_best == _PATIENCE:
                damped_from, damping = iteration, height / (4 * k)
        elif height < climbed * (1 - rounding):
            damping *= 2
            w, gradient, height = before, gradient_before, climbed
            kurtosis = (gradient * w).sum(dim=1)
        before, gradient_before, climbed = w, gradient, height
        signs = torch.where(kurtosis >= 0, 1.0, -1.0).to(w)
        w = _decorrelate(signs[:, None] * gradient + damping * w)
        step = float(((w * before).sum(dim=1).abs() - 1).abs().max())
        change = step * (1 + damping * k / height) ** 2 if damping else step
    if not change < tol:
        warnings.warn(
            f"FastICA had not settled after {iteration} iterations: last change {change:.1e} > "
            f"{tol:.0e}; use more tokens or fewer networks",
            IcaConvergenceWarning,
            stacklevel=2,
        )
    return Unmixing(w, iteration, change < tol, change, damped_from)


def seeded_start(token_basis: Tensor, seed: int) -> Tensor:
    """Draw a random start [k, k] for whitened data whose coordinates are `token_basis` [T, k].

    The Gaussian is drawn in token space and projected, so it rotates and flips with the basis. Solvers that compute
    the same subspace in different ways therefore start from the same point.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens, k = token_basis.shape
    gaussian = torch.randn(k, tokens, dtype=torch.float64, generator=generator)
    directions = torch.nn.functional.normalize(token_basis.double(), dim=0)
    return gaussian.to(directions.device) @ directions


def _gradient(x_white: Tensor, w: Tensor) -> Tensor:
    """E[y^3 x^T] - E[3 y^2] W, [k, k] float64; E[y^2] is exactly 1 for whitened data."""
    rows = w.T.to(x_white.dtype)
    gradient = -3.0 * w
    for chunk in torch.split(x_white, _ROWS_PER_CHUNK):
        sources = chunk @ rows
        gradient += (sources.square().mul_(sources).T @ chunk).double() / len(x_white)
    return gradient


def _decorrelate(w: Tensor) -> Tensor:
    """(w w^T)^(-1/2) w: the orthogonal matrix nearest to `w`."""
    values, vectors = torch.linalg.eigh(w @ w.T)
    return (vectors * values.clamp_min(torch.finfo(w.dtype).tiny).rsqrt()) @ (vectors.T @ w)
