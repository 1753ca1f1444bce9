"""Measure how a model's loss changes when neurons are masked, retained alone or amplified.

This is the causal test of what networks do, after arXiv 2502.20408: measure each network by itself, then growing
unions of the strongest networks, and compare both with random sets that have as many neurons in each layer. A second
control takes sets of the same size from the principal components of the same space; it shows whether statistical
independence matters. Losses are reported for each text and each task separately, so that they show what a network is
for. Hooks change the activations; the weights are neither copied nor changed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fbn_prune.data.calibration import Batch
from fbn_prune.errors import InvalidInput
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.perplexity import exp_or_infinite, summed_loss
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.networks.interventions import amplified, masked, retained
from fbn_prune.progress import Advance

ActionName = Literal["mask", "retain", "amplify"]
Intervene = Callable[[Sequence[Tensor]], AbstractContextManager[None]]
"""Takes one mask of neurons per layer and returns a context in which the model runs with these neurons changed."""

TaskFigures = dict[str, dict[str, float]]
"""Task -> metric -> value."""

TaskMeasure = Callable[[PreTrainedModel], TaskFigures]
"""Measures the model, in its present state, on tasks, in addition to the perplexity on texts."""

USUAL_PASSES = 200
"""Forward passes after which tasks that have not run before are shown as about two thirds done."""


def parts(texts: Mapping[str, Sequence[Batch]], tasks: TaskMeasure | None = None) -> int:
    """Return the parts of a bar that one measurement takes: the texts' tokens, and as many again for tasks."""
    tokens = sum(batch.tokens for batches in texts.values() for batch in batches)
    return tokens if tasks is None else 2 * tokens


@dataclass(frozen=True)
class Quality:
    """Loss on texts, name -> (nats summed over predicted tokens, number of these tokens), and figures on tasks."""

    texts: dict[str, tuple[float, int]]
    tasks: TaskFigures = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """Mean loss over the tokens of all texts together, in nats a token."""
        return sum(loss for loss, _ in self.texts.values()) / sum(n for _, n in self.texts.values())

    @property
    def perplexity(self) -> float:
        return exp_or_infinite(self.loss)

    @property
    def losses(self) -> dict[str, float]:
        """Mean loss on each text, in nats a token."""
        return {name: loss / count for name, (loss, count) in self.texts.items()}

    def rises(self, dense: Quality) -> dict[str, float]:
        """Return how much the loss on each text exceeds the unchanged model's, in nats a token."""
        before = dense.losses
        return {name: loss - before[name] for name, loss in self.losses.items()}


@dataclass(frozen=True)
class Ablated:
    """A number of changed neurons, and the model's quality with them changed."""

    neurons: int
    quality: Quality

    def to_json(self, dense: Quality) -> dict[str, Any]:
        return {
            "neurons": self.neurons,
            "perplexity": self.quality.perplexity,
            "rise": self.quality.loss - dense.loss,
            "rise_by_text": self.quality.rises(dense),
            "tasks": self.quality.tasks,
        }


@dataclass(frozen=True)
class Band:
    """The model's quality with each of several random sets changed, all with equal numbers of neurons in each layer."""

    neurons: int
    qualities: tuple[Quality, ...]

    @property
    def mean(self) -> float:
        """Mean perplexity over the random sets."""
        return statistics.fmean(q.perplexity for q in self.qualities)

    @property
    def std(self) -> float:
        """Standard deviation of the perplexity over the random sets; 0 for a single set."""
        return _spread([q.perplexity for q in self.qualities])["std"]

    @property
    def tasks(self) -> dict[str, dict[str, dict[str, float]]]:
        """Task -> metric -> mean and standard deviation over the random sets."""
        drawn = [q.tasks for q in self.qualities]
        return {
            task: {metric: _spread([one[task][metric] for one in drawn]) for metric in metrics}
            for task, metrics in drawn[0].items()
        }

    def to_json(self, dense: Quality) -> dict[str, Any]:
        rises = [q.rises(dense) for q in self.qualities]
        return {
            "neurons": self.neurons,
            "mean": self.mean,
            "std": self.std,
            "n": len(self.qualities),
            "rise_by_text": {name: statistics.fmean(r[name] for r in rises) for name in rises[0]},
            "tasks": self.tasks,
        }


@dataclass(frozen=True)
class Step:
    """One point of a growing curve: the union of the first `networks` networks, and its controls of equal size.

    `components` changes the neurons with the largest weights in as many principal components; None without this
    control.
    """

    networks: int
    ablated: Ablated
    band: Band
    components: Ablated | None


