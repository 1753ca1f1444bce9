"""Represent a task that an unpruned model serves: its kept neurons, and its refitted output weights.

The kept neurons take one bit for each neuron. The refitted output weights take as much memory as the choice of `refit`
says: none (the model's own weights are used), a low-rank correction, or the task's own `down` in full.
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
from fbn_prune.model.head_groups import head_groups
from fbn_prune.model.heads import HeadShape
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
    """A low-rank correction of the model's output weights: `left` [hidden, rank] @ `right` [rank, kept]."""

    left: Tensor
    right: Tensor

    @property
    def parameters(self) -> int:
        return self.left.numel() + self.right.numel()


OwnDown = FullDown | LowRankDown


@dataclass(frozen=True, eq=False)
class TaskSet:
    """The kept neurons and the output weights of one task.

    Attributes
    ----------
    neurons
        The kept neurons.
    own_down
        For each layer the task's output weights, None for the model's.
    own_bias
        For each layer the task's output bias [hidden], None for the model's.
    """

    neurons: KeptNeurons
    own_down: tuple[OwnDown | None, ...]
    own_bias: tuple[Tensor | None, ...]

    @classmethod
    def plain(cls, neurons: KeptNeurons) -> TaskSet:
        """Return a task without output weights of its own."""
        nothing = (None,) * len(neurons.widths)
        return cls(neurons, nothing, nothing)

    @classmethod
    def from_networks(
        cls, networks: FunctionalNetworks, kept: Sequence[int], z: float = MEMBER_Z
    ) -> TaskSet:
        """Return a task that keeps the members of some functional networks.

        Parameters
        ----------
        networks
            The functional networks of the model.
        kept
            Numbers of the networks to keep.
        z
            Least abs(z) of a member.

        Raises
        ------
        InvalidInput
            A layer would keep no neuron.
        """
        masks = networks.by_layer(networks.union(kept, z))
        return cls.plain(KeptNeurons.from_masks(masks))

    @property
    def correction_parameters(self) -> int:
        """Number of the task's own output weights and biases."""
        down = sum(one.parameters for one in self.own_down if one is not None)
        return down + sum(one.numel() for one in self.own_bias if one is not None)


def task_of_pruned(
    base: Checkpoint,
    pruned: Checkpoint,
    refit: Refit,
    rank: int,
    progress: Callable[[int], None] | None = None,
) -> TaskSet:
    """Return the task of a pruned checkpoint, to be served by the model it was cut from.

    Parameters
    ----------
    base
        The unpruned checkpoint.
    pruned
        The checkpoint that was cut from it.
    refit
        How much of the pruned checkpoint's output weights is kept: "full" reproduces its outputs, "low-rank" keeps the
        best correction of rank `rank`, "none" keeps nothing.
    rank
        Rank of the correction.
    progress
        Called with the number of bytes compared since the last call.

    Raises
    ------
    InvalidInput
        The pruned checkpoint has no file of kept neurons, or was not cut from this model.
    FbnPruneError
        A low-rank correction is not finite in the dtype of the weights.
    """
    neurons = KeptNeurons.load(pruned.path / KEPT_FILE)
    widths = base.family.widths(base.config)
    if list(neurons.widths) != widths:
        raise InvalidInput(
            f"{pruned.path} was cut from layers of {list(neurons.widths)} neurons, "
            f"{base.path} has {widths}: give a task that was cut from this model"
        )
    own_down: list[OwnDown | None] = [None] * len(widths)
    own_bias: list[Tensor | None] = [None] * len(widths)
    if _heads(pruned) != _heads(base):
        raise InvalidInput(
            f"{pruned.path}: attention heads were cut too, but a served task uses all heads of the model; prune for a "
            "task without --head-sparsity"
        )
    for name in pruned.names:
        location = base.family.locate(name)
        found = pruned.tensor(name)
        if location is None or location.layer >= len(widths):
            _require_equal(base, pruned, name, found, None)
        elif location.projection is not base.family.output:
            if name in base.tensors or bool(
                found.any()
            ):  # otherwise these are the zero biases that the config requires
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


def _heads(checkpoint: Checkpoint) -> tuple[HeadShape, list[int]]:
    """The shape of the attention heads, and the number of their groups in each layer."""
    family, config = checkpoint.family, checkpoint.config
    return family.head_shape(config), head_groups(family, config)


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
            f"{pruned.path}: {name} is not that of {base.path}: the checkpoint was cut from another model, "
            "or trained afterwards; give one that was cut from this model without --recover"
        )


def _require_shape(pruned: Checkpoint, name: str, found: Tensor, old: Tensor) -> None:
    if found.shape != old.shape:
        raise InvalidInput(
            f"{pruned.path}: {name} has shape {list(found.shape)}, but {KEPT_FILE} implies "
            f"{list(old.shape)}: take both from one output"
        )


def _rows_or_columns(tensor: Tensor, location: Location, neurons: KeptNeurons) -> Tensor:
    """Return the part of a tensor that belongs to the kept neurons."""
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
