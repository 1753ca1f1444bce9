"""Run token blocks through a causal LM one decoder layer at a time.

The hidden states of all batches are kept between layers. So every layer runs once, only one layer's statistics are in
memory at a time, and a layer can be cut before the next one reads its output.

Besides hidden states, a decoder layer takes arguments (rotary tables, masks, positions) that differ by architecture.
To obtain them, the model's own forward pass runs once for each batch with every layer replaced by a recorder, which
costs no more than the embedding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fbn_prune.data.calibration import Batch
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.building import building
from fbn_prune.model.calling import Calling

PROBE_TOKENS = 8
"""Tokens of a probe of how a layer uses its MLP's output."""

SAME_DIRECTION = 0.05
"""Rounding may turn a probe by this much; a norm turns it by far more."""

Observe = Callable[[int, Tensor], None]
"""Callback with (batch index, activations x [valid tokens, neurons]) while a layer runs."""


@dataclass(frozen=True)
class _LayerCall:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class LayerwiseForward:
    """A forward pass of all batches that advances layer by layer.

    Parameters
    ----------
    adapter
        A model in evaluation mode. A streamed model reads each layer once for all batches. Where layers are on several
        devices, each layer's output stays on the layer's device.
    batches
        Right-padded blocks; under causal attention padding cannot affect valid tokens.

    Attributes
    ----------
    hidden
        The input of layer `next_layer`: for each batch one tensor [blocks, length, d], in memory or on disk.
    next_layer
        The layer that :meth:`advance` runs next.
    forward_seconds
        Wall time of the model's own computation, without the observers'.
    """

    def __init__(self, adapter: ModelAdapter, batches: Sequence[Batch]) -> None:
        self._adapter, self._model = adapter, adapter.model
        self._groups = adapter.decoder_layers
        self._layers = [module for group in self._groups for module in group]
        self._device = adapter.device
        self._devices = {adapter.layer_device(layer) for layer in range(adapter.num_layers)}
        self._devices.add(self._device)
        self._valid = [batch.valid.to(self._device) for batch in batches]
        self._calls: list[list[tuple[_LayerCall, ...]]] = []
        self._first_calls: dict[torch.Size, list[_LayerCall]] = {}
        self.next_layer = 0
        self.forward_seconds = 0.0
        with torch.inference_mode():
            if adapter.calling is None:  # cached: a streamed model must read a layer for it
                adapter.calling = self._probe()
            self._calling = adapter.calling
            start = self._now()
            self.hidden = adapter.hidden_states()
            for batch in batches:
                self.hidden.append(self._embed(batch.input_ids.to(self._device)))
            for batch in batches[:1]:
                self._embed(batch.input_ids[:1, :PROBE_TOKENS].to(self._device))
            self.forward_seconds += self._now() - start

    def advance(
        self,
        observe: Observe | None = None,
        observe_heads: Observe | None = None,
        *,
        on_batch: Callable[[int], None] | None = None,
    ) -> None:
        """Run the next layer on every batch and replace `hidden` by its outputs.

        Parameters
        ----------
        observe
            Receives the input of the MLP's output projection, [valid tokens, neurons].
        observe_heads
            Receives the input of the attention's output projection, [valid tokens, heads * size].
        on_batch
            Called after each batch with its number of valid tokens.
        """
        for index in range(len(self.hidden)):
            self.hidden[index] = self.run(index, observe, observe_heads)
            if on_batch is not None:
                on_batch(int(self._valid[index].sum()))
        self.next_layer += 1

    def run(
        self, index: int, observe: Observe | None = None, observe_heads: Observe | None = None
    ) -> Tensor:
        """Return the output of the next layer for batch `index`, [blocks, length, d], without changing `hidden`."""
        observer_seconds = 0.0

        def watching(observer: Observe) -> Callable[[Tensor], None]:
            def watch(x: Tensor) -> None:
                nonlocal observer_seconds
                start = self._now()
                valid = self._valid[index].flatten().to(x.device)
                observer(index, x.flatten(0, -2)[valid])
                observer_seconds += self._now() - start

            return watch

        handles = []
        if observe is not None:
            handles.append(self._adapter.watch_neurons(self.next_layer, watching(observe)))
        if observe_heads is not None:
            out = self._adapter.attention_output(self.next_layer)
            watch = watching(observe_heads)
            handles.append(out.register_forward_pre_hook(lambda module, args: watch(args[0])))
        start = self._now()
        try:
            with torch.inference_mode():
                output = self.through(self.next_layer, self.hidden[index], index)
        finally:
            for handle in handles:
                handle.remove()
        self.forward_seconds += self._now() - start - observer_seconds
        return output

    @torch.inference_mode()
    def output_scale(self) -> float | None:
        """Return c if the next layer adds c times its MLP's output to the hidden state, else None.

        Some architectures normalise the output before they add it; without batches, the answer is None too. The answer
        comes from a probe: the layer runs on a few tokens, without and with a vector added to the MLP's output.
        """
        if not len(self.hidden):
            return None
        hidden = self.hidden[0][:1, :PROBE_TOKENS]

        def output() -> Tensor:
            # The probe's calls were recorded last.
            return self.through(self.next_layer, hidden, -1).float()

        plain = output()
        generator = torch.Generator().manual_seed(0)
        added = (
            torch.randn(plain.shape[-1], generator=generator).to(plain)
            * plain.square().mean().sqrt()
        )
        module = self._adapter.output_module(self.next_layer)
        handle = module.register_forward_hook(lambda module, args, out: out + added.to(out))
        try:
            change = output() - plain
        finally:
            handle.remove()
        scale = float((change @ added).mean() / (added @ added))
        same = (change - scale * added).norm() <= SAME_DIRECTION * change.norm()
        return scale if bool(same) and scale != 0 else None

    def run_with_gradients(self, index: int) -> Tensor:
        """Return the same output as :meth:`run`, with gradients for those of the layer's weights that require them."""
        hidden = self.hidden[index].clone()  # autograd rejects tensors made in inference mode
        return self.through(self.next_layer, hidden, index)

    def through(self, layer: int, hidden: Tensor, index: int) -> Tensor:
        """Return what a layer makes of hidden states of batch `index`, without changing `hidden`."""
        modules, calls = self._groups[layer], self._calls[index][layer]
        for module, call in zip(modules, calls, strict=True):
            output = module(hidden, *call.args, **call.kwargs)
            hidden = output[0] if isinstance(output, tuple) else output
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [blocks, length, vocabulary] for outputs of the last layer, [blocks, length, d]."""
        output = self._calling.output(hidden)
        with _forward_replaced(self._layers, lambda *args, **kwargs: output):
            return self._model(**self._nothing(hidden), use_cache=False).logits

    def _nothing(self, hidden: Tensor) -> dict[str, Tensor]:
        """Return an input of the right shape for a forward pass in which no layer reads it."""
        if self._calling.needs_ids:
            return {
                "input_ids": torch.zeros(hidden.shape[:2], dtype=torch.int64, device=self._device)
            }
        size = int(self._model.get_input_embeddings().weight.shape[1])  # type: ignore[index]
        return {"inputs_embeds": hidden.new_zeros(*hidden.shape[:2], size)}

    def _now(self) -> float:
        for device in self._devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return time.perf_counter()

    def _probe(self) -> Calling:
        """Find out what a layer returns, which the recorder must do too, and what the model must be given."""
        found: list[Any] = []
        handle = self._layers[0].register_forward_hook(
            lambda module, args, output: found.append(output)
        )
        try:
            ids = torch.zeros(1, 2, dtype=torch.int64, device=self._device)
            with _forward_replaced(self._layers[1:], lambda *args, **kwargs: found[0]):
                self._model.base_model(input_ids=ids, use_cache=False)
        finally:
            handle.remove()
        items = len(found[0]) if isinstance(found[0], tuple) else 0
        self._calling = Calling(items, needs_ids=False)
        hidden = found[0][0] if items else found[0]
        try:
            with _forward_replaced(self._layers, lambda *args, **kwargs: found[0]):
                self._model.base_model(**self._nothing(hidden), use_cache=False)
        except (
            RuntimeError,
            ValueError,
            TypeError,
        ):  # inputs of the layers are made from the tokens
            return Calling(items, needs_ids=True)
        return self._calling

    def _embed(self, input_ids: Tensor) -> Tensor:
        entered: list[Tensor] = []
        calls: list[_LayerCall] = []

        def record(*args: Any, **kwargs: Any) -> Any:
            kwargs = dict(kwargs)
            if args:
                hidden, args = args[0], args[1:]
            else:
                hidden = kwargs.pop("hidden_states")
            entered.append(hidden)
            calls.append(_LayerCall(args, kwargs))
            return self._calling.output(hidden)

        with _forward_replaced(self._layers, record):
            self._model.base_model(input_ids=input_ids, use_cache=False)
        calls = _told_apart(calls, self._first_calls.setdefault(input_ids.shape, calls))
        ordered = iter(calls)
        self._calls.append([tuple(next(ordered) for _ in group) for group in self._groups])
        return entered[0]


def _told_apart(calls: list[_LayerCall], first: list[_LayerCall]) -> list[_LayerCall]:
    """Return a batch's calls with the tensors of the first batch of its shape wherever they are equal.

    Masks and positions are the same for all batches of a shape and need memory once. What depends on the tokens, such
    as inputs of the layers beside the hidden states, and what layers write into stay the batch's own.
    """
    known: dict[tuple[int, int], Any] = {}

    def one(value: Any, before: Any) -> Any:
        if value is before or type(value) is not type(before):
            return value
        if isinstance(value, tuple) and len(value) == len(before):
            return tuple(map(one, value, before))
        if not isinstance(value, Tensor):
            return value
        key = (id(value), id(before))
        if key not in known:
            equal = value.shape == before.shape and torch.equal(value, before)
            known[key] = before if equal else value
        return known[key]

    if calls is first:
        return calls
    return [
        _LayerCall(
            one(call.args, before.args),
            {key: one(value, before.kwargs.get(key)) for key, value in call.kwargs.items()},
        )
        for call, before in zip(calls, first, strict=True)
    ]


def check_runs(adapter: ModelAdapter, path: Path) -> None:
    """Run the first layer on two tokens, because some configs build a model that cannot compute.

    Parameters
    ----------
    path
        The checkpoint, for the message.

    Raises
    ------
    InvalidInput
        The model raises an error.
    """
    with building(path, "run"):
        LayerwiseForward(adapter, [])  # asks the layer what it returns


@contextmanager
def _forward_replaced(layers: Iterable[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    layers = list(layers)
    before = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = forward
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            del layer.forward
            if own is not None:
                layer.forward = own