class Ablation:
    """Measures one model on some texts, unchanged and with neurons changed.

    Parameters
    ----------
    texts
        Name -> batches. The perplexity is over the tokens of all texts together.
    advance
        Called during a measurement with what was finished since the last call; see :func:`parts`.
    tasks
        Measures the model on tasks too, each time; None for texts only.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        texts: Mapping[str, Sequence[Batch]],
        advance: Advance = lambda count: None,
        tasks: TaskMeasure | None = None,
    ) -> None:
        self._adapter, self._texts = adapter, texts
        self._advance, self._tasks = advance, tasks
        self._task_parts = parts(texts)
        self._passes: int | None = None

    def action(self, name: ActionName, factor: float = 1.0) -> Intervene:
        """Return the intervention of that name on this model; only `amplify` uses `factor`."""
        adapter = self._adapter
        if name == "amplify":
            return lambda masks: amplified(adapter, masks, factor)
        if name == "retain":
            return lambda masks: retained(adapter, masks)
        return lambda masks: masked(adapter, masks)

    def dense(self) -> Quality:
        """Measure the unchanged model."""
        texts = {
            name: summed_loss(self._adapter, batches, self._advance)
            for name, batches in self._texts.items()
        }
        return Quality(texts, {} if self._tasks is None else self._on_tasks(self._tasks))

    def _on_tasks(self, measure: TaskMeasure) -> TaskFigures:
        """Measure the model on the tasks; the bar moves with each of its forward passes.

        How many these are is known when the tasks have run once. Until then they move the bar by ever smaller steps.
        """
        passes, shown = 0, 0

        def show(share: float) -> None:
            nonlocal shown
            if (done := int(self._task_parts * share)) > shown:
                self._advance(done - shown)
                shown = done

        def count(*about: object) -> None:
            nonlocal passes
            passes += 1
            known = self._passes
            show(1 - math.exp(-passes / USUAL_PASSES) if known is None else min(1, passes / known))

        handle = self._adapter.model.register_forward_hook(count)
        try:
            figures = measure(self._adapter.model)
        finally:
            handle.remove()
        self._passes = passes
        show(1)
        return figures

    def measure(self, intervene: Intervene, masks: Sequence[Tensor]) -> Ablated:
        """Measure the model with the neurons of `masks` (bool [neurons] for each layer) changed."""
        with intervene(masks):
            return Ablated(sum(int(mask.sum()) for mask in masks), self.dense())

    def random(
        self, intervene: Intervene, like: Sequence[Tensor], *, draws: int, seed: int
    ) -> Band:
        """Measure the model with `draws` random sets changed, each with as many neurons in each layer as `like`."""
        generator = torch.Generator().manual_seed(seed)
        done = [self.measure(intervene, random_like(like, generator)) for _ in range(draws)]
        return Band(done[0].neurons, tuple(one.quality for one in done))

    def growing(
        self,
        intervene: Intervene,
        networks: FunctionalNetworks,
        order: Sequence[int],
        sizes: Sequence[int],
        *,
        z: float,
        draws: int,
        seed: int,
        components: Tensor | None = None,
    ) -> list[Step]:
        """Measure the union of the first n networks of `order`, and its controls, for each n in `sizes`.

        Parameters
        ----------
        z
            A neuron belongs to a network where its abs z-score is at least this.
        components
            Maps [components, N] of the second control, or None. The control takes as many neurons as the union has:
            those with the largest abs weight in any of the first n maps.
        """
        steps = []
        for size in sizes:
            union = networks.by_layer(networks.union(order[:size], z))
            ablated = self.measure(intervene, union)
            band = self.random(intervene, union, draws=draws, seed=seed)
            control = None
            if components is not None:
                chosen = largest(components[:size].abs().amax(0), ablated.neurons)
                control = self.measure(intervene, networks.by_layer(chosen))
            steps.append(Step(size, ablated, band, control))
        return steps


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and standard deviation; the latter is 0 for a single value, or where a value is not finite."""
    varied = len(values) > 1 and all(map(math.isfinite, values))
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if varied else 0.0,
    }


def random_like(masks: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Draw masks at random, each with as many neurons in its layer as the mask in `masks`."""
    drawn = []
    for mask in masks:
        chosen = torch.zeros(len(mask), dtype=torch.bool)
        chosen[torch.randperm(len(mask), generator=generator)[: int(mask.sum())]] = True
        drawn.append(chosen)
    return drawn


def largest(weights: Tensor, count: int) -> Tensor:
    """Return a mask, bool [N], of the `count` neurons with the largest abs weight in a map [N]."""
    chosen = torch.zeros(len(weights), dtype=torch.bool)
    chosen[torch.argsort(weights.abs(), descending=True, stable=True)[:count]] = True
    return chosen


def check_sizes(sizes: Sequence[int], networks: int) -> None:
    """Check that each size of a growing set is a possible number of networks.

    Raises
    ------
    InvalidInput
        A size is below 1 or above `networks`.
    """
    for size in sizes:
        if not 1 <= size <= networks:
            raise InvalidInput(
                f"cannot grow to {size} networks: give a number from 1 to {networks}"
            )
