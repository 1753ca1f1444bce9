"""How much a Gram matrix is damped before it is inverted, so that no input makes the inverse meaningless.

A ridge is a share of the neurons' mean energy (the diagonal of H). Four things that real models do to that:

- A few neurons with massive activations (Sun et al., arXiv 2402.17762) can hold nearly all the energy; a ridge
  measured by them would drown the others, so they are left out of the mean.
- H from fewer tokens than a layer has neurons is singular, and a refit to it follows the sample; the refit's share
  grows as the tokens get fewer.
- Sums in float32 leave rounding errors as large as a share of each neuron's own energy; where they make H indefinite,
  each neuron gets as much of its own energy on top as lets H be factored.
- A neuron that never changes has, behind an output bias, a variance of rounding errors alone: it counts as dead.

Whatever is changed is said with a :class:`DampingWarning`. Pure numerics, float64.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from fbn_prune.errors import FbnPruneError

OUTLIER_ENERGY = 1e4
"""An outlier neuron has more than so many times the median energy of its layer. Models of 0.3 to 7 M parameters reach
7500."""

OUTLIER_SHARE = 0.01
"""More outliers than this share of the neurons (and more than one) are no outliers, but what the layer does."""

TOKENS_PER_NEURON = 16
"""From so many tokens for each neuron on, the refit's damping is as asked for (`eval/quality/few_tokens.py`)."""

LARGEST_SHARE = 1.0
"""No refit is damped more than by the mean energy itself for want of tokens."""

RESOLVED_VARIANCE = 8 * torch.finfo(torch.float32).eps
"""The least variance, as a share of the mean square, that float32 sums can tell from none."""

OWN_ENERGY = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Shares of each neuron's own energy added, in turn, until H can be factored."""


class DampingWarning(UserWarning):
    """A Gram matrix was damped otherwise than asked for."""


def outliers(gram: Tensor) -> Tensor:
    """Neurons with massive activations, bool [neurons]; none where they are not few."""
    energy = gram.diagonal()
    live = energy[energy > 0]
    if len(live) == 0:
        return torch.zeros_like(energy, dtype=torch.bool)
    far = energy > OUTLIER_ENERGY * live.median()
    few = int(far.sum()) <= max(1.0, OUTLIER_SHARE * len(energy))
    return far if few else torch.zeros_like(far)


def ridge(gram: Tensor, share: float) -> float:
    """`share` of the mean energy of the neurons that are no outliers; 1 where none of them is active."""
    scale = float(gram.diagonal()[~outliers(gram)].mean())
    return share * scale if scale > 0 else 1.0


def warn_of_outliers(gram: Tensor) -> None:
    """Say that some neurons do not count in the :func:`ridge`, if so."""
    far = outliers(gram)
    if not bool(far.any()):
        return
    energy = gram.diagonal()
    times = float(energy.mean() / energy[~far].mean())
    warnings.warn(
        f"{int(far.sum())} neurons with massive activations make the mean energy {times:.3g} times what it is "
        "without them: the damping is measured by the others",
        DampingWarning,
        stacklevel=2,
    )


def factored(gram: Tensor, added: float) -> Tensor:
    """Cholesky factor of H + `added` I, with as little more on the diagonal as it takes.

    Raises
    ------
    FbnPruneError
        H is not finite, or so far from positive semidefinite that no damping helps.
    """
    if not bool(torch.isfinite(gram).all()):
        raise FbnPruneError(
            "the statistics of the activations overflow: compute in --dtype float32"
        )
    base = _on_diagonal(gram, added)
    factor, failed = torch.linalg.cholesky_ex(base)
    if not int(failed):
        return factor
    own = gram.diagonal().clamp(min=0)
    for share in OWN_ENERGY:
        factor, failed = torch.linalg.cholesky_ex(base + torch.diag(share * own))
        if not int(failed):
            warnings.warn(
                f"H is not positive definite at this damping: each neuron is damped by {share:g} of its own "
                "energy besides",
                DampingWarning,
                stacklevel=2,
            )
            return factor
    raise FbnPruneError(
        "H cannot be inverted at any damping: the activations' statistics are damaged; raise --damping and "
        "--refit-damping, or compute in --dtype float32"
    )


def refit_share(share: float, tokens: float, neurons: int) -> float:
    """The refit's damping where `tokens` have been seen: grows with the square of what is missing.

    At :data:`TOKENS_PER_NEURON` and above it is `share`.
    """
    missing = TOKENS_PER_NEURON * neurons / max(tokens, 1.0)
    if missing <= 1 or share >= LARGEST_SHARE:
        return share
    adapted = min(share * missing**2, LARGEST_SHARE)
    if tokens < neurons:
        warnings.warn(
            f"{tokens:.0f} tokens for {neurons} neurons: H is singular, and the refit's damping is {adapted:.2g} "
            f"instead of {share:g}; raise --tokens",
            DampingWarning,
            stacklevel=2,
        )
    else:
        warnings.warn(
            f"{tokens / neurons:.1f} tokens for each neuron are few: the refit's damping is {adapted:.2g} instead "
            f"of {share:g}",
            DampingWarning,
            stacklevel=2,
        )
    return adapted


def constant_neurons(gram: Tensor, mean: Tensor) -> Tensor:
    """Neurons whose variance float32 sums cannot tell from none, dead ones included; bool [neurons]."""
    energy = gram.diagonal()
    return energy - mean.square() <= RESOLVED_VARIANCE * energy


def centred(gram: Tensor, mean: Tensor) -> Tensor:
    """The covariance belonging to H and the mean: what is left to explain where an output bias takes the mean.

    Rows and columns of :func:`constant_neurons` are zero.
    """
    covariance = gram - torch.outer(mean, mean)
    constant = constant_neurons(gram, mean)
    covariance[constant] = 0
    covariance[:, constant] = 0
    return covariance


def _on_diagonal(gram: Tensor, added: float) -> Tensor:
    result = gram.clone()  # in place: a few matrices of this size are most of what a run takes
    result.diagonal().add_(added)
    return result
