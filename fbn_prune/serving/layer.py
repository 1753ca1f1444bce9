"""Serve one layer's MLP: lay out its weights for the tasks, and compute its output for the current task."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fbn_kernels import NeuronBatch, NeuronSet, NeuronSets, ResidentMlp, Strategy, mark_varying
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.serving.arrangement import inverse, together
from fbn_prune.serving.tasks import FullDown, OwnDown, TaskSet


@dataclass
class Routing:
    """The current task or tasks, shared by the layers of a model.

    Attributes
    ----------
    task
        Number of the task; the number of tasks stands for the whole model.
    rows
        The task of each row, int32 [batch]; None if all rows run `task`.
    batches
        The routing of the running forward pass on each device that holds layers, with the sets of layer 0; empty if
        all rows run the same task.
    """

    task: int
    rows: Tensor | None = None
    batches: tuple[NeuronBatch, ...] = ()


def batch_on(batch: NeuronBatch, device: torch.device) -> NeuronBatch:
    """Return the batch on another device, without its sets, of which each layer has its own."""
    lists = (batch.set_ids, batch.order, batch.tiles)
    set_ids, order, tiles = (one.to(device) for one in lists)
    return replace(batch, set_ids=set_ids, order=order, tiles=tiles)


def lay_out(adapter: ModelAdapter, layer: int, order: Tensor, undo: ExitStack) -> None:
    """Permute a layer's neurons in place, and store the weights of each neuron contiguously in every projection.

    The layer computes the same function through the same parameters; `down` becomes a view of its stored transpose. At
    most one matrix is in memory twice at a time.

    Parameters
    ----------
    adapter
        The model.
    layer
        The layer's number.
    order
        For each new position the neuron to put there, int64 [neurons].
    undo
        Gets callbacks that restore each parameter bit for bit.
    """
    back = inverse(order)
    for projection in adapter.family.projections:
        module = adapter.module(layer, projection)
        parts: list[tuple[Tensor, int]] = [(module.weight, projection.neuron_axis)]
        if module.bias is not None and projection is not adapter.family.output:
            parts.append((module.bias, 0))
        for parameter, axis in parts:
            blocks = range(projection.stacked)
            forward, backward = (
                torch.cat([one + block * len(one) for block in blocks]).to(parameter.device)
                for one in (order, back)
            )
            rows = parameter.data if axis == 0 else parameter.data.t()
            stored = rows.index_select(0, forward)
            undo.callback(_restore, parameter, axis, backward)
            parameter.data = stored if axis == 0 else stored.t()


def _restore(parameter: Tensor, axis: int, back: Tensor) -> None:
    rows = parameter.data if axis == 0 else parameter.data.t()
    stored = rows.index_select(0, back)
    parameter.data = stored if axis == 0 else stored.t().contiguous()


@dataclass(frozen=True, eq=False)
class _Own:
    """A task's own output weights, with columns in the order of its hidden vector."""

    down: OwnDown
    columns: Tensor
    """Positions of the task's neurons in the union of all tasks, int64 [kept]."""

    def __call__(self, hidden: Tensor, shared: Tensor | None) -> Tensor:
        if isinstance(self.down, FullDown):
            return F.linear(hidden, self.down.weight)
        assert shared is not None
        return shared + F.linear(F.linear(hidden, self.down.right), self.down.left)


