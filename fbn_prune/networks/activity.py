"""Time courses of known networks on new text, and the principal components of the same activity.

The mean and standard deviation stored with the networks standardise the new activations to Z. The time courses A are
Z times the pseudo-inverse of the maps (arXiv 2502.20408). The model runs layer by layer, so only one layer's
activations are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fbn_prune.data.calibration import Batch, TokenBlocks
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.layerwise import LayerwiseForward
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.progress import StageClock


def time_courses(
    adapter: ModelAdapter,
    networks: FunctionalNetworks,
    batches: Sequence[Batch],
    clock: StageClock,
    watch: Callable[[int, int, Tensor], None] | None = None,
) -> list[Tensor]:
    """Return the time courses A on every batch, float64 [valid tokens, networks], on the CPU.

    Parameters
    ----------
    watch
        Called with each layer, the index of each batch, and its standardised activations, float32 [valid tokens,
        neurons of the layer], 0 for a neuron that was dead when the networks were found.
    """
    layers = len(networks.widths)
    courses = [torch.zeros(b.tokens, len(networks.maps), dtype=torch.float64) for b in batches]
    stream = LayerwiseForward(adapter, batches)
    total = sum(batch.tokens for batch in batches) * layers
    with clock.stage("time courses", total, "tokens x layers") as advance:
        for layer in range(layers):
            span, device = networks.layer_slice(layer), adapter.layer_device(layer)
            std = networks.std[span]
            # A neuron that was dead when the networks were found has no scale and does not count.
            scale = torch.where(std > 0, std.reciprocal(), torch.zeros_like(std))
            weights = (networks.maps[:, span] * scale).T.to(device)
            mean, scale = networks.mean[span].to(device), scale.to(device)

            def add(
                index: int,
                x: Tensor,
                layer: int = layer,
                mean: Tensor = mean,
                scale: Tensor = scale,
                weights: Tensor = weights,
            ) -> None:
                centred = x.float() - mean
                courses[index] += (centred @ weights).cpu()
                if watch is not None:
                    watch(layer, index, centred * scale)

            stream.advance(add, on_batch=advance)
    adapter.release()
    maps = networks.maps.double()
    inverse = torch.linalg.pinv(maps @ maps.T, hermitian=True)
    return [course @ inverse for course in courses]


def block_activity(
    adapter: ModelAdapter,
    networks: FunctionalNetworks,
    blocks: TokenBlocks,
    *,
    batch_tokens: int,
    clock: StageClock,
) -> Tensor:
    """Return the mean time course of every block, float64 [blocks, networks], in the order of the blocks."""
    batches = blocks.batches(batch_tokens)
    courses = time_courses(adapter, networks, batches, clock)
    parts = [
        torch.stack([part.mean(0) for part in torch.split(course, batch.valid.sum(1).tolist())])
        for course, batch in zip(courses, batches, strict=True)
    ]
    means = torch.cat(parts)
    return means[torch.argsort(torch.tensor(blocks.batch_order()))]


def second_moment(courses: Sequence[Tensor]) -> Tensor:
    """Return E[AᵀA] over all tokens of the time courses A [tokens, networks], float64 [networks, networks]."""
    total = sum((course.T @ course for course in courses), start=courses[0].new_zeros(()))
    return total / sum(len(course) for course in courses)


def principal_maps(networks: FunctionalNetworks, moment: Tensor) -> Tensor:
    """Return the principal components of the activity that the networks carry: another basis of the same space.

    They serve as a control: the difference between networks and components shows what independence adds.

    Parameters
    ----------
    moment
        E[AᵀA], [networks, networks], from :func:`second_moment`.

    Returns
    -------
    Tensor
        float32 [networks, N]; each map has mean square 1 over neurons; ordered by variance, largest first.

    Notes
    -----
    With Z ~ A maps, and maps that are uncorrelated and of equal norm, ZᵀZ ~ mapsᵀ (AᵀA) maps. The eigenvectors of AᵀA
    therefore rotate the networks into the principal components.
    """
    maps = networks.maps.double()
    root_values, root_vectors = torch.linalg.eigh(maps @ maps.T)
    half = (root_vectors * root_values.clamp_min(0).sqrt()) @ root_vectors.T
    inverse_half = (
        root_vectors * root_values.clamp_min(root_values[-1] * 1e-12).rsqrt()
    ) @ root_vectors.T
    _, vectors = torch.linalg.eigh(half @ moment @ half)
    components = vectors.flip(1).T @ inverse_half @ maps
    return (components * components.shape[1] ** 0.5).float()


def principal_networks(networks: FunctionalNetworks, moment: Tensor) -> FunctionalNetworks:
    """Return the components of :func:`principal_maps` as networks, with their engagement.

    Functions that rank or mask networks can then treat this control in the same way as the networks.
    """
    maps = principal_maps(networks, moment)
    turn = networks.maps.double() @ maps.double().T / maps.shape[1]
    engagement = torch.diagonal(turn.T @ moment @ turn)
    return replace(networks, maps=maps, engagement=engagement.contiguous(), energy=None)
