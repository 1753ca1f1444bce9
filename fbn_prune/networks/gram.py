"""Gram matrices: only the upper block triangle is computed, and where rounding does no harm, at the highest speed.

On CPUs float32 products can be allowed to round their inputs to bfloat16 (sums and result stay float32): that is the
exact Gram of data changed by one part in a thousand at random, which does not move the leading eigenvectors of the
Gram of many tokens. Where the processor has no such instructions, the same setting selects oneDNN's float32 product,
on some processors twice as fast as the default one. A least-squares refit is not as forgiving (equal runs would differ
with the batch size), so :func:`add_gram` stays in full float32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

GRAM_BLOCK = 256
"""Columns of a Gram computed at a time: wide enough for a full-speed product, narrow enough that skipping the
mirrored half saves most of that half."""


@contextmanager
def fast_products() -> Iterator[None]:
    """Let float32 matrix products on the CPU round their inputs to bfloat16 inside the context."""
    setting = getattr(torch.backends.mkldnn, "matmul", None)
    if (
        setting is None
    ):  # torch before 2.9 has one switch for all devices, which is not ours to flip
        yield
        return
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


@contextmanager
def quick_products() -> Iterator[None]:
    """Take the fastest float32 matrix products of the CPU that are float32 throughout; also a decorator.

    Where the processor would not round under :func:`fast_products`, that is oneDNN's; else the default one.
    """
    if _rounds_inputs():
        yield
        return
    with fast_products():
        yield


@functools.cache
def _rounds_inputs() -> bool:
    """Whether :func:`fast_products` does round on this machine: asked of a product, for no flag tells it."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 256, 256, generator=generator)
    with fast_products():
        product = left @ right
    exact = left.double() @ right.double()
    return float((product - exact).norm() / exact.norm()) > 1e-5


def add_gram(gram: Tensor, x: Tensor, block: int = GRAM_BLOCK) -> None:
    """Add the upper block triangle of ``x.T @ x`` to `gram` [n, n] in place (see :func:`mirror_upper`).

    The product is x's type, float32; a `gram` of float64 makes the sum over many x all but independent of their order.
    """
    width = gram.shape[0]
    for start in range(0, width, block):
        stop = min(start + block, width)
        gram[start:stop, start:] += x[:, start:stop].T @ x[:, start:]


def add_cross(cross: Tensor, target: Tensor, x: Tensor, block: int = GRAM_BLOCK) -> None:
    """Add ``target.T @ x`` to `cross` [n, n] in place, likewise."""
    for start in range(0, cross.shape[0], block):
        cross[start : start + block] += target[:, start : start + block].T @ x


def mirror_upper(gram: Tensor, block: int = GRAM_BLOCK) -> Tensor:
    """A symmetric copy of `gram` [n, n], of which the upper block triangle counts."""
    whole = gram.clone()
    for start in range(0, gram.shape[0], block):
        here = slice(start, start + block)
        whole[here, :start] = whole[:start, here].T
        whole[here, here] = torch.triu(gram[here, here]) + torch.triu(gram[here, here], 1).T
    return whole
