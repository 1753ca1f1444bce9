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
        self._adapter, self._model, self._layers = adapter, adapter.model, adapter.layers
        self._device = adapter.device
        self._devices = {adapter.layer_device(layer) for layer in range(adapter.num_layers)}
        self._devices.add(self._device)
        self._valid = [batch.valid.to(self._device) for batch in batches]
        self._calls: dict[torch.Size, list[_LayerCall]] = {}
        self._shapes = [batch.input_ids.shape for batch in batches]
        self.next_layer = 0
        self.forward_seconds = 0.0
        with torch.inference_mode():
            if adapter.returns_tuple is None:  # cached: a streamed model must read a layer for it
                adapter.returns_tuple = self._probe()
            self._returns_tuple = adapter.returns_tuple
            start = self._now()
            self.hidden = adapter.hidden_states()
            for batch in batches:
                self.hidden.append(self._embed(batch.input_ids.to(self._device)))
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
        call = self._calls[self._shapes[index]][self.next_layer]
        observer_seconds = 0.0

        def hook(observer: Observe) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def watch(module: nn.Module, args: tuple[Any, ...]) -> None:
                nonlocal observer_seconds
                start = self._now()
                valid = self._valid[index].flatten().to(args[0].device)
                observer(index, args[0].flatten(0, -2)[valid])
                observer_seconds += self._now() - start

            return watch

        handles = []
        if observe is not None:
            down = self._adapter.output_module(self.next_layer)
            handles.append(down.register_forward_pre_hook(hook(observe)))
        if observe_heads is not None:
            out = self._adapter.attention_output(self.next_layer)
            handles.append(out.register_forward_pre_hook(hook(observe_heads)))
        start = self._now()
        try:
            with torch.inference_mode():
                output = self._layers[self.next_layer](
                    self.hidden[index], *call.args, **call.kwargs
                )
        finally:
            for handle in handles:
                handle.remove()
        self.forward_seconds += self._now() - start - observer_seconds
        return output[0] if isinstance(output, tuple) else output

    def run_with_gradients(self, index: int) -> Tensor:
        """Return the same output as :meth:`run`, with gradients for those of the layer's weights that require them."""
        call = self._calls[self._shapes[index]][self.next_layer]
        hidden = self.hidden[index].clone()  # autograd rejects tensors made in inference mode
        output = self._layers[self.next_layer](hidden, *call.args, **call.kwargs)
        return output[0] if isinstance(output, tuple) else output

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [blocks, length, vocabulary] for outputs of the last layer, [blocks, length, d]."""
        size = int(self._model.get_input_embeddings().weight.shape[1])  # type: ignore[index]
        embedded = hidden.new_zeros(*hidden.shape[:2], size)
        output = (hidden,) if self._returns_tuple else hidden
        with _forward_replaced(self._layers, lambda *args, **kwargs: output):
            return self._model(inputs_embeds=embedded, use_cache=False).logits

    def _now(self) -> float:
        for device in self._devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return time.perf_counter()

    def _probe(self) -> bool:
        """Whether a layer returns a tuple; the recorder must do the same."""
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
        return isinstance(found[0], tuple)

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
            return (hidden,) if self._returns_tuple else hidden

        with _forward_replaced(self._layers, record):
            self._model.base_model(input_ids=input_ids, use_cache=False)
        self._calls.setdefault(input_ids.shape, calls)
        return entered[0]


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
