"""Ways to choose the neurons of a skill, and the weights that remain without them; `forget_table.py` compares them.

Every way gives each neuron a score from what it, or the networks, do on the skill's text and on the rest's:

networks, and other bases     sum over networks of log(engagement on the skill / on the rest) * z²
..., by gradient              the same with abs gradient times activation of the network instead of its engagement
... x ratio                   the score times the log of the neuron's ratio below
neurons, ratio                mean abs activation on the skill / on the rest (selective pruning, arXiv 2403.01267)
neurons, gradient             the same with abs gradient times activation
neurons, ratio after refit    mean square on the skill / what the other neurons cannot make up for on the rest
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fbn_prune.data.calibration import Batch
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.surgery import MlpCut
from fbn_prune.networks.activity import time_courses
from fbn_prune.networks.controls import (
    COMPONENTS,
    NETWORKS,
    ROTATIONS,
    TEMPORAL,
    basis_maps,
    control_bases,
)
from fbn_prune.networks.forgetting import activity_ratio, key_neurons, selectivity
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.progress import StageClock
from fbn_prune.pruning.damping import refit_share, ridge

RATIO, GRADIENT, RANDOM = "neurons, ratio", "neurons, gradient", "random"
REFITTED_RATIO = "neurons, ratio after refit"
REFIT_DAMPING, ERASE_DAMPING = 1e-3, 1e-2
"""Least damping without and with erasing; it rises where tokens are few (`fbn_prune.pruning.damping.refit_share`).
Erasing moves the weights far from where they were, and with less it cost other text more (SmolLM2-135M)."""

Scores = dict[str, list[Tensor]]
"""Way to choose neurons -> a score of each neuron, [N], the highest first; several for random ones."""


class Seen:
    """What one text does: time courses and gradients of networks, and activity, gradients and E[xᵀx] of neurons."""

    def __init__(
        self, adapter: ModelAdapter, networks: FunctionalNetworks, batches: Sequence[Batch]
    ) -> None:
        activity = torch.zeros(sum(networks.widths))
        self.grams = [torch.zeros(width, width) for width in networks.widths]

        def watch(layer: int, index: int, z: Tensor) -> None:
            span = networks.layer_slice(layer)
            x = z * networks.std[span] + networks.mean[span]
            activity[span] += x.abs().sum(0)
            self.grams[layer].addmm_(x.T, x)

        self.courses = torch.cat(time_courses(adapter, networks, batches, StageClock(), watch))
        self.tokens = len(self.courses)
        self.activity = activity / self.tokens
        for gram in self.grams:
            gram /= self.tokens
        self._add_gradients(adapter, networks, batches)

    def _add_gradients(
        self, adapter: ModelAdapter, networks: FunctionalNetworks, batches: Sequence[Batch]
    ) -> None:
        """Of every neuron the mean abs gradient times activation, and of every network the gradient at each token."""
        model = adapter.model
        wanted = [parameter.requires_grad for parameter in model.parameters()]
        model.requires_grad_(False)
        embed = model.get_input_embeddings()
        start = embed.register_forward_hook(lambda module, args, out: out.requires_grad_())
        self.gradient = torch.zeros(sum(networks.widths))
        rows: list[Tensor] = []
        for batch in batches:
            kept: list[Tensor] = []

            def keep(module: Any, args: tuple[Tensor], kept: list[Tensor] = kept) -> None:
                args[0].retain_grad()
                kept.append(args[0])

            handles = [
                adapter.output_module(layer).register_forward_pre_hook(keep)
                for layer in range(adapter.num_layers)
            ]
            targets = batch.input_ids.masked_fill(~batch.valid, -100)
            model(input_ids=batch.input_ids, labels=targets).loss.backward()
            for handle in handles:
                handle.remove()
            of_networks = torch.zeros(batch.tokens, len(networks.maps))
            for layer, x in enumerate(kept):
                span = networks.layer_slice(layer)
                assert x.grad is not None
                slope = x.grad[batch.valid].float() * batch.tokens  # the loss is a mean over tokens
                self.gradient[span] += (x.detach()[batch.valid].float() * slope).abs().sum(0)
                of_networks += slope @ (networks.maps[:, span] * networks.std[span]).T
            rows.append(of_networks)
        start.remove()
        for parameter, was in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(was)
        self.gradient /= self.tokens
        self.slopes = torch.cat(rows).double()


def ways(
    networks: FunctionalNetworks, skill: Seen, rest: Seen, keep_costs: Tensor, draws: int
) -> Scores:
    """Return every way to choose neurons for a skill.

    Parameters
    ----------
    keep_costs
        Diagonal of the inverse of the rest's damped E[xᵀx] of every layer, [N].
    draws
        Random rotations and random orders.
    """
    bases = control_bases(torch.cat([skill.courses, rest.courses]))
    bases[ROTATIONS] = bases[ROTATIONS][:draws]
    ratio = activity_ratio(skill.activity, rest.activity)
    found: Scores = {}
    by_gradient: Scores = {}
    for name, drawn in bases.items():
        for basis in drawn:
            maps = basis_maps(networks.maps, basis)
            of_skill, of_rest = skill.courses @ basis, rest.courses @ basis
            engaged = selectivity(of_skill.square().mean(0), of_rest.square().mean(0))
            found.setdefault(name, []).append(key_neurons(maps, engaged))
            back = torch.linalg.inv(basis).T
            effects = [
                (one.slopes @ back * of).abs().mean(0)
                for one, of in ((skill, of_skill), (rest, of_rest))
            ]
            by_gradient.setdefault(f"{name}, gradient", []).append(
                key_neurons(maps, selectivity(*effects))
            )
    for name in (NETWORKS, COMPONENTS, TEMPORAL, ROTATIONS):
        found[f"{name} x ratio"] = [one * ratio.clamp_min(1).log() for one in found[name]]
    for name in (NETWORKS, COMPONENTS):
        found[f"{name}, gradient"] = by_gradient[f"{name}, gradient"]
    power = torch.cat([gram.diagonal() for gram in skill.grams])
    second = power.double() * keep_costs
    found[RATIO] = [ratio]
    found[GRADIENT] = [activity_ratio(skill.gradient, rest.gradient)]
    found[REFITTED_RATIO] = [second]
    for name in (NETWORKS, COMPONENTS):
        found[f"{name} x ratio after refit"] = [found[name][0] * second.clamp_min(1).log()]
    generator = torch.Generator().manual_seed(0)
    found[RANDOM] = [torch.rand(len(ratio), generator=generator) for _ in range(draws)]
    return found


class Refit:
    """Output weights without some neurons, that do on the rest what they did, and on the skill as little as is asked.

    For weights W - D they minimise E_rest||D x||² + erase * E_skill||(W - D) x||² + ridge ||D||², where D is W on the
    neurons that go. With B = H_rest + erase * H_skill + ridge, all sets of neurons need one inverse of B. The H are
    E[xᵀx] of every layer.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        rest: Sequence[Tensor],
        tokens: int,
        skill: Sequence[Tensor] = (),
        erase: float = 0.0,
    ) -> None:
        self.weights: list[Tensor] = []
        self._inverse: list[Tensor] = []
        self._change: list[Tensor] = []
        for layer, weight in enumerate(adapter.down_weights()):
            w = weight.float()
            gram = rest[layer].clone()
            share = refit_share(REFIT_DAMPING, tokens, len(gram))
            if erase:
                share = max(share, ERASE_DAMPING)
            # A strong ridge leaves float32 digits enough.
            gram = gram if share >= ERASE_DAMPING else gram.double()
            added = ridge(gram, share)
            if erase:
                gram.add_(skill[layer], alpha=erase)
            gram.diagonal().add_(added)
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
            change = torch.zeros_like(w)
            if erase:
                change = erase * (w @ skill[layer]) @ inverse
            self.weights.append(w)
            self._inverse.append(inverse.float())
            self._change.append(change)

    @property
    def keep_costs(self) -> Tensor:
        """Diagonals of all layers' inverses, float64 [N]."""
        return torch.cat([one.diagonal() for one in self._inverse]).double()

    def cuts(self, gone: Sequence[Tensor]) -> list[MlpCut]:
        """Return the cuts without the neurons marked in `gone`, bool [neurons] for each layer."""
        cuts = []
        for w, inverse, change, out in zip(
            self.weights, self._inverse, self._change, gone, strict=True
        ):
            places = torch.nonzero(out)[:, 0]
            new = w - change
            if len(places) == len(out):  # a layer keeps one neuron, with an output of 0
                cuts.append(MlpCut(torch.zeros(1, dtype=torch.int64), 0 * w[:, :1]))
                continue
            if len(places):
                block = inverse[places]
                new = new - torch.linalg.solve(block[:, places], new[:, places], left=False) @ block
            kept = torch.nonzero(~out)[:, 0]
            cuts.append(MlpCut(kept, new[:, kept]))
        return cuts
