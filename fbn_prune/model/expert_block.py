"""The experts of one layer of a live mixture, seen as so many small MLPs, and the router before them.

Each expert's weights come in the orientation of every other MLP of this package: inputs as [neurons, hidden], the
output as [hidden, neurons]. How the module stores them is read from what transformers says on its class, never from
shapes; :meth:`ExpertBlock.check` compares the result with what the module computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.hooks import RemovableHandle

from fbn_prune.errors import InvalidInput
from fbn_prune.model.heads import rounded
from fbn_prune.model.mixture_family import MixtureFamily
from fbn_prune.model.routed import ExpertsCut, Routed

SAME = 1e-3
"""Relative difference up to which two ways to compute the experts' output agree, in float32; see :meth:`check`."""
_NEVER = -1e4
"""Added to a correction bias, it keeps the router from an expert: scores lie between 0 and 1."""


class ExpertBlock:
    """The experts and the router of one live layer.

    Parameters
    ----------
    layer
        The decoder layer.
    family
        The model's architecture.
    """

    def __init__(self, layer: nn.Module, family: MixtureFamily) -> None:
        self.family = family
        self.layer = layer
        self.experts: Any = layer.get_submodule(family.experts)
        self.parent: Any = layer.get_submodule(family.experts.rpartition(".")[0])

    @property
    def count(self) -> int:
        """Number of experts."""
        return int(self.experts.down_proj.shape[0])

    @property
    def width(self) -> int:
        """Neurons of an expert."""
        return int(self.experts.down_proj.shape[1 if self.experts.is_transposed else 2])

    @property
    def device(self) -> torch.device:
        device: torch.device = self.experts.down_proj.device
        return device

    # Each expert as an MLP

    @property
    def _input_name(self) -> str:
        return "gate_up_proj" if self.experts.has_gate else "up_proj"

    def _rows(self, neurons: Tensor) -> Tensor:
        """The rows of the input weights that compute these neurons."""
        if not self.experts.has_gate:
            return neurons
        if self.experts.is_concatenated:
            return torch.cat([neurons, neurons + self.width])
        return torch.stack([2 * neurons, 2 * neurons + 1], dim=1).flatten()

    def input_weight(self, expert: int) -> Tensor:
        """Return a view of an expert's input weights, [rows, hidden]; with a gate there are two rows to a neuron."""
        weight: Tensor = getattr(self.experts, self._input_name).detach()[expert]
        return weight.T if self.experts.is_transposed else weight

    def input_norms(self, expert: int) -> Tensor:
        """Return the squared norm of each neuron's input weights, float64 [neurons]."""
        squares = self.input_weight(expert).double().square().sum(1)
        if self.experts.has_gate and not self.experts.is_concatenated:
            return squares.view(self.width, 2).sum(1)
        return squares.view(-1, self.width).sum(0)

    def down(self, expert: int) -> Tensor:
        """Return a view of an expert's output weights, [hidden, neurons]."""
        weight: Tensor = self.experts.down_proj.detach()[expert]
        return weight.T if self.experts.is_transposed else weight

    def bias(self, expert: int) -> Tensor | None:
        """Return an expert's output bias, [hidden], or None."""
        return self.experts.down_proj_bias.detach()[expert] if self.experts.has_bias else None

    @torch.inference_mode()
    def activation(self, expert: int, hidden: Tensor, neurons: Tensor | None = None) -> Tensor:
        """Return what an expert's output projection reads for these tokens, [tokens, neurons], from some or all."""
        module, weight, bias = self.experts, self.input_weight(expert), None
        if module.has_bias:
            bias = getattr(module, f"{self._input_name}_bias")[expert]
        if neurons is not None:
            rows = self._rows(neurons)
            weight, bias = weight[rows], None if bias is None else bias[rows]
        projected = linear(hidden, weight, bias)
        found: Tensor = (
            module._apply_gate(projected) if module.has_gate else module.act_fn(projected)
        )
        return found

    def output(self, expert: int, activation: Tensor) -> Tensor:
        """Return an expert's output for its activations, before the gate, [tokens, hidden]."""
        return linear(activation, self.down(expert), self.bias(expert))

    @torch.inference_mode()
    def check(self, tokens: Routed) -> None:
        """Compare the experts as they are read here with what the module computes.

        Raises
        ------
        InvalidInput
            They differ: the experts compute something else than MLPs whose neurons are independent.
        """
        expected = torch.zeros_like(tokens.hidden)
        for expert in tokens.index.unique().tolist():
            rows, gates = tokens.of(expert)
            active = self.activation(expert, tokens.hidden[rows])
            some = torch.arange(self.width // 2, self.width, device=active.device)
            alone = self.activation(expert, tokens.hidden[rows], some)
            if not _same(alone, active[:, some]):
                raise self._unreadable()
            output = self.output(expert, active)
            expected.index_add_(0, rows, (output * gates[:, None]).to(expected))
        found = self.experts(tokens.hidden, tokens.index, tokens.gates)
        if not _same(found, expected):
            raise self._unreadable()

    def _unreadable(self) -> InvalidInput:
        return InvalidInput(
            f"the experts of {self.family.name} are not what their tensors say: they cannot be pruned"
        )

    # The router

    @contextmanager
    def recording(self) -> Iterator[list[Routed]]:
        """Record what the router sends to the experts, for each call of the layer inside the context."""
        seen: list[Routed] = []
        handle = self.watched(seen.append)
        try:
            yield seen
        finally:
            handle.remove()

    def watched(self, watch: Callable[[Routed], None]) -> RemovableHandle:
        """Call `watch` with what the router sends to the experts whenever the layer runs, until it is removed."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, index, gates = (*args, *kwargs.values())
            watch(Routed(hidden.flatten(0, -2), index, gates))

        return cast(RemovableHandle, self.experts.register_forward_pre_hook(hook, with_kwargs=True))

    @torch.inference_mode()
    def route(self, hidden: Tensor, kept: Tensor | None = None) -> Routed:
        """Return where the router sends tokens [tokens, hidden] if only the experts `kept` (ascending) are left.

        The model's own router is run, with the rows of the kept experts alone. Where groups of experts would keep
        different numbers, the others are kept out by their correction bias instead.
        """
        every = torch.arange(self.count, device=hidden.device)
        kept = every if kept is None else kept.to(hidden.device)
        with self.recording() as seen, self._routing_to(kept), self._without_outputs():
            self.parent(hidden[None])
        (found,) = seen
        if not self._balanced(kept):
            return Routed(hidden, found.index, found.gates)
        return Routed(hidden, kept[found.index], found.gates)

    def _balanced(self, kept: Tensor) -> bool:
        """Whether every group keeps the same number of experts."""
        groups = self.family.groups
        return (
            len(set(torch.bincount(kept // (self.count // groups), minlength=groups).tolist())) == 1
        )

    @contextmanager
    def _without_outputs(self) -> Iterator[None]:
        """Let the experts return zeros: only the router's decision is wanted."""
        self.experts.forward = lambda hidden, *args, **kwargs: torch.zeros_like(hidden)
        try:
            yield
        finally:
            del self.experts.forward

    @contextmanager
    def _routing_to(self, kept: Tensor) -> Iterator[None]:
        if len(kept) == self.count:
            yield
            return
        places = {name: self._counted(name) for name in self.family.counted}
        before = {name: getattr(module, part) for name, (module, part) in places.items()}
        sizes = [(m, a, getattr(m, a)) for m, a in self._count_attributes()]
        try:
            if not self._balanced(kept):
                removed = torch.ones(self.count, dtype=torch.bool, device=kept.device)
                removed[kept] = False
                for name, (module, part) in places.items():
                    if "bias" in part:
                        setattr(module, part, before[name] + _NEVER * removed.to(before[name]))
            else:
                self._keep_rows(kept)
            yield
        finally:
            for name, (module, part) in places.items():
                setattr(module, part, before[name])
            for module, attribute, value in sizes:
                setattr(module, attribute, value)

    def _counted(self, path: str) -> tuple[Any, str]:
        module, _, part = path.rpartition(".")
        return self.layer.get_submodule(module), part

    def _count_attributes(self) -> list[tuple[Any, str]]:
        """The modules' attributes with the number of experts and with top-k."""
        modules = [
            self.parent,
            self.experts,
            *(self._counted(name)[0] for name in self.family.counted),
        ]
        found = [(module, name) for module in modules for name in ("num_experts", "top_k")]
        return [
            (module, name) for module, name in found if isinstance(getattr(module, name, None), int)
        ]

    def _keep_rows(self, kept: Tensor) -> None:
        """Leave the router the rows of the experts `kept`."""
        for path in self.family.counted:
            module, part = self._counted(path)
            old = getattr(module, part)
            rows = old.detach()[kept.to(old.device)]
            if part in module._parameters:
                trained = old.requires_grad and not torch.is_inference_mode_enabled()
                rows = nn.Parameter(rows.clone(), requires_grad=trained)
            setattr(module, part, rows)
        top_k = self.family.top_k_of(len(kept))
        for module, name in self._count_attributes():
            setattr(module, name, len(kept) if name == "num_experts" else top_k)

    # Cutting

    def cut(self, cut: ExpertsCut, *, round_to: torch.dtype) -> None:
        """Cut the experts in place; new output weights are rounded to `round_to`.

        Raises
        ------
        FbnPruneError
            A new output weight is not finite in `round_to`.
        """
        module = self.experts
        kept = cut.experts.to(self.device)
        rows = [self._rows(each.to(self.device)) for each in cut.neurons]
        transposed = module.is_transposed
        inputs = (
            self.input_weight(int(expert))[own] for expert, own in zip(kept, rows, strict=True)
        )
        down = (rounded(one, round_to) for one in cut.down)
        values = {  # one expert at a time, because a layer may be most of what is in memory
            name: _stacked(parts, len(kept), getattr(module, name), transposed)
            for name, parts in ((self._input_name, inputs), ("down_proj", down))
        }
        if module.has_bias:
            name = f"{self._input_name}_bias"
            biases = getattr(module, name).detach()
            values[name] = torch.stack(
                [biases[int(expert)][own] for expert, own in zip(kept, rows, strict=True)]
            )
            new = module.down_proj_bias.detach()[kept]
            if cut.bias is not None:
                new = torch.stack([rounded(one, round_to) for one in cut.bias])
            values["down_proj_bias"] = new
        width = self.width
        with torch.inference_mode(False):
            if len(kept) < self.count:
                self._keep_rows(kept)
            for name, value in values.items():
                old = getattr(module, name)
                fresh = value.to(device=old.device, dtype=old.dtype)
                if fresh.is_inference():
                    fresh = fresh.clone()
                setattr(module, name, nn.Parameter(fresh, requires_grad=old.requires_grad))
        for name in ("intermediate_dim", "intermediate_size"):
            if getattr(module, name, None) == width:
                setattr(module, name, cut.width)

    def _changed_modules(self) -> list[Any]:
        routers = (self._counted(path)[0] for path in self.family.counted)
        return list(dict.fromkeys([*self.parent.modules(), *routers]))

    def saved(self) -> dict[tuple[int, str], Any]:
        """Return all that :meth:`cut` changes, for :meth:`restore`."""
        names = ("num_experts", "top_k", "intermediate_dim", "intermediate_size")
        state: dict[tuple[int, str], Any] = {}
        for number, module in enumerate(self._changed_modules()):
            for name in names:
                if name in vars(module):
                    state[number, name] = vars(module)[name]
            for name, value in (*module._parameters.items(), *module._buffers.items()):
                state[number, name] = value
        return state

    def restore(self, state: dict[tuple[int, str], Any]) -> None:
        """Put back what :meth:`saved` returned."""
        modules = self._changed_modules()
        for (number, name), value in state.items():
            setattr(modules[number], name, value)


def _stacked(parts: Iterable[Tensor], count: int, like: Tensor, transposed: bool) -> Tensor:
    """Return the experts' weights, [rows, columns] each, as one tensor in the dtype and on the device of `like`."""
    whole: Tensor | None = None
    with torch.inference_mode(False):
        for number, part in enumerate(parts):
            one = part.T if transposed else part
            if whole is None:
                whole = torch.empty((count, *one.shape), dtype=like.dtype, device=like.device)
            whole[number] = one.to(like.device)
    assert whole is not None
    return whole


def _same(found: Tensor, expected: Tensor) -> bool:
    """Whether two results are equal up to rounding in their dtype."""
    if found.shape != expected.shape:
        return False
    tolerance = SAME if found.dtype == torch.float32 else 30 * SAME
    scale = expected.float().norm().clamp(min=1e-30)
    return bool((found.float() - expected.float()).norm() <= tolerance * scale)
