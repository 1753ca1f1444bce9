"""Claims about running a model layer by layer: the same hidden states and activations as the whole forward pass."""

from __future__ import annotations

import pytest
import torch
from small_runs import blocks
from tiny_models import FAMILY_CONFIGS, PATHS, logits, make_model

from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.layerwise import LayerwiseForward
from fbn_prune.model.perplexity import mean_loss


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_layer_by_layer_equals_the_whole_forward_pass(name: str) -> None:
    model = make_model(name)
    adapter = ModelAdapter(model)
    data = blocks(20, 48, 48, 33)
    batches = data.batches(100)
    seen: dict[int, list[torch.Tensor]] = {}
    stream = LayerwiseForward(adapter, batches)
    layers = adapter.num_layers
    for layer in range(layers):
        seen[layer] = [torch.empty(0)] * len(batches)
        stream.advance(lambda index, x, layer=layer: seen[layer].__setitem__(index, x.clone()))
    expected: dict[int, torch.Tensor] = {}
    handles = [
        adapter.output_module(layer).register_forward_pre_hook(
            lambda module, args, layer=layer: expected.__setitem__(layer, args[0].flatten(0, -2))
        )
        for layer in range(layers)
    ]
    for index, batch in enumerate(batches):
        with torch.no_grad():
            model(input_ids=batch.input_ids, use_cache=False)
        for layer in range(layers):
            valid = expected[layer][batch.valid.flatten()]
            assert torch.allclose(seen[layer][index], valid, atol=1e-5), (index, layer)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", [*PATHS, "falcon"])
def test_padding_changes_nothing(name: str) -> None:
    adapter = ModelAdapter(make_model(name))
    data = blocks(40, 9, 23)
    together = mean_loss(adapter, data.batches(1000))
    apart = mean_loss(adapter, data.batches(1))
    assert together == pytest.approx(apart, rel=1e-5)


def test_the_model_is_left_as_it_was_even_after_an_error() -> None:
    model = make_model("llama")
    adapter = ModelAdapter(model)
    before = logits(model)
    stream = LayerwiseForward(adapter, blocks(16).batches(16))

    def fail(index: int, x: torch.Tensor) -> None:
        raise RuntimeError("observer")

    with pytest.raises(RuntimeError, match="observer"):
        stream.advance(fail)
    assert all("forward" not in layer.__dict__ for layer in adapter.layers)
    assert torch.equal(logits(model), before)


def test_the_time_of_observers_is_not_counted_as_the_models() -> None:
    import time

    stream = LayerwiseForward(ModelAdapter(make_model("llama")), blocks(16).batches(16))
    start = time.perf_counter()
    stream.advance(lambda index, x: time.sleep(0.2))
    assert stream.forward_seconds < time.perf_counter() - start - 0.15
