"""Other bases of the space that networks span, to show what their independence over neurons adds.

A basis is a matrix B [k, k] that takes the networks' time courses A [tokens, k] to those of the basis, A @ B. All bases
describe the same activity, so whatever differs between them is due to the choice of basis. This module is independent
of models.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fbn_prune.networks.fastica import fastica

DRAWS = 5
"""Random rotations, and random sets of neurons, of a control."""

NETWORKS, COMPONENTS, ROTATIONS = "networks", "principal components", "random rotations"
TEMPORAL = "temporal ICA"


def random_rotation(k: int, seed: int) -> Tensor:
    """Return a rotation drawn uniformly (Haar), float64 [k, k]."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(k, k, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def principal_basis(courses: Tensor) -> Tensor:
    """Return the eigenvectors of AᵀA for time courses A [tokens, k], float64 [k, k], largest variance first."""
    a = courses.double()
    return torch.linalg.eigh(a.T @ a).eigenvectors.flip(1)


def temporal_basis(courses: Tensor, *, seed: int = 0) -> Tensor:
    """Return the basis whose time courses are independent over tokens: the usual ICA of activations, float64 [k, k].

    Parameters
    ----------
    courses
        Time courses A [tokens, k] of full rank.
    seed
        Seed of the start of FastICA (:func:`fbn_prune.networks.fastica.fastica`).

    Warns
    -----
    IcaConvergenceWarning
        The rotation has not settled.
    """
    centred = courses.double() - courses.double().mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    whiten = vectors * values.clamp_min(values[-1] * 1e-9).rsqrt()
    return whiten @ fastica((centred @ whiten).float(), seed=seed).W.T


def control_bases(courses: Tensor, *, seed: int = 0) -> dict[str, list[Tensor]]:
    """Return the networks' own basis and those of the controls, float64 [k, k] each.

    Parameters
    ----------
    courses
        Time courses A [tokens, k] on calibration text.
    seed
        Seed of the first of :data:`DRAWS` rotations, and of the temporal ICA.

    Returns
    -------
    dict of str to list of Tensor
        One basis for each name, and :data:`DRAWS` for the random rotations.
    """
    k = courses.shape[1]
    return {
        NETWORKS: [torch.eye(k, dtype=torch.float64)],
        COMPONENTS: [principal_basis(courses)],
        ROTATIONS: [random_rotation(k, seed + draw) for draw in range(DRAWS)],
        TEMPORAL: [temporal_basis(courses, seed=seed)],
    }


def basis_maps(maps: Tensor, basis: Tensor) -> Tensor:
    """Return the maps over neurons of a basis of time courses: Z ~ A @ maps = (A @ B) @ (B^-1 @ maps).

    Parameters
    ----------
    maps
        The networks' maps [k, N].
    basis
        B [k, k].

    Returns
    -------
    Tensor
        float32 [k, N]; each map has mean square 1, as a z-scored map has.
    """
    turned = torch.linalg.solve(basis.double(), maps.double())
    scale = turned.square().mean(1, keepdim=True).sqrt()
    return (turned / scale.clamp_min(torch.finfo(torch.float64).tiny)).float()


def set_means(values: Tensor, sizes: Sequence[int], seed: int) -> Tensor:
    """Return the mean of `values` [..., N] over random sets of neurons, one for each size, [..., sets].

    Each neuron of a set counts with a random sign, as the neurons of a map have both signs.
    """
    generator = torch.Generator().manual_seed(seed)
    means = []
    for size in sizes:
        chosen = torch.randperm(values.shape[-1], generator=generator)[:size]
        signs = torch.randint(0, 2, (size,), generator=generator) * 2 - 1
        means.append((values[..., chosen] * signs).mean(-1))
    return torch.stack(means, -1)
