"""Attach several tasks to a live model, whose weights stay in memory once.

`attach` replaces the forward functions of the model's MLPs without copying the weights. The context manager `networks`
selects a task, or a task for each row of a batch. No step synchronises with the device, so a forward pass can be
compiled or captured in a CUDA graph. A served model runs one forward pass at a time.
"""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fbn_kernels.activations import canonical_activation
from fbn_prune.errors import InvalidInput
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.families import family_of
from fbn_prune.model.kept_neurons import KeptNeurons
from fbn_prune.serving.layer import Routing, ServedLayer, arrangement, batch_on, lay_out
from fbn_prune.serving.tasks import TaskSet

COPIES_SHARE = 0.19
"""Largest size of the copied rows on a CPU as a share of the weights; memory then stays below 1.2 times the model's."""

_numbers = itertools.count()
_attached: dict[int, ServedLayer] = {}
"""The serving layers of all live models. `torch.compile` treats what it reaches through a module as constant, including
the size of a task's neuron set; it does not for what it reaches through this dictionary."""


@dataclass(frozen=True)
class Memory:
    """The memory of a served model, in bytes.

    Attributes
    ----------
    weights
        The model's parameters, which all tasks share.
    lists
        The index lists of all tasks.
    copies
        On a CPU, the buffer for copied rows of the current task that lie outside long runs.
    corrections
        The output weights of each task.
    """

    weights: int
    lists: int
    copies: int
    corrections: dict[str, int]

    @property
    def total(self) -> int:
        return self.weights + self.lists + self.copies + sum(self.corrections.values())


class Served:
    """A model with tasks attached, as :func:`attach` returns it. As a context manager it detaches at the end.

    Attributes
    ----------
    model
        The model; `model.networks` is :meth:`networks`.
    names
        The tasks; their numbers follow this order.
    """

    def __init__(self, model: PreTrainedModel, tasks: Mapping[str, TaskSet]) -> None:
        adapter = _check(model, tasks)
        self.model = model
        self.names = tuple(tasks)
        self._tasks = dict(tasks)
        self._routing = Routing(task=len(tasks))
        self._layers: list[ServedLayer] = []
        with ExitStack() as undo:
            for layer in range(len(adapter.layers)):
                self._attach_layer(adapter, layer, undo)
            self._devices = tuple(dict.fromkeys(layer.device for layer in self._layers))
            for served in self._layers:
                served.place = self._devices.index(served.device)
            self._attach_model(undo)
            self._share_room()
            self._switch(len(tasks))
            self._undo = undo.pop_all()

    def _attach_layer(self, adapter: ModelAdapter, layer: int, undo: ExitStack) -> None:
        tasks = tuple(self._tasks.values())
        order = arrangement(tasks, layer)
        lay_out(adapter, layer, order, undo)
        served = ServedLayer(adapter, layer, tasks, order, self._routing)
        self._layers.append(served)
        number = next(_numbers)
        _attached[number] = served
        undo.callback(_attached.pop, number, None)
        weakref.finalize(self.model, _attached.pop, number, None)
        first, *others = (
            adapter.layers[layer].get_submodule(path) for path in adapter.family.mlp_modules
        )
        _override(first, "forward", _forward_of(number), undo)
        for module in others:
            _override(module, "forward", _pass_on, undo)

    def _attach_model(self, undo: ExitStack) -> None:
        routed = _routed_forward(self.model.forward, self)
        _override(self.model, "forward", routed, undo)
        _override(self.model, "networks", self.networks, undo)

    def _share_room(self) -> None:
        left = COPIES_SHARE * sum(one.nbytes for one in self.model.parameters())
        for layer in self._layers:
            if layer.room_bytes > left:
                layer.forbid_copies()
            else:
                layer.take_room()
                left -= layer.room_bytes

    @contextmanager
    def networks(self, names: str | Sequence[str]) -> Iterator[PreTrainedModel]:
        """Run forward passes inside the context through the neurons of one task, or of one task for each row.

        Outside the context the whole model runs. Contexts can be nested.

        Parameters
        ----------
        names
            One task, or one task for each row of the following batches.

        Raises
        ------
        InvalidInput
            There is no task of that name.
        """
        routing = self._routing
        before = (routing.task, routing.rows)
        if isinstance(names, str):
            task, rows = self._number(names), None
        else:
            task, rows = routing.task, self.ids(names)
        try:
            self._switch(task)
            routing.rows = rows
            yield self.model
        finally:
            self._switch(before[0])
            routing.rows = before[1]

    def ids(self, names: Sequence[str]) -> Tensor:
        """Return the numbers of tasks for `network_ids`, int64 [len(names)] on the model's device."""
        numbers = [self._number(name) for name in names]
        return torch.tensor(numbers, dtype=torch.int64, device=self.model.device)

    @property
    def memory(self) -> Memory:
        """The memory of the model and of each task."""
        return Memory(
            weights=sum(one.nbytes for one in self.model.parameters()),
            lists=sum(layer.list_bytes for layer in self._layers),
            copies=sum(layer.copied_bytes for layer in self._layers),
            corrections={
                name: task.correction_parameters * self.model.dtype.itemsize
                for name, task in self._tasks.items()
            },
        )

    def detach(self) -> None:
        """Restore the model bit for bit. A second call does nothing."""
        self._undo.close()

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _number(self, name: str) -> int:
        if name not in self.names:
            raise InvalidInput(f"there is no task {name!r}; the tasks are {', '.join(self.names)}")
        return self.names.index(name)

    def _switch(self, task: int) -> None:
        for layer in self._layers:
            layer.switch(task)
        self._routing.task = task

    def _begin(self, network_ids: Tensor | None, tokens: Tensor) -> None:
        """Prepare a forward pass over `tokens`, ids [batch, tokens] or embeddings [batch, tokens, hidden]."""
        rows = self._routing.rows if network_ids is None else network_ids
        if rows is None:
            return
        if rows.dim() != 1 or rows.shape[0] != tokens.shape[0]:
            raise InvalidInput(
                f"network_ids has shape {list(rows.shape)}; it needs one task for each of the {tokens.shape[0]} rows"
            )
        if rows.device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = rows[(rows < 0) | (rows >= len(self.names))]
            if len(wrong):
                raise InvalidInput(
                    f"network_ids holds {int(wrong[0])}, but there are {len(self.names)} tasks"
                )
        rows = rows.to(self._devices[0], torch.int32)
        batch = self._layers[0].route(rows, tokens.shape[1])
        self._routing.batches = (batch, *(batch_on(batch, one) for one in self._devices[1:]))

    def _end(self) -> None:
        self._routing.batches = ()


