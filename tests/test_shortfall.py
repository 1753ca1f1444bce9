"""What a layer's output lacks in sequential mode, and the shares of it that the refit makes up for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CONTEXT, PATHS, make_model

from fbn_prune.data.calibration import Batch, TokenBlocks
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.layerwise import LayerwiseForward
from fbn_prune.pruning.output_sums import ASIDE_TOKENS, tokens_set_aside
from fbn_prune.pruning.second_order import refit
from fbn_prune.pruning.shortfall import USUAL_SHARE, SetAside, Shortfall, best_shares

TOKENS, NEURONS, OUTPUTS = 600, 10, 4


def lacking(noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W, x, and two parts that the output lacks: one that x tells, and one of pure noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, NEURONS, generator=generator, dtype=torch.float64)
    weight = torch.randn(OUTPUTS, NEURONS, generator=generator, dtype=torch.float64)
    told = x @ torch.randn(NEURONS, OUTPUTS, generator=generator, dtype=torch.float64)
    random = noise * torch.randn(TOKENS, OUTPUTS, generator=generator, dtype=torch.float64)
    return weight, x, torch.stack([told, random])


def shortfall_of(x: torch.Tensor, parts: torch.Tensor, aside: int) -> Shortfall:
    weights = torch.ones(aside, dtype=torch.float64)
    few = SetAside(x[:aside].float(), parts[:, :aside].float(), weights)
    cross = torch.stack([part.T @ x / len(x) for part in parts])
    return Shortfall(cross, parts.mean(1), few if aside else None)


def shares_of(weight: torch.Tensor, x: torch.Tensor, shortfall: Shortfall) -> torch.Tensor:
    every = torch.arange(NEURONS)
    gram = x.T @ x / len(x)
    return best_shares(weight, gram, shortfall, every, mean=None, tokens=len(x), damping=1e-9)


def test_a_part_that_the_activations_tell_is_made_up_for_and_noise_is_not() -> None:
    weight, x, parts = lacking(noise=20.0)
    told, random = shares_of(weight, x, shortfall_of(x, parts, 200)).tolist()
    assert told > 0.9
    assert random < 0.3


def test_without_noise_the_refit_reaches_the_wanted_output() -> None:
    weight, x, parts = lacking(noise=0.0)
    found = shortfall_of(x, parts, 200)
    missing = torch.einsum("p,pdn->dn", shares_of(weight, x, found), found.cross)
    new = refit(weight, x.T @ x / TOKENS, torch.arange(NEURONS), damping=1e-9, missing=missing)
    torch.testing.assert_close(x @ new.T, x @ weight.T + parts[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kept", [NEURONS, 6])
def test_the_shares_do_not_depend_on_how_they_are_solved_for(kept: int) -> None:
    """Few set-aside tokens are solved for themselves, many by the outputs: repeated, few are many."""
    weight, x, parts = lacking(noise=5.0)
    few = shortfall_of(x, parts, 8)
    assert few.aside is not None
    times = 4  # 32 tokens, for 3 times 4 outputs
    many = SetAside(
        few.aside.x.repeat(times, 1),
        few.aside.parts.repeat(1, times, 1),
        few.aside.weights.repeat(times) / times,
    )
    found = [
        best_shares(
            weight,
            x.T @ x / len(x),
            Shortfall(few.cross, few.mean, aside),
            torch.arange(kept),
            mean=None,
            tokens=len(x),
            damping=1e-3,
        )
        for aside in (few.aside, many)
    ]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@given(st.integers(0, 10**6), st.floats(0.1, 50))
@settings(max_examples=25, deadline=None)
def test_the_shares_are_the_best_in_their_bounds(seed: int, noise: float) -> None:
    """No other shares bring the fit on the other tokens nearer to the outputs that were set aside."""
    weight, x, parts = lacking(noise, seed)
    aside, every = 150, torch.arange(NEURONS)
    shares = shares_of(weight, x, shortfall_of(x, parts, aside))
    rest, others = x[aside:], parts[:, aside:]

    def error(shares: torch.Tensor) -> float:
        missing = torch.einsum("p,ptd->dt", shares, others) @ rest / len(rest)
        new = refit(weight, rest.T @ rest / len(rest), every, damping=1e-9, missing=missing)
        wanted = x[:aside] @ weight.T + parts[:, :aside].sum(0)
        return float((wanted - x[:aside] @ new.T).square().sum())

    best = error(shares)
    for first in (0.0, 0.25, 0.5, 0.75, 1.0):
        for second in (0.0, 0.25, 0.5, 0.75, 1.0):
            assert best <= error(torch.tensor([first, second]).double()) * (1 + 1e-5)


def test_a_weight_counts_like_repetition() -> None:
    weight, x, parts = lacking(noise=3.0)
    times = torch.randint(1, 4, (TOKENS,), generator=torch.Generator().manual_seed(5))
    repeated = x.repeat_interleave(times, 0)
    again = parts.repeat_interleave(times, 1)
    aside = int(times[:200].sum())
    plain = shares_of(weight, repeated, shortfall_of(repeated, again, aside))
    found = shortfall_of(repeated, again, aside)
    few = SetAside(x[:200].float(), parts[:, :200].float(), times[:200].double())
    torch.testing.assert_close(
        shares_of(weight, repeated, Shortfall(found.cross, found.mean, few)),
        plain,
        atol=1e-4,
        rtol=1e-4,
    )


def test_without_tokens_set_aside_the_usual_share_is_taken() -> None:
    weight, x, parts = lacking(noise=1.0)
    assert shares_of(weight, x, shortfall_of(x, parts, 0)).tolist() == [USUAL_SHARE, USUAL_SHARE]


def test_tokens_that_count_for_nothing_are_no_ground_for_a_fit() -> None:
    """Where the set-aside tokens have all the weight, the others tell nothing."""
    weight, x, parts = lacking(noise=1.0)
    found = shortfall_of(x[:200], parts[:, :200], 200)
    assert shares_of(weight, x[:200], found).tolist() == [USUAL_SHARE, USUAL_SHARE]


@pytest.mark.parametrize(
    ("lengths", "expected"), [([8], 0), ([8, 6], 6), ([8] * 8, 8), ([8] * 24, 24)]
)
def test_whole_blocks_are_set_aside(lengths: list[int], expected: int) -> None:
    blocks = TokenBlocks(tuple(torch.ones(n, dtype=torch.int64) for n in lengths), 8, ("x",))
    for size in (1, 30, 1000):
        rows = [r for r in tokens_set_aside(blocks.batches(size)) if r is not None]
        assert sum(int(one.sum()) for one in rows) == expected


def test_of_long_texts_no_more_is_set_aside_than_needed() -> None:
    batch = Batch(torch.ones(64, 1024, dtype=torch.int64), torch.ones(64, 1024, dtype=torch.bool))
    (rows,) = tokens_set_aside([batch])
    assert rows is not None
    assert int(rows.sum()) == ASIDE_TOKENS


@pytest.mark.parametrize("name", [*PATHS, "gemma2", "granite"])
def test_a_layer_that_adds_its_mlp_output_is_told_from_one_that_normalises_it(name: str) -> None:
    """Held against the difference that another MLP output really makes."""
    model = make_model(name)
    adapter = ModelAdapter(model)
    ids = torch.arange(2 * CONTEXT).view(2, CONTEXT) % 50
    stream = LayerwiseForward(adapter, [Batch(ids, torch.ones_like(ids, dtype=torch.bool))])
    scale = stream.output_scale()
    plain = stream.run(0)
    handle = adapter.output_module(0).register_forward_hook(lambda module, args, out: out * 2)
    seen: list[torch.Tensor] = []
    with handle:
        watched = adapter.output_module(0).register_forward_hook(
            lambda module, args, out: seen.append(out / 2)
        )
        with watched:
            doubled = stream.run(0)
    added = torch.allclose(doubled - plain, (scale or 1.0) * seen[0].view_as(plain), atol=1e-5)
    assert added == (scale is not None)
    if name == "gemma2":
        assert scale is None
    if name == "granite":
        assert scale == pytest.approx(model.config.residual_multiplier, rel=1e-4)
