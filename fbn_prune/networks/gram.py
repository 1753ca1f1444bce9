"""Gram matrices: compute only the upper block triangle, with the fastest matrix products that are precise enough.

On CPUs, float32 products may round their inputs to bfloat16 (sums and result stay float32). The result is the exact
Gram matrix of data with a random relative change of one in a thousand, which does not move the leading eigenvectors
of a Gram matrix over many tokens. On processors without bfloat16 instructions, the same setting selects oneDNN's
float32 product, which is on some processors twice as fast as the default one. A least-squares refit is more sensitive
(equal runs would differ with the batch size), so :func:`add_gram` stays in full float32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

GRAM_BLOCK = 256
"""Columns of a Gram matrix computed at a time: wide enough for a full-speed product, narrow enough that skipping the
mirrored half saves most of its cost."""


@contextmanager
def fast_products() -> Iterator[None]:
    """Let float32 matrix products on the CPU round their inputs to bfloat16 inside the context."""
    setting = getattr(torch.backends.mkldnn, "matmul", None)
    if setting is None:  # before 2.9, torch has only one switch for all devices
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
    """Use the fastest CPU matrix products that stay in float32 throughout; also works as a decorator.

    This is oneDNN's product if :func:`fast_products` would not round on this processor, and the default one
    otherwise.
    """
    if _rounds_inputs():
        yield
        return
    with fast_products():
        yield


@functools.cache
def _rounds_inputs() -> bool:
    """Whether :func:`fast_products` rounds on this machine; found by a trial product, because no flag tells."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 256, 256, generator=generator)
    with fast_products():
        product = left @ right
    exact = left.double() @ right.double()
    return float((product - exact).norm() / exact.norm()) > 1e-5


def add_gram(gram: Tensor, x: Tensor, block: int = GRAM_BLOCK) -> None:
    """Add the upper block triangle of ``x.T @ x`` to `gram` in place; :func:`mirror_upper` fills in the rest.

    Parameters
    ----------
    gram
        [n, n]. In float64, the sum over many batches hardly depends on their order.
    x
        float32 [tokens, n]; the products are float32.
    """
    width = gram.shape[0]
    for start in range(0, width, block):
        stop = min(start + block, width)
        gram[start:stop, start:] += x[:, start:stop].T @ x[:, start:]


def add_cross(cross: Tensor, target: Tensor, x: Tensor, block: int = GRAM_BLOCK) -> None:
    """Add ``target.T @ x`` to `cross` [outputs, n] in place, block by block as :func:`add_gram` does."""
    for start in range(0, cross.shape[0], block):
        cross[start : start + block] += target[:, start : start + block].T @ x


def mirror_upper(gram: Tensor, block: int = GRAM_BLOCK) -> Tensor:
    """Return a symmetric matrix made from the upper block triangle of `gram` [n, n]."""
    whole = gram.clone()
    for start in range(0, gram.shape[0], block):
        span = slice(start, start + block)
        whole[span, :start] = whole[:start, span].T
        whole[span, span] = torch.triu(gram[span, span]) + torch.triu(gram[span, span], 1).T
    return whole
