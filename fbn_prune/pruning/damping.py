"""Damp Gram matrices before inversion, so that the inverse is meaningful for every input.

A ridge is a share of the neurons' mean energy (the diagonal of H). Four problems of real models need more than that:

- A few neurons with massive activations (Sun et al., arXiv 2402.17762) can hold nearly all the energy. A ridge in
  proportion to it would swamp the other neurons, so the mean leaves these outliers out.
- With fewer tokens than neurons, H is singular and a refit overfits the sample. The share for the refit grows as the
  number of tokens falls.
- Float32 sums leave rounding errors in proportion to each neuron's energy. If these make H indefinite, a share of
  each neuron's own energy is added to its diagonal, just large enough to factor H.
- Where an output bias absorbs the mean, a constant neuron has only rounding errors as variance. It counts as dead.

A :class:`DampingWarning` reports each change. Pure numerics, float64.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from fbn_prune.errors import FbnPruneError

OUTLIER_ENERGY = 1e4
"""An outlier neuron has more than this many times the median energy of its layer. Models of 0.3 to 7 M parameters
reach 7500."""

OUTLIER_SHARE = 0.01
"""If more than this share of the neurons (and more than one) have so much energy, they are typical and not outliers."""

TOKENS_PER_NEURON = 16
"""From this many tokens per neuron on, the refit uses the requested damping (`eval/quality/few_tokens.py`)."""

LARGEST_SHARE = 1.0
"""Few tokens raise the refit's damping at most to the mean energy itself."""

RESOLVED_VARIANCE = 8 * torch.finfo(torch.float32).eps
"""The smallest variance, as a share of the mean square, that float32 sums can distinguish from zero."""

OWN_ENERGY = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Shares of each neuron's own energy to add, tried in turn until H can be factored."""


class DampingWarning(UserWarning):
    """The damping of a Gram matrix differs from the requested one."""


def outliers(gram: Tensor) -> Tensor:
    """Return a mask, bool [neurons], of the neurons with massive activations; empty if they are not few."""
    return _outliers(gram.diagonal())


def _outliers(energy: Tensor) -> Tensor:
    live = energy[energy > 0]
    if len(live) == 0:
        return torch.zeros_like(energy, dtype=torch.bool)
    far = energy > OUTLIER_ENERGY * live.median()
    few = int(far.sum()) <= max(1.0, OUTLIER_SHARE * len(energy))
    return far if few else torch.zeros_like(far)


def ridge(gram: Tensor, share: float) -> float:
    """Return `share` times the mean energy of the neurons that are not outliers; 1 if none of these is active."""
    return ridge_of(gram.diagonal(), share)


def ridge_of(energy: Tensor, share: float) -> float:
    """Return the same for the neurons' energies, the diagonal of H."""
    scale = float(energy[~_outliers(energy)].mean())
    return share * scale if scale > 0 else 1.0


def warn_of_outliers(gram: Tensor) -> None:
    """Warn if :func:`ridge` leaves some neurons out."""
    far = outliers(gram)
    if not bool(far.any()):
        return
    energy = gram.diagonal()
    times = float(energy.mean() / energy[~far].mean())
    warnings.warn(
        f"{int(far.sum())} neurons with massive activations raise the mean energy to {times:.3g} times that of "
        "the others: the damping is in proportion to the others' mean",
        DampingWarning,
        stacklevel=2,
    )


def factored(gram: Tensor, added: float) -> Tensor:
    """Return the Cholesky factor of H + `added` I, with more added (and a :class:`DampingWarning`) if that fails.

    Raises
    ------
    FbnPruneError
        H contains NaN or Inf, or is so far from positive semidefinite that no damping helps.
    """
    # A sum is finite only if all its terms are; to look at each term takes longer than a small layer's factor.
    if not bool(torch.isfinite(gram.sum())):
        raise FbnPruneError(
            "the statistics of the activations overflow: compute in --dtype float32"
        )
    base = _on_diagonal(gram, added)
    factor, failed = torch.linalg.cholesky_ex(base)
    if not int(failed):
        return factor
    energy = gram.diagonal().clamp(min=0)
    for share in OWN_ENERGY:
        factor, failed = torch.linalg.cholesky_ex(base + torch.diag(share * energy))
        if not int(failed):
            warnings.warn(
                f"H is not positive definite at this damping: each neuron gets {share:g} of its own energy as "
                "additional damping",
                DampingWarning,
                stacklevel=2,
            )
            return factor
    raise FbnPruneError(
        "H cannot be inverted at any damping: the activations' statistics are damaged; raise --damping and "
        "--refit-damping, or compute in --dtype float32"
    )


def refit_share(share: float, tokens: float, neurons: int) -> float:
    """Return the refit's damping: `share` from :data:`TOKENS_PER_NEURON` tokens per neuron on, more for fewer tokens.

    Below that number, it grows with the inverse square of the tokens, and a :class:`DampingWarning` is issued.
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
            f"{tokens / neurons:.1f} tokens per neuron are few: the refit's damping is {adapted:.2g} instead of "
            f"{share:g}; raise --tokens",
            DampingWarning,
            stacklevel=2,
        )
    return adapted


def constant_neurons(gram: Tensor, mean: Tensor) -> Tensor:
    """Return a mask, bool [neurons], of neurons whose variance float32 sums cannot distinguish from zero."""
    energy = gram.diagonal()
    return energy - mean.square() <= RESOLVED_VARIANCE * energy


def centred(gram: Tensor, mean: Tensor) -> Tensor:
    """Return the covariance for H and the mean: the signal that remains where an output bias absorbs the mean.

    Rows and columns of :func:`constant_neurons` are zero.
    """
    covariance = gram - torch.outer(mean, mean)
    constant = constant_neurons(gram, mean)
    covariance[constant] = 0
    covariance[:, constant] = 0
    return covariance


def _on_diagonal(gram: Tensor, added: float) -> Tensor:
    result = gram.clone()  # then in place: a few matrices of this size take most of a run's memory
    result.diagonal().add_(added)
    return result
