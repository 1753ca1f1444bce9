"""The scripts' training in bfloat16 adds up steps that a single rounding would lose."""

from __future__ import annotations

import protocol
import torch


def test_small_steps_add_up_in_bfloat16() -> None:
    live = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    weights = protocol.ExactWeights([live])
    optimizer = torch.optim.SGD(weights.exact, lr=1e-4)
    for _ in range(100):
        live.sum().backward()
        weights.step(optimizer)
    assert live.grad is None
    torch.testing.assert_close(live.detach().float(), torch.full((3,), 0.99), atol=4e-3, rtol=0)
