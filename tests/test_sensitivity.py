"""Claims about the loss gradients at the MLP outputs: they predict what a change there does to the loss."""

from __future__ import annotations

import pytest
import torch
from small_runs import blocks
from tiny_models import CONTEXT, HIDDEN, LAYERS, PATHS, logits, make_model

from fbn_prune.data.calibration import TokenBlocks
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.progress import StageClock
from fbn_prune.pruning.sensitivity import output_sensitivity


@pytest.mark.parametrize("name", [*PATHS, "falcon"])
def test_it_is_the_gradient_of_the_loss_by_the_mlp_output(name: str) -> None:
    """Of two tokens only the first one's output can matter: F is the outer product of its gradient, halved."""
    model = make_model(name)
    adapter = ModelAdapter(model)
    ids = torch.tensor([[17, 42]])
    batches = TokenBlocks((ids[0],), CONTEXT, ("x",)).batches(10)
    found = output_sensitivity(adapter, batches, StageClock())
    for layer in range(LAYERS):
        shift = torch.zeros(HIDDEN, requires_grad=True)

        def add(
            module: object, args: object, out: torch.Tensor, shift: torch.Tensor = shift
        ) -> torch.Tensor:
            rows = out.clone()
            rows[..., 0, :] += shift
            return rows

        handle = adapter.output_module(layer).register_forward_hook(add)
        logits = model(ids, use_cache=False).logits
        handle.remove()
        loss = torch.nn.functional.cross_entropy(logits[0, :1], ids[0, 1:])
        (gradient,) = torch.autograd.grad(loss, shift)
        expected = torch.outer(gradient, gradient).double() / 2
        torch.testing.assert_close(
            found[layer], expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max())
        )


def test_padding_and_batching_change_nothing() -> None:
    adapter = ModelAdapter(make_model("llama"))
    data = blocks(40, 9, 23)
    together = output_sensitivity(adapter, data.batches(1000), StageClock())
    apart = output_sensitivity(adapter, data.batches(1), StageClock())
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * float(a.max()))


def test_the_model_is_left_as_it_was() -> None:
    model = make_model("llama")
    adapter = ModelAdapter(model)
    before = logits(model)
    output_sensitivity(adapter, blocks(16).batches(16), StageClock())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(logits(model), before)
