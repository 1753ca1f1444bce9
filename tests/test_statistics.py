"""Claims about the streaming statistics."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fbn_prune.networks.gram import add_gram, mirror_upper
from fbn_prune.pruning.statistics import CrossStatistics, GramStatistics


@given(tokens=st.integers(1, 40), width=st.sampled_from([1, 7, 512, 1030]), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_the_gram_from_half_the_products_is_the_whole_gram(
    tokens: int, width: int, seed: int
) -> None:
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    gram = torch.zeros(width, width)
    add_gram(gram, x)
    assert torch.allclose(mirror_upper(gram), x.T @ x, atol=1e-4)


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_streaming_equals_one_batch(sizes: list[int], seed: int) -> None:
    x = torch.randn(sum(sizes), 5, generator=torch.Generator().manual_seed(seed))
    statistics = GramStatistics(5)
    for part in x.split(sizes):
        statistics.update(part)
    assert statistics.count == len(x)
    assert torch.allclose(statistics.gram, x.double().T @ x.double() / len(x), atol=1e-6)
    assert torch.allclose(statistics.mean, x.double().mean(0), atol=1e-6)


def test_the_order_of_the_batches_leaves_no_trace() -> None:
    """What several processes add up in another order than one."""
    x = 100 * torch.randn(4096, 6, generator=torch.Generator().manual_seed(0))
    batches = x.split(64)
    forwards, backwards = GramStatistics(6), GramStatistics(6)
    crossed, back = CrossStatistics(6, 6), CrossStatistics(6, 6)
    for one, other in zip(batches, reversed(batches), strict=True):
        forwards.update(one)
        crossed.update(one.flip(1), one)
        backwards.update(other)
        back.update(other.flip(1), other)
    torch.testing.assert_close(forwards.gram, backwards.gram, rtol=1e-14, atol=1e-9)
    torch.testing.assert_close(crossed.cross, back.cross, rtol=1e-14, atol=1e-9)
    assert torch.equal(forwards.gram, forwards.gram.T)


def test_a_nan_or_an_infinity_is_noticed() -> None:
    for bad in (float("nan"), float("inf")):
        x = torch.randn(6, 3)
        x[4, 1] = bad
        statistics = GramStatistics(3)
        statistics.update(x)
        assert not statistics.finite
