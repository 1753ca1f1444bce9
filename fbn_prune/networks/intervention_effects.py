"""What a model loses when its networks' neurons are masked, retained alone, or amplified: the causal test.

After arXiv 2502.20408: each network by itself, growing sets of the strongest, and beside them random sets with as many
neurons in each layer, drawn many times. The control that says whether independence matters takes sets of the same size
from the principal components of the same space. Every measurement is kept apart by text and by task, so that it shows
what a network is for. The model is never copied or changed.
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
"""From masks by layer to a context in which the model runs changed."""

TaskFigures = dict[str, dict[str, float]]
"""Task -> metric -> value."""

TaskMeasure = Callable[[PreTrainedModel], TaskFigures]
"""What measures a model, as it is at the call, on questions beside the texts."""


@dataclass(frozen=True)
class Quality:
    """Loss of a model on several texts, name -> (nats summed over predicted tokens, their number); figures on tasks."""

    texts: dict[str, tuple[float, int]]
    tasks: TaskFigures = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """Mean loss over all texts' tokens together, in nats."""
        return sum(loss for loss, _ in self.texts.values()) / sum(n for _, n in self.texts.values())

    @property
    def perplexity(self) -> float:
        return exp_or_infinite(self.loss)

    @property
    def losses(self) -> dict[str, float]:
        """Mean loss of each text, in nats."""
        return {name: loss / count for name, (loss, count) in self.texts.items()}

    def rises(self, dense: Quality) -> dict[str, float]:
        """How far each text's loss is above the unchanged model's, in nats."""
        before = dense.losses
        return {name: loss - before[name] for name, loss in self.losses.items()}


@dataclass(frozen=True)
class Ablated:
    """A set of neurons and the model's quality with it ablated."""

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
    """Random sets with as many neurons in each layer as some other set has."""

    neurons: int
    qualities: tuple[Quality, ...]

    @property
    def mean(self) -> float:
        """Mean perplexity."""
        return statistics.fmean(q.perplexity for q in self.qualities)

    @property
    def std(self) -> float:
        """Standard deviation of the perplexity over the draws; 0 for one draw."""
        return _spread([q.perplexity for q in self.qualities])["std"]

    @property
    def tasks(self) -> dict[str, dict[str, dict[str, float]]]:
        """Task -> metric -> mean and standard deviation over the draws."""
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
    """One point of a growing curve: the first `networks` of the order, and its controls of equal size.

    `components` are as many principal components' neurons with the largest weights; None where they were not asked for.
    """

    networks: int
    ablated: Ablated
    band: Band
    components: Ablated | None


class Ablation:
    """One model measured on some texts, as it is and with neurons changed.

    Parameters
    ----------
    texts
        Name -> batches; perplexity is over the tokens of all together.
    on_measured
        Called with 1 after each measurement.
    tasks
        Measures the model on tasks each time as well; None for texts alone.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        texts: Mapping[str, Sequence[Batch]],
        on_measured: Advance = lambda count: None,
        tasks: TaskMeasure | None = None,
    ) -> None:
        self._adapter, self._texts = adapter, texts
        self._on_measured, self._tasks = on_measured, tasks

    def action(self, name: ActionName, factor: float = 1.0) -> Intervene:
        """The intervention of that name on this model; `factor` is for `amplify` alone."""
        adapter = self._adapter
        if name == "amplify":
            return lambda masks: amplified(adapter, masks, factor)
        if name == "retain":
            return lambda masks: retained(adapter, masks)
        return lambda masks: masked(adapter, masks)

    def dense(self) -> Quality:
        """The unchanged model."""
        texts = {name: summed_loss(self._adapter, batches) for name, batches in self._texts.items()}
        figures = {} if self._tasks is None else self._tasks(self._adapter.model)
        self._on_measured(1)
        return Quality(texts, figures)

    def measure(self, intervene: Intervene, masks: Sequence[Tensor]) -> Ablated:
        """The model with the neurons of `masks`, bool [neurons] for each layer, changed."""
        with intervene(masks):
            return Ablated(sum(int(mask.sum()) for mask in masks), self.dense())

    def random(
        self, intervene: Intervene, like: Sequence[Tensor], *, draws: int, seed: int
    ) -> Band:
        """The same done to `draws` random sets with as many neurons in each layer as `like`."""
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
        """The same done to the union of the first n networks of `order`, for each n of `sizes`.

        `components`, [components, N], are maps to take sets of equal size from: the neurons of the largest abs weight
        in any of the first n.
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
    """Mean, and standard deviation: 0 for one value, or where one is not finite."""
    varied = len(values) > 1 and all(map(math.isfinite, values))
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if varied else 0.0,
    }


def random_like(masks: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Masks with as many neurons in each layer as `masks` has, drawn evenly."""
    drawn = []
    for mask in masks:
        chosen = torch.zeros(len(mask), dtype=torch.bool)
        chosen[torch.randperm(len(mask), generator=generator)[: int(mask.sum())]] = True
        drawn.append(chosen)
    return drawn


def largest(weights: Tensor, count: int) -> Tensor:
    """Bool [N]: the `count` neurons with the largest abs weight in one map [N]."""
    chosen = torch.zeros(len(weights), dtype=torch.bool)
    chosen[torch.argsort(weights.abs(), descending=True, stable=True)[:count]] = True
    return chosen


def check_sizes(sizes: Sequence[int], networks: int) -> None:
    """Refuse sizes of growing sets that no set of networks can have.

    Raises
    ------
    InvalidInput
        A size is below 1 or above the number of networks.
    """
    for size in sizes:
        if not 1 <= size <= networks:
            raise InvalidInput(f"cannot grow to {size} networks: there are {networks}")
