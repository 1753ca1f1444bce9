"""Find the MLPs of a tiny copy, from its modules and what flows through them.

An MLP is a set of linear maps (the inputs) and one linear map (the output) of the same decoder layer such that the
output reads a function of what the inputs computed, neuron by neuron and token by token, and of nothing else. Both
halves of this are tried out, whatever the modules are called:

- One channel of an input is changed for one token. Then one channel of what the output reads changes, for that token
  alone. Which one it is tells how several blocks of neurons are laid out in one map.
- All inputs keep their results while the model reads another text. Then what the output reads stays the same.

So attention and recurrent layers are no MLPs (they mix tokens), nor is an MLP with a norm over its neurons, and a gate
that multiplies something else is no input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fbn_prune.model import decoder_layers as modules
from fbn_prune.model.decoder_layers import LENGTH, NotFound
from fbn_prune.model.family import Projection

_TOKEN = 2
"""The token for which channels are changed: others come before and after it."""
_SAME = 1e-4
"""Relative difference below which two activations count as equal: rounding of float32."""


@dataclass(frozen=True)
class Mlp:
    """One MLP of one layer of a tiny copy.

    Attributes
    ----------
    inputs
        The maps into the neurons. Of a gated MLP the gate comes first.
    output
        The map that reads them.
    width
        Number of neurons.
    biased
        Whether each of the maps has a bias.
    up_first
        Whether one fused map computes the up projection before the gate.
    computed
        What the inputs computed for a text, gate first, [1, tokens, width] each.
    activation
        What the output then read, [1, tokens, width].
    """

    inputs: tuple[Projection, ...]
    output: Projection
    width: int
    biased: tuple[bool, ...]
    up_first: bool
    computed: tuple[Tensor, ...] = field(compare=False, repr=False)
    activation: Tensor = field(compare=False, repr=False)


@dataclass(frozen=True)
class Structure:
    """What is found in a copy: the path of its decoder layers, and the MLPs of each; a layer may hold several."""

    layers: str
    mlps: tuple[tuple[Mlp, ...], ...]


def find_structure(model: PreTrainedModel) -> Structure:
    """Find the MLPs of a tiny copy.

    Raises
    ------
    NotFound
        It has no list of decoder layers, or no MLP that can be cut.
    """
    ids = modules.text(0)
    path, layers = modules.decoder_layers(model, ids)
    watched = _Watched(model, layers, ids)
    found = tuple(tuple(watched.mlps(layer)) for layer in range(len(layers)))
    if not any(found):
        raise NotFound("has no MLP of neurons that are independent of each other")
    return Structure(path, found)


class _Watched:
    """A copy whose linear maps are watched, and whose layers can be tried out all at once.

    Each layer is given the same input in all runs, so that a change in one layer does not reach the next.
    """

    def __init__(self, model: PreTrainedModel, layers: list[nn.Module], ids: Tensor) -> None:
        self._model, self._layers, self._ids = model, layers, ids
        self._linears = [dict(modules.linears(layer)) for layer in layers]
        shared: dict[nn.Module, int] = {}
        for index, linears in enumerate(self._linears):
            for module in linears.values():
                if shared.setdefault(module, index) != index:
                    raise NotFound("uses the same MLP in several layers")
        self._calls = [dict.fromkeys(linears, 0) for linears in self._linears]
        self._entered: list[Tensor | None] = [None] * len(layers)
        self._results: list[dict[str, Tensor]] = [{} for _ in layers]
        self._reference = self._first_run()
        self._start: dict[str, int] = {}
        rows = 0
        for name, channels in self._candidates().items():
            self._start[name] = rows
            rows += channels
        self._rows = rows + 1
        self._read_changed = self._read(self._rows, self._change)
        pairs = [self._pairs(layer) for layer in range(len(layers))]
        self._found = self._determined(pairs)
        self._odd = self._linear_in()

    def mlps(self, layer: int) -> Iterator[Mlp]:
        """Yield the MLPs of a layer."""
        linears = self._linears[layer]
        for name, inputs in self._found[layer].items():
            output = linears[name]
            activation = self._reference[layer][name]
            width = activation.shape[-1]
            computed = [
                block
                for each in inputs
                for block in self._results[layer][each.path].reshape(1, LENGTH, -1).split(width, -1)
            ]
            odd = [name in self._odd[operand][layer] for operand in ("first", "second")]
            up_first = odd == [True, False] and len(computed) == 2
            if up_first:
                inputs, computed = inputs[::-1], computed[::-1]
            biased = [linears[each.path].bias is not None for each in inputs]
            yield Mlp(
                inputs,
                Projection(name, modules.neuron_axis(output, reads=True)),
                width,
                (*biased, output.bias is not None),
                up_first and len(inputs) == 1,
                tuple(computed),
                activation,
            )

    def _first_run(self) -> list[dict[str, Tensor]]:
        """Run once, and keep what each layer and each of its linear maps reads and returns."""
        read: list[dict[str, Tensor]] = [{} for _ in self._layers]
        with ExitStack() as hooks:
            for index, layer in enumerate(self._layers):

                def enter(module: nn.Module, args: Any, kwargs: Any, index: int = index) -> None:
                    self._entered[index] = _first_tensor(args, kwargs).clone()

                hooks.callback(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
                for name, module in self._linears[index].items():

                    def keep(
                        module: nn.Module,
                        args: Any,
                        out: Tensor,
                        index: int = index,
                        name: str = name,
                    ) -> None:
                        self._calls[index][name] += 1
                        read[index][name] = args[0].reshape(1, -1, args[0].shape[-1]).clone()
                        self._results[index][name] = out.clone()

                    hooks.callback(module.register_forward_hook(keep).remove)
            modules.run(self._model, self._ids)
        return read

    def _candidates(self) -> dict[str, int]:
        """Return the maps that may be inputs, judged by shape, with the most channels that they have in a layer."""
        found: dict[str, int] = {}
        for linears, calls in zip(self._linears, self._calls, strict=True):
            once = [name for name in linears if calls[name] == 1]
            for name in once:
                channels = modules.channels(linears[name])
                reads = {
                    modules.channels(linears[other], reads=True) for other in once if other != name
                }
                if channels in reads or (channels % 2 == 0 and channels // 2 in reads):
                    found[name] = max(channels, found.get(name, 0))
        return found

    def _change(self, index: int, name: str) -> Callable[[int, Tensor], Tensor] | None:
        """Change one channel of a map in each of its rows; the last row is unchanged."""
        if name not in self._start:
            return None
        start = self._start[name]

        def change(index: int, out: Tensor) -> Tensor:
            shaped = out.reshape(self._rows, -1, out.shape[-1]).clone()
            if shaped.shape[1] != LENGTH:
                return out
            channels = torch.arange(out.shape[-1])
            values = shaped[start + channels, _TOKEN, channels]
            shaped[start + channels, _TOKEN, channels] = 2.0 * values.abs() + 1.0
            return shaped.reshape(out.shape)

        return change

    def _read(
        self,
        runs: int,
        change: Callable[[int, str], Callable[[int, Tensor], Tensor] | None],
        ids: Tensor | None = None,
    ) -> list[dict[str, Tensor]]:
        """Run the copy with changed results of some maps, and return what the maps of each layer read.

        Without other `ids` each layer gets the input that it had in the first run.
        """
        read: list[dict[str, Tensor]] = [{} for _ in self._layers]
        with ExitStack() as hooks:
            for index, layer in enumerate(self._layers):
                if ids is None:
                    hooks.callback(
                        layer.register_forward_pre_hook(
                            self._same_input(index), with_kwargs=True
                        ).remove
                    )
                for name, module in self._linears[index].items():
                    changed = change(index, name)

                    def watch(
                        module: nn.Module,
                        args: Any,
                        out: Tensor,
                        index: int = index,
                        name: str = name,
                        changed: Any = changed,
                    ) -> Tensor:
                        read[index][name] = args[0].reshape(runs, -1, args[0].shape[-1]).clone()
                        return out if changed is None else changed(index, out)

                    hooks.callback(module.register_forward_hook(watch).remove)
            modules.run(self._model, (self._ids if ids is None else ids).expand(runs, -1))
        return read

    def _same_input(self, index: int) -> Callable[..., Any]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
            entered = self._entered[index]
            assert entered is not None
            now = _first_tensor(args, kwargs)
            if now.ndim != entered.ndim:
                return args, kwargs
            value = entered.expand(now.shape).clone()  # the runs need not be the first axis
            if args:
                return (value, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": value}

        return enter

    def _pairs(self, layer: int) -> dict[str, tuple[Projection, ...]]:
        """Return the maps of a layer whose results another map reads neuron by neuron and token by token."""
        found: dict[str, list[Projection]] = {}
        linears = self._linears[layer]
        for source, start in self._start.items():
            if source not in linears or self._calls[layer][source] != 1:
                continue
            rows = [*range(start, start + modules.channels(linears[source])), -1]
            for name, read in self._read_changed[layer].items():
                if name == source or self._calls[layer][name] != 1 or read.shape[1] != LENGTH:
                    continue
                projection = self._neuronwise(linears[source], source, read[rows])
                if projection is not None:
                    found.setdefault(name, []).append(projection)
        return {
            name: tuple(inputs)
            for name, inputs in found.items()
            if len(inputs) > 1 or inputs[0].stacked > 1 or not self._same(layer, name, inputs[0])
        }

    def _same(self, layer: int, name: str, source: Projection) -> bool:
        """Whether a map reads another's results as they are: two maps in a row are no MLP."""
        read = self._reference[layer][name]
        return _equal(read, self._results[layer][source.path].reshape(read.shape))

    def _neuronwise(self, source: nn.Module, path: str, read: Tensor) -> Projection | None:
        """Return how the channels of a map belong to the channels that another map reads; None if they do not."""
        channels, width = modules.channels(source), read.shape[-1]
        stacked = channels // width
        if channels % width or stacked > 2:
            return None
        unchanged = read[-1]
        scale = _SAME * max(1.0, float(unchanged.abs().max()))
        differs = (read[:channels] - unchanged).abs() > scale  # [channels, tokens, width]
        per_token = differs.any(-1)
        per_token[:, _TOKEN] = False
        if bool(per_token.any()):
            return None
        hit = differs[:, _TOKEN]
        if bool((hit.sum(-1) > 1).any()) or int(hit.any(-1).sum()) < max(1, channels // 4):
            return None
        places = torch.arange(channels)
        for interleaved, neurons in ((False, places % width), (True, places // stacked)):
            own = nn.functional.one_hot(neurons, width).bool()
            if not bool((hit & ~own).any()):
                if interleaved and stacked > 1:
                    return None
                return Projection(path, modules.neuron_axis(source, reads=False), stacked)
        return None

    def _determined(
        self, pairs: list[dict[str, tuple[Projection, ...]]]
    ) -> list[dict[str, tuple[Projection, ...]]]:
        """Keep the outputs whose inputs decide alone what they read, whatever text the model reads."""
        inputs = [
            {projection.path for projections in layer.values() for projection in projections}
            for layer in pairs
        ]

        def hold(index: int, name: str) -> Callable[[int, Tensor], Tensor] | None:
            if name not in inputs[index]:
                return None
            return lambda index, out: self._results[index][name].reshape(out.shape)

        read = self._read(1, hold, ids=modules.text(1))
        return [
            {
                name: projections
                for name, projections in layer.items()
                if _equal(read[index][name], self._reference[index][name])
            }
            for index, layer in enumerate(pairs)
        ]

    def _linear_in(self) -> dict[str, list[set[str]]]:
        """Find which inputs each output reads in proportion: of a gated MLP the up projection, not the gate.

        Returns
        -------
        For "first" and "second" operand, by layer, the outputs whose activation changes its sign with it.
        """
        odd: dict[str, list[set[str]]] = {}
        for number, operand in enumerate(("first", "second")):

            def turn(index: int, name: str, number: int = number) -> Any:
                for inputs in self._found[index].values():
                    paths = [each.path for each in inputs]
                    if name not in paths:
                        continue
                    if inputs[0].stacked == 2:
                        return lambda index, out: torch.cat(
                            [
                                -half if place == number else half
                                for place, half in enumerate(out.chunk(2, dim=-1))
                            ],
                            dim=-1,
                        )
                    if len(paths) == 2 and paths.index(name) == number:
                        return lambda index, out: -out
                return None

            read = self._read(1, turn)
            odd[operand] = [
                {name for name in layer if _equal(read[index][name], -self._reference[index][name])}
                for index, layer in enumerate(self._found)
            ]
        return odd


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    return bool((one - other).abs().max() <= _SAME * max(1.0, float(other.abs().max())))


def _first_tensor(args: Any, kwargs: Mapping[str, Any]) -> Tensor:
    tensor: Tensor = args[0] if args else kwargs["hidden_states"]
    return tensor
