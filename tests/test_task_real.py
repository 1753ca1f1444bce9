"""Claims about the cuts of `eval/quality/task_real.py`: solved over tokens they are those solved over neurons."""

from __future__ import annotations

import pytest
import task_real
import torch

from fbn_prune.pruning.damping import refit_share

WIDTH = 24


@pytest.mark.filterwarnings("ignore::fbn_prune.pruning.damping.DampingWarning")
@pytest.mark.parametrize("tokens", [10, 40])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("massive", [1.0, 3e3])
def test_cuts_are_the_cheapest_neurons_and_the_damped_refit(
    tokens: int, known: bool, massive: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, WIDTH, generator=generator) @ torch.randn(
        WIDTH, WIDTH, generator=generator
    )
    x[:, 3] *= massive
    weight, rows = (
        torch.randn(5, WIDTH, generator=generator),
        torch.rand(tokens, generator=generator),
    )
    found = task_real.cuts_of_layer(x, rows, weight, [0.5, 0.25], x @ x.T if known else None)
    scaled, w = x.double() * (rows / rows.sum()).sqrt()[:, None], weight.double()
    gram = scaled.T @ scaled
    others = torch.arange(WIDTH) != (3 if massive > 1 else -1)
    mean, eye = gram.diagonal()[others].mean(), torch.eye(WIDTH).double()
    costs = w.square().sum(0) / torch.linalg.inv(gram + 1e-2 * mean * eye).diagonal()
    damped = gram + refit_share(1e-3, tokens, WIDTH) * mean * eye
    for keep, cut in found.items():
        kept = costs.topk(round(keep * WIDTH)).indices.sort().values
        assert torch.equal(cut.kept, kept)
        expected = w @ damped[:, kept] @ torch.linalg.inv(damped[kept][:, kept])
        torch.testing.assert_close(cut.down_weight.double(), expected, rtol=1e-3, atol=1e-3)
