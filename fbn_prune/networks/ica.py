"""Spatial ICA: independent maps over neurons, found in the activations of one layer or of all layers.

Neurons are the samples and tokens are the mixed sensors, as voxels and volumes are in the ICA of functional MRI; for
functional networks of language models, see arXiv 2502.20408. The maps equal those of scikit-learn's
``FastICA(fun="cube", algorithm="parallel")`` on the same data, but are computed differently:

- Layers are streamed and reduced to the leading subspace of tokens (:mod:`fbn_prune.networks.eigen`).
- The fixed-point iterations (:mod:`fbn_prune.networks.fastica`) run in float32; all k by k matrices are float64.

This module is independent of models. It computes on the device of the tensors that it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fbn_prune.errors import InvalidInput
from fbn_prune.networks.eigen import IcaConvergenceWarning, TokenGram, top_eigenvectors
from fbn_prune.networks.fastica import Unmixing, fastica, seeded_start
from fbn_prune.networks.gram import quick_products

__all__ = [
    "IcaConvergenceWarning",
    "IcaResult",
    "Layers",
    "TokenGram",
    "Unmixing",
    "fastica",
    "matched_correlation",
    "seeded_start",
    "spatial_ica",
    "spatial_overlap",
    "standardise",
    "top_eigenvectors",
]

ITERATION = 0.05
"""How much an iteration of the solvers counts beside a layer's Gram matrix, in reports of progress."""

Layers = Callable[[], Iterable[Tensor]]
"""Called once for each pass; yields the standardised activations Z_l [T, N_l] of each layer in order."""

_ROWS_PER_CHUNK = 8192


@dataclass(frozen=True)
class IcaResult:
    """Independent maps, and how the solver found them.

    Attributes
    ----------
    maps
        [k, sum of N_l] float32; each map has mean 0, standard deviation 1 and skewness >= 0 over neurons. Ordered by
        explained variance, largest first.
    time_courses
        [T, k] float32; Z projected on the maps: the loadings in Z ~ time_courses @ maps.
    explained_variance
        [k] float64 in [0, 1]; share of the total variance of Z that each component explains.
    converged
        Whether both the eigenvectors and FastICA settled.
    """

    maps: Tensor
    time_courses: Tensor
    explained_variance: Tensor
    eigen_iterations: int
    eigen_residual: float
    ica_iterations: int
    ica_change: float
    converged: bool


