"""What one task is made of when a whole model serves it: its neurons, and its refitted output weights.

The neurons alone cost a bit each. The refit that makes them take over the removed ones' work costs
more, as much as one chooses: nothing (the whole model's weights serve), a correction of low rank, or
the task's own `down` in full.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fbn_prune.errors import FbnPruneError, InvalidInput
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.family import Location
from fbn_prune.model.kept_neurons import KEPT_FILE, KeptNeurons
from fbn_prune.networks.functional_networks import MEMBER_Z, FunctionalNetworks

Refit = Literal["none", "low-rank", "full"]


@dataclass(frozen=True, eq=False)
class FullDown:
    """A task's own output weights: `weight` [hidden, kept]."""

    weight: Tensor

    @property
    def parameters(self) -> int:
        return self.weight.numel()


@dataclass(frozen=True, eq=False)
class LowRankDown:
    """What a task adds to the whole model's output weights: `left` [hidden, rank] @ `right` [rank, kept]."""

    left: Tensor
    right: Tensor

    @property
    def parameters(self) -> int:
        return self.left.numel() + self.right.numel()


OwnDown = FullDown | LowRankDown


@dataclass(frozen=True, eq=False)
class TaskSet:
    """One task's neurons and corrections.

    Attributes
    ----------
    neurons : which are kept.
    own_down : for each layer the task's output weights, None for the whole model's.
    own_bias : for each layer the task's output bias [hidden], None for the whole model's.
    """

    neurons: KeptNeurons
    own_down: tuple[OwnDown | None, ...]
    own_bias: tuple[Tensor | None, ...]

    @classmethod
    def plain(cls, neurons: KeptNeurons) -> TaskSet:
        """Neurons alone."""
        nothing = (None,) * len(neurons.widths)
        return cls(neurons, nothing, nothing)

    @classmethod
    def from_networks(
        cls, networks: FunctionalNetworks, kept: Sequence[int], z: float = MEMBER_Z
    ) -> TaskSet:
        """The members of some functional networks.

        Raises
        ------
        InvalidInput
            If a layer would keep no neuron.
        """
        masks = networks.by_layer(networks.union(kept, z))
        return cls.plain(KeptNeurons.from_masks(masks))

    @property
    def correction_parameters(self) -> int:
        """Weights of its own: each is as wide as the model's dtype, on disk as stored, in memory as loaded."""
        down = sum(one.parameters for one in self.own_down if one is not None)
        return down + sum(one.numel() for one in self.own_bias if one is not None)


def task_of_pruned(
    base: Checkpoint,
    pruned: Checkpoint,
    refit: Refit,
    rank: int,
    progress: Callable[[int], None] | None = None,
) -> TaskSet:
    """Take a pruned checkpoint for a task of the model it was cut from.

    Parameters
    ----------
    refit
        What is kept of its output weights: `full` makes the served task compute what the pruned
        checkpoint does; `low-rank` the best correction of rank `rank`; `none` nothing.
    progress
        Called with the number of bytes compared since the last call.

    Raises
    ------
    InvalidInput
        If the checkpoint does not say which neurons it kept, or was not cut from this model.
    """
    neurons = KeptNeurons.load(pruned.path / KEPT_FILE)
    widths = base.family.widths(base.config)
    if list(neurons.widths) != widths:
        raise InvalidInput(
            f"{pruned.path} was cut from layers of {list(neurons.widths)} neurons, "
            f"{base.path} has {widths}"
        )
    own_down: list[OwnDown | None] = [None] * len(widths)
    own_bias: list[Tensor | None] = [None] * len(widths)
    if (family := base.family).head_shape(pruned.config) != family.head_shape(base.config):
        raise InvalidInput(
            f"{pruned.path}: attention heads were cut there too, and a task runs through the whole model's: prune "
            "for a task without --head-sparsity"
        )
    for name in pruned.names:
        location = base.family.locate(name)
        found = pruned.tensor(name)
        if location is None or location.layer >= len(widths):
            _require_equal(base, pruned, name, found, None)
        elif location.projection is not base.family.output:
            if name in base.tensors or bool(found.any()):  # else the zeros a bias flag asks for
                _require_equal(base, pruned, name, found, (location, neurons))
        elif location.part == "bias":
            old = base.tensor(name) if name in base.tensors else torch.zeros_like(found)
            own_bias[location.layer] = None if torch.equal(old, found) else found.clone()
        else:
            old = _rows_or_columns(base.tensor(name), location, neurons)
            _require_shape(pruned, name, found, old)
            if not torch.equal(old, found) and refit != "none":
                own_down[location.layer] = _correction(old, found, location, refit, rank)
        if progress is not None:
            progress(found.nbytes)
    return TaskSet(neurons, tuple(own_down), tuple(own_bias))


def _require_equal(
    base: Checkpoint,
    pruned: Checkpoint,
    name: str,
    found: Tensor,
    cut: tuple[Location, KeptNeurons] | None,
) -> None:
    expected = base.tensor(name) if name in base.tensors else None
    if expected is not None and cut is not None:
        expected = _rows_or_columns(expected, *cut)
    if expected is None or not torch.equal(expected, found):
        raise InvalidInput(
            f"{pruned.path}: {name} is not that of {base.path}: it was cut from another model, "
            "or trained afterwards"
        )


def _require_shape(pruned: Checkpoint, name: str, found: Tensor, old: Tensor) -> None:
    if found.shape != old.shape:
        raise InvalidInput(
            f"{pruned.path}: {name} has shape {list(found.shape)}, but {KEPT_FILE} means "
            f"{list(old.shape)}"
        )


def _rows_or_columns(tensor: Tensor, location: Location, neurons: KeptNeurons) -> Tensor:
    """A tensor's part that belongs to the kept neurons."""
    axis = location.projection.neuron_axis if location.part == "weight" else 0
    width, kept = neurons.widths[location.layer], neurons.kept[location.layer]
    rows = torch.cat([kept + block * width for block in range(location.projection.stacked)])
    return tensor.index_select(axis, rows)


def _correction(old: Tensor, new: Tensor, location: Location, refit: Refit, rank: int) -> OwnDown:
    if location.projection.neuron_axis == 0:
        old, new = old.T, new.T
    if refit == "full":
        return FullDown(new.contiguous().clone())
    left, values, right = torch.linalg.svd(new.double() - old.double(), full_matrices=False)
    rank = min(rank, len(values))
    scale = values[:rank].sqrt()
    found = LowRankDown(
        (left[:, :rank] * scale).to(new.dtype).contiguous(),
        (scale[:, None] * right[:rank]).to(new.dtype).contiguous(),
    )
    if not bool(found.left.isfinite().all() & found.right.isfinite().all()):
        raise FbnPruneError(f"layer {location.layer}: the correction is not finite in {new.dtype}")
    return found
