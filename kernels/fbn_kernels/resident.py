"""An MLP that stays in memory unpruned and runs through one set at a time, or through one set for each row.

Unlike `gathered_mlp`, it owns the copies of scattered rows on a CPU: one buffer, overwritten when the set changes, so
that many sets take no more memory than the largest. On a GPU no rows are copied.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix
from .activations import canonical_activation
from .cpu import LooseRows, Reading, down_in_place, hidden_in_place
from .hidden import gathered_hidden
from .mlp import gathered_mlp
from .neuron_set import NeuronSet
from .op import on_triton
from .routing import NeuronBatch

_handles = itertools.count()
_residents: WeakValueDictionary[int, ResidentMlp] = WeakValueDictionary()


@torch.library.custom_op(add_op_namespace_prefix("current_hidden"), mutates_args=())
def current_hidden(x: Tensor, order: Tensor, handle: int) -> Tensor:
    """Run `ResidentMlp.hidden` on a CPU for x [rows, width]; `order`, int [kept], gives the output size.

    The runs and copies differ from set to set. The operator hides them from the compiler, which would compile each.
    """
    return _residents[handle].hidden_in_place(x)


@current_hidden.register_fake
def _(x: Tensor, order: Tensor, handle: int) -> Tensor:
    return x.new_empty(x.shape[0], order.shape[0])


@torch.library.custom_op(add_op_namespace_prefix("current_down"), mutates_args=())
def current_down(hidden: Tensor, width: int, handle: int) -> Tensor:
    """Run `ResidentMlp.down` on a CPU for hidden [rows, kept]; return [rows, width]."""
    return _residents[handle].down_in_place(hidden)


@current_down.register_fake
def _(hidden: Tensor, width: int, handle: int) -> Tensor:
    return hidden.new_empty(hidden.shape[0], width)


def mark_varying(tensor: Tensor, *dimensions: int) -> None:
    """Mark sizes that differ from set to set, so that `torch.compile` does not compile for one of them."""
    import torch._dynamo

    for dimension in dimensions:
        torch._dynamo.maybe_mark_dynamic(tensor, dimension)


class ResidentMlp:
    """The unpruned weights of an MLP, with a current set of neurons: the first, until `switch`.

    Not for training: the weights get no gradient. On a CPU, if `may_copy` is false, scattered rows are gathered at
    every call and no buffer is allocated.

    Parameters
    ----------
    up, gate
        [neurons, width]; without `gate` the MLP is not gated.
    down_t
        [neurons, width out]: `down` transposed.
    sets
        The sets to choose from, on the weights' device.
    activation, up_bias, gate_bias
        As in `gathered_mlp`. The caller adds a bias of `down`.
    """

    def __init__(
        self,
        up: Tensor,
        down_t: Tensor,
        sets: Sequence[NeuronSet],
        *,
        gate: Tensor | None = None,
        activation: str = "silu",
        up_bias: Tensor | None = None,
        gate_bias: Tensor | None = None,
    ) -> None:
        self.up, self.gate, self.down_t = up, gate, down_t
        self.up_bias, self.gate_bias = up_bias, gate_bias
        self.activation = canonical_activation(activation)
        self.sets = tuple(sets)
        self.copies = not on_triton(up)
        self._threads = torch.get_num_threads()
        row_bytes = up.shape[1] * up.element_size()
        readings = (Reading.of(one.rows().cpu(), row_bytes) for one in self.sets)
        self._readings = tuple(replace(one, position=None) for one in readings)
        for one in self.sets:
            mark_varying(one.indices, 0)
            mark_varying(one.listed, 0)
        for reading in self._readings:
            mark_varying(reading.order, 0)
        self.may_copy = True
        self._handle = next(_handles)
        _residents[self._handle] = self
        self._room: LooseRows | None = None
        self._filled: tuple[int, LooseRows] | None = None
        self._set, self._reading = self.sets[0], self._readings[0]
        self._loose: LooseRows | None = None
        self.switch(0)

    @property
    def room_bytes(self) -> int:
        """Bytes of the copies for the set with the most scattered rows; 0 on a GPU."""
        most = max(len(one.loose) for one in self._readings) if self.copies else 0
        sources = (self.up, self.gate, self.up_bias, self.gate_bias)
        return most * sum(one[0].nbytes for one in sources if one is not None)

    @property
    def copied_bytes(self) -> int:
        """Bytes of the buffer for copied rows; 0 until it is allocated."""
        return 0 if self._room is None else self._room.nbytes

    @property
    def list_bytes(self) -> int:
        """Bytes of all index lists."""
        held = [one.indices for one in self.sets] + [one.order for one in self._readings]
        return sum(one.nbytes for one in held)

    def order(self, number: int) -> Tensor:
        """Return the neurons of a set in the order of `hidden`, int64 [kept] on the CPU."""
        rows = self._readings[number].order if self.copies else self.sets[number].rows()
        return rows.to("cpu", torch.int64)

    def switch(self, number: int) -> None:
        """Make another set the current one."""
        # A compiled caller reads these anew at each call; it would treat a number as a constant.
        self._set, self._reading = self.sets[number], self._readings[number]
        self._loose = None
        rows = self._reading.loose
        if not (self.copies and self.may_copy and len(rows)):
            return
        if self._filled is None or self._filled[0] != number:
            self._filled = (number, self._copy(rows))
        self._loose = self._filled[1]

    def hidden(self, x: Tensor) -> Tensor:
        """Return the activations of x [..., width], [..., kept] in the order of `order`."""
        if not self.copies:
            return gathered_hidden(x, self.up, self._set, **self._inputs())
        flat = x.reshape(-1, x.shape[-1])
        if torch.compiler.is_compiling():
            hidden = current_hidden(flat, self._reading.order, self._handle)
        else:
            hidden = self.hidden_in_place(flat)
        return hidden.reshape(*x.shape[:-1], hidden.shape[-1])

    def down(self, hidden: Tensor) -> Tensor:
        """Return the product of `hidden` and the current set's rows of `down`, [..., width out].

        On a GPU this gathers the rows at every call; `__call__` does not.
        """
        flat = hidden.reshape(-1, hidden.shape[-1])
        if self.copies and torch.compiler.is_compiling():
            out = current_down(flat, self.down_t.shape[1], self._handle)
        elif self.copies:
            out = self.down_in_place(flat)
        else:
            neurons = self._set
            out = flat @ self.down_t.index_select(0, neurons.indices[: neurons.count])
        return out.reshape(*hidden.shape[:-1], out.shape[-1])

    def __call__(self, x: Tensor) -> Tensor:
        """Run x [..., width] through the current set; return [..., width out]."""
        if self.copies:
            return self.down(self.hidden(x))
        return gathered_mlp(x, self.up, self.down_t, self._set, **self._inputs())

    def mixed(self, x: Tensor, batch: NeuronBatch) -> Tensor:
        """Run each row of x through its own set."""
        return gathered_mlp(x, self.up, self.down_t, batch, **self._inputs())

    def mixed_hidden(self, x: Tensor, batch: NeuronBatch) -> Tensor:
        """Return activations over the union of the batch's sets; see `gathered_hidden`."""
        return gathered_hidden(x, self.up, batch, **self._inputs())

    def _inputs(self) -> dict[str, Any]:
        return {
            "gate": self.gate,
            "activation": self.activation,
            "up_bias": self.up_bias,
            "gate_bias": self.gate_bias,
        }

    def hidden_in_place(self, x: Tensor) -> Tensor:
        """Compute `hidden` of x [rows, width] on a CPU."""
        return hidden_in_place(
            x,
            self.up,
            self.gate,
            self.up_bias,
            self.gate_bias,
            self._reading,
            self._loose,
            self.activation,
        )

    def down_in_place(self, hidden: Tensor) -> Tensor:
        """Compute `down` of hidden [rows, kept] on a CPU."""
        return down_in_place(hidden, self.down_t, self._reading, self._threads)

    def take_room(self) -> None:
        """Allocate the buffer for copied rows now, so that the first switch does not wait for it."""
        if self._room is not None or not self.room_bytes:
            return
        most = max(len(one.loose) for one in self._readings)
        sources = (self.up, self.gate, self.up_bias, self.gate_bias)
        up, *others = (
            None if one is None else one.new_empty(most, *one.shape[1:]).fill_(0) for one in sources
        )
        assert up is not None
        self._room = LooseRows(up, *others)

    def _copy(self, rows: Tensor) -> LooseRows:
        """Copy the rows into the buffer, over those of the previous set."""
        self.take_room()
        sources = (self.up, self.gate, self.up_bias, self.gate_bias)
        assert self._room is not None
        room = self._room
        targets = tuple(
            None if one is None else one[: len(rows)]
            for one in (room.up, room.gate, room.up_bias, room.gate_bias)
        )
        for source, target in zip(sources, targets, strict=True):
            if source is not None:
                torch.index_select(source, 0, rows, out=target)
        assert targets[0] is not None
        return LooseRows(targets[0], *targets[1:])