def standardise(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Z-score every neuron over tokens.

    Parameters
    ----------
    x
        Activations [T, N] of any floating dtype.

    Returns
    -------
    tuple of Tensor
        Z [T, N], mean [N] and population standard deviation [N], float32. A neuron that never changes (dead) has
        standard deviation 0 and a column of zeros in Z.
    """
    x = x.float()
    std, mean = torch.std_mean(x, dim=0, correction=0)
    # Rounding can give a constant column a tiny deviation, which is not a signal.
    dead = std <= (1e-6 * mean.abs()).clamp_min(torch.finfo(torch.float32).tiny)
    std = torch.where(dead, torch.zeros_like(std), std)
    scale = torch.where(dead, torch.zeros_like(std), std.reciprocal())
    return (x - mean).mul_(scale), mean, std


@quick_products()
def spatial_ica(
    layers: Layers,
    k: int,
    *,
    seed: int = 0,
    tol: float = 1e-6,
    max_iter: int = 1000,
    on_step: Callable[[float], None] = lambda units: None,
) -> IcaResult:
    """Find independent maps over the neurons of all given layers; for layer-wise ICA, give one layer.

    Parameters
    ----------
    layers
        Called twice; yields each Z_l [T, N_l] from :func:`standardise`. Only one layer at a time is held. Both passes
        must give the same values.
    k
        Number of maps, 1 <= k <= min(T - 1, neurons).
    seed
        Seed of the ICA start (:func:`seeded_start`) and of the eigenvector search.
    tol, max_iter
        See :func:`fastica`.
    on_step
        Called with the work done since the last call, in units of which a layer has 1; an iteration of the solvers,
        whose number is not known before, counts a little.

    Raises
    ------
    InvalidInput
        k is out of range, values are not finite, or there are fewer than k independent directions.

    Warns
    -----
    IcaConvergenceWarning
        The eigenvectors or the maps have not settled.

    Notes
    -----
    A dead neuron is a sample at the origin: all dead neurons get the same value near zero in a map, never NaN.
    """

    def iterated() -> None:
        on_step(ITERATION)

    gram: TokenGram | None = None
    for z in layers():
        gram = gram or TokenGram(z.shape[0], device=z.device)
        gram.update(z, on_step)
    if gram is None:
        raise InvalidInput("there are no layers in which to find networks")
    tokens, neurons = gram.tokens, gram.neurons
    if not 1 <= k <= min(tokens - 1, neurons):
        raise InvalidInput(
            f"cannot find {k} networks in {tokens} tokens x {neurons} neurons: "
            f"ask for 1 to {min(tokens - 1, neurons)}"
        )
    total_variance = gram.total_variance
    centred = gram.finish()
    del gram
    eigen = top_eigenvectors(centred, k, seed=seed, on_step=iterated)
    del centred
    projected = torch.cat(
        [z.to(eigen.vectors.device, torch.float32).T @ eigen.vectors for z in layers()]
    )
    if projected.shape[0] != neurons:
        raise InvalidInput(
            f"the second pass over the layers gave {projected.shape[0]} neurons, the first {neurons}"
        )
    x_white, scaled = _whiten(projected, eigen.vectors)
    del projected
    unmixing = fastica(
        x_white, w_init=seeded_start(scaled, seed), tol=tol, max_iter=max_iter, on_step=iterated
    )
    maps, time_courses = _maps(x_white, unmixing.W, scaled)
    explained = time_courses.double().square().sum(dim=0) * neurons / total_variance
    order = explained.argsort(descending=True, stable=True)
    return IcaResult(
        maps=maps[order],
        time_courses=time_courses[:, order],
        explained_variance=explained[order],
        eigen_iterations=eigen.iterations,
        eigen_residual=eigen.residual,
        ica_iterations=unmixing.iterations,
        ica_change=unmixing.change,
        converged=eigen.converged and unmixing.converged,
    )


def matched_correlation(maps_a: Tensor, maps_b: Tensor) -> Tensor:
    """Return the abs correlation of each map of A [k, n] with its :func:`match` in B [k, n]; float64 [k]."""
    partner, correlation = match(maps_a, maps_b)
    return correlation.gather(1, partner[:, None])[:, 0]


def spatial_overlap(maps_a: Tensor, maps_b: Tensor, threshold: float = 2.0) -> Tensor:
    """Return shared members / members of either, for each map of A and its partner in B; float64 [k].

    Members have abs(z) >= `threshold`. Two maps without members overlap fully.
    """
    partner, _ = match(maps_a, maps_b)
    members_a, members_b = maps_a.abs() >= threshold, maps_b.abs()[partner] >= threshold
    shared = (members_a & members_b).sum(dim=1).double()
    either = (members_a | members_b).sum(dim=1).double()
    return torch.where(either > 0, shared / either.clamp_min(1), torch.ones_like(either))


def match(maps_a: Tensor, maps_b: Tensor) -> tuple[Tensor, Tensor]:
    """Match the maps of A and B one to one so that the sum of abs correlations is largest.

    Returns the partner in B of each map of A, int64 [k], and the abs correlations of all pairs, float64 [k, k].
    """
    if maps_a.shape != maps_b.shape or maps_a.ndim != 2:
        raise InvalidInput(
            f"maps of shapes {tuple(maps_a.shape)} and {tuple(maps_b.shape)} cannot be matched"
        )
    unit_a, unit_b = (
        torch.nn.functional.normalize(m.double() - m.double().mean(dim=1, keepdim=True), dim=1)
        for m in (maps_a, maps_b)
    )
    correlation = (unit_a @ unit_b.T).abs()
    _, partner = linear_sum_assignment(correlation.cpu().numpy(), maximize=True)
    return torch.as_tensor(partner, device=correlation.device), correlation


def _whiten(projected: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Centre U [n, k] over neurons and whiten it by its own float64 covariance.

    Returns the whitened data [n, k] float32, and C [T, k] float64: the token basis with the same rotation and
    scaling, so that Z ~ C @ whitened.T and mixing matrices are C @ W.T.
    """
    samples, k = projected.shape
    mean = projected.mean(dim=0, dtype=torch.float64)
    covariance = torch.zeros(k, k, dtype=torch.float64, device=projected.device)
    for chunk in torch.split(projected, _ROWS_PER_CHUNK):
        centred = chunk.double() - mean
        covariance.addmm_(centred.T, centred)
    variances, rotation = torch.linalg.eigh(covariance / samples)
    variances, rotation = variances.flip(0), rotation.flip(1)
    # Variances this small beside the first are rounding errors.
    rank = int((variances > 1e-9 * variances[0]).sum())
    if rank < k:
        raise InvalidInput(
            f"cannot find {k} networks: the activations have only {rank} independent directions; "
            "ask for fewer, or give more text"
        )
    scale = rotation * variances.rsqrt()
    x_white = torch.empty_like(projected)
    for chunk, out in zip(
        torch.split(projected, _ROWS_PER_CHUNK), torch.split(x_white, _ROWS_PER_CHUNK), strict=True
    ):
        out.copy_((chunk.double() - mean) @ scale)
    return x_white, (vectors.double() @ rotation) * variances.sqrt()


def _maps(x_white: Tensor, w: Tensor, scaled: Tensor) -> tuple[Tensor, Tensor]:
    """Maps [k, n], z-scored and with positive skewness, and their loadings [T, k]."""
    maps = (x_white @ w.T.to(x_white.dtype)).T.contiguous()
    loadings = scaled @ w.T
    for row, column in zip(maps, loadings.T, strict=True):
        exact = row.double()
        exact -= exact.mean()
        deviation = exact.square().mean().sqrt()
        exact /= deviation
        sign = 1.0 if float(exact.pow(3).mean()) >= 0 else -1.0
        row.copy_(exact * sign)
        column *= deviation * sign
    return maps, loadings.float()