class ServedLayer:
    """The forward function of one MLP, for the current task or for one task each row.

    Attributes
    ----------
    device
        The device of the MLP's weights.
    place
        Index of that device among the devices that hold layers.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        layer: int,
        tasks: Sequence[TaskSet],
        order: Tensor,
        routing: Routing,
    ) -> None:
        self._routing = routing
        self.place = 0
        weights = adapter.input_weights(layer)
        down_t = adapter.down_weight(layer).t()
        self.device, width = down_t.device, len(down_t)
        places = inverse(order)
        kept = [places[task.neurons.kept[layer]].sort().values for task in tasks]
        sets = [NeuronSet.from_indices(one, width).to(self.device) for one in kept]
        self._sets = NeuronSets.from_sets(sets)
        gate_bias, up_bias = _input_biases(adapter, layer)
        self._mlp = ResidentMlp(
            weights[-1],
            down_t,
            [*sets, NeuronSet.full(width, self.device)],
            gate=weights[0] if len(weights) == 2 else None,
            activation=adapter.family.activation(adapter.config),
            up_bias=up_bias,
            gate_bias=gate_bias,
        )
        self._own = tuple(
            self._ordered(task, layer, number, places, down_t) for number, task in enumerate(tasks)
        )
        self._any_own = any(one is not None for one in self._own)
        self._bias = _output_biases(tasks, layer, adapter.down_bias(layer), down_t)
        self.switch(len(tasks))

    @property
    def room_bytes(self) -> int:
        """Bytes of the buffer for copied rows, allocated or not; 0 on a GPU."""
        return self._mlp.room_bytes

    def take_room(self) -> None:
        """Allocate the buffer for copied rows."""
        self._mlp.take_room()

    def forbid_copies(self) -> None:
        """Gather scattered rows at every call instead of copying them when the task changes."""
        self._mlp.may_copy = False

    @property
    def copied_bytes(self) -> int:
        """Bytes of the allocated buffer for copied rows; 0 on a GPU."""
        return self._mlp.copied_bytes

    @property
    def list_bytes(self) -> int:
        """Bytes of the index lists, for single tasks and for mixed batches."""
        batches = (self._sets.indices, self._sets.table, self._sets.membership)
        return self._mlp.list_bytes + sum(one.nbytes for one in batches)

    def switch(self, task: int) -> None:
        """Make a task the current one."""
        self._mlp.switch(task)
        # Set here and not looked up by number in a forward pass, which would be compiled anew for each task.
        self._own_now = self._own[task] if task < len(self._own) else None
        self._bias_now = None if self._bias is None else self._bias[task]

    def route(self, rows: Tensor, tokens: int) -> NeuronBatch:
        """Prepare a forward pass of a batch with one task for each row, int32 [batch]."""
        if self._mlp.copies or self._any_own:
            # On a CPU, and if tasks have their own output weights, the union of their neurons is run once.
            ids = rows.repeat_interleave(tokens)
            nothing = ids[:0]
            return _union_batch(self._sets, ids, nothing)
        return self._sets.route(rows, tokens_per_row=tokens)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the MLP's output for x [..., hidden size]."""
        if batches := self._routing.batches:
            return self._mixed(x, replace(batches[self.place], sets=self._sets))
        own = self._own_now
        if own is None:
            out = self._mlp(x)
        else:
            hidden = self._mlp.hidden(x)
            shared = None if isinstance(own.down, FullDown) else self._mlp.down(hidden)
            out = own(hidden, shared)
        return out if self._bias_now is None else out + self._bias_now

    def _mixed(self, x: Tensor, batch: NeuronBatch) -> Tensor:
        out = self._mixed_own(x, batch) if self._any_own else self._mlp.mixed(x, batch)
        if self._bias is None:
            return out
        bias = self._bias.index_select(0, batch.set_ids)
        return out + bias.reshape(out.shape)

    def _mixed_own(self, x: Tensor, batch: NeuronBatch) -> Tensor:
        hidden = self._mlp.mixed_hidden(x, batch)
        hidden = hidden.reshape(-1, hidden.shape[-1])
        # The neurons of all tasks together are a prefix of the arrangement.
        out = shared = hidden @ self._mlp.down_t[: hidden.shape[1]]
        for number, own in enumerate(self._own):
            if own is not None:
                found = own(hidden.index_select(1, own.columns), shared)
                out = torch.where((batch.set_ids == number)[:, None], found, out)
        return out.reshape(*x.shape[:-1], out.shape[-1])

    def _ordered(
        self, task: TaskSet, layer: int, number: int, places: Tensor, like: Tensor
    ) -> _Own | None:
        down = task.own_down[layer]
        if down is None:
            return None
        order = self._mlp.order(number)
        column_at = inverse_of(places[task.neurons.kept[layer]], len(places))
        columns = column_at[order]
        own: OwnDown
        if isinstance(down, FullDown):
            own = FullDown(down.weight[:, columns].to(like))
            mark_varying(own.weight, 1)
        else:
            own = replace(down, left=down.left.to(like), right=down.right[:, columns].to(like))
            mark_varying(own.left, 1)
            mark_varying(own.right, 0, 1)
        return _Own(own, order.to(like.device))


def inverse_of(values: Tensor, size: int) -> Tensor:
    """Return the position of each of 0 to size - 1 in `values`, int64 [size]; 0 if it does not occur."""
    places = torch.zeros(size, dtype=torch.int64)
    places[values] = torch.arange(len(values))
    return places


def arrangement(tasks: Sequence[TaskSet], layer: int) -> Tensor:
    """Return the order of a layer's neurons for these tasks, see `together`; int64 [neurons]."""
    masks = []
    for task in tasks:
        mask = torch.zeros(task.neurons.widths[layer], dtype=torch.bool)
        mask[task.neurons.kept[layer]] = True
        masks.append(mask)
    return together(masks)


def _union_batch(sets: NeuronSets, ids: Tensor, nothing: Tensor) -> NeuronBatch:
    return NeuronBatch(sets, ids, nothing, nothing, 1, Strategy.UNION)


def _input_biases(adapter: ModelAdapter, layer: int) -> tuple[Tensor | None, Tensor | None]:
    """Return the biases of gate and up, [neurons] each."""
    found: list[Tensor | None] = []
    for projection in adapter.family.inputs:
        bias = adapter.module(layer, projection).bias
        parts = [None] * projection.stacked
        found += parts if bias is None else bias.detach().chunk(projection.stacked)
    return (None, found[0]) if len(found) == 1 else (found[0], found[1])


def _output_biases(
    tasks: Sequence[TaskSet], layer: int, base: Tensor | None, like: Tensor
) -> Tensor | None:
    """Return the output biases of the tasks and of the model, [tasks + 1, hidden]; None if there are none."""
    own = [task.own_bias[layer] for task in tasks]
    if base is None and all(one is None for one in own):
        return None
    base = like.new_zeros(like.shape[1]) if base is None else base
    return torch.stack([base if one is None else one.to(like) for one in (*own, None)])