def attach(
    model: PreTrainedModel, tasks: Mapping[str, TaskSet | KeptNeurons | Sequence[Tensor]]
) -> Served:
    """Attach tasks to a live model in place.

    The neurons of each layer are permuted so that those of each task form few contiguous runs; this does not change the
    model's output, and `detach` reverses it. Move the model to its device and dtype before attaching. Inside
    `model.networks("name")` every forward pass runs through the task's neurons. `network_ids` [batch], an argument of
    the model and of `generate` (see :meth:`Served.ids`), selects a task for each row.

    Parameters
    ----------
    model
        A model of a supported family, in evaluation mode.
    tasks
        The tasks by name, the most used first: a task set, its kept neurons, or for each layer the kept neurons as
        ascending int64 indices or as a bool mask.

    Returns
    -------
    Served
        The model with its tasks.

    Raises
    ------
    InvalidInput
        The sets do not fit the model, or it is of an unknown family, in training mode or serves tasks already.
    """
    return Served(model, {name: _as_task(model, task) for name, task in tasks.items()})


def _as_task(model: PreTrainedModel, task: TaskSet | KeptNeurons | Sequence[Tensor]) -> TaskSet:
    if isinstance(task, TaskSet):
        return task
    if isinstance(task, KeptNeurons):
        return TaskSet.plain(task)
    if all(one.dtype == torch.bool for one in task):
        return TaskSet.plain(KeptNeurons.from_masks([one.cpu() for one in task]))
    widths = family_of(model.config).widths(model.config)
    kept = tuple(one.to("cpu", torch.int64) for one in task)
    return TaskSet.plain(KeptNeurons(tuple(widths), kept))


def _check(model: PreTrainedModel, tasks: Mapping[str, TaskSet]) -> ModelAdapter:
    adapter = ModelAdapter(model)
    family = adapter.family
    if not tasks:
        raise InvalidInput("there are no tasks to attach")
    if model.training:
        raise InvalidInput("the model is in training mode: call eval() first")
    if "networks" in vars(model):
        raise InvalidInput("the model serves tasks already: detach it first")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise InvalidInput(
            "some of the model's weights are not in memory (device meta): load the model whole"
        )
    try:
        canonical_activation(family.activation(model.config))
    except ValueError as error:
        raise InvalidInput(f"{family.name} with this config cannot be served: {error}") from error
    widths = tuple(adapter.widths)
    for name, task in tasks.items():
        if task.neurons.widths != widths:
            raise InvalidInput(
                f"the task {name!r} is for layers of {list(task.neurons.widths)} neurons, "
                f"the model has {list(widths)}: take the task's own model"
            )
    return adapter


def _override(module: nn.Module, name: str, value: object, undo: ExitStack) -> None:
    """Set an attribute of one module instance; `undo` restores the earlier one."""
    own = vars(module)
    if name in own:
        undo.callback(own.__setitem__, name, own[name])
    else:
        undo.callback(own.pop, name, None)
    own[name] = value


def _forward_of(number: int) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return _attached[number](x)

    return forward


def _pass_on(x: Tensor) -> Tensor:
    return x


def _routed_forward(forward: Callable[..., Any], served: Served) -> Callable[..., Any]:
    """Return the model's forward with `network_ids` in its signature, where `generate` looks for it."""

    def routed(*args: Any, network_ids: Tensor | None = None, **kwargs: Any) -> Any:
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            raise InvalidInput("a served model needs input_ids or inputs_embeds")
        served._begin(network_ids, tokens)
        try:
            return forward(*args, **kwargs)
        finally:
            served._end()

    stock = inspect.signature(forward)
    extra = inspect.Parameter("network_ids", inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters = list(stock.parameters.values())
    rest = [one for one in parameters if one.kind is inspect.Parameter.VAR_KEYWORD]
    named = [one for one in parameters if one.kind is not inspect.Parameter.VAR_KEYWORD]
    signature = stock.replace(parameters=[*named, extra, *rest])
    routed.__signature__ = signature  # type: ignore[attr-defined]
    return routed
