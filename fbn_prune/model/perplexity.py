"""Token-level perplexity of a causal LM on token blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fbn_prune import distributed
from fbn_prune.data.calibration import Batch
from fbn_prune.errors import FbnPruneError
from fbn_prune.model.adapter import ModelAdapter


class NonFiniteLogits(FbnPruneError):
    """A model's logits contain NaN or Inf."""


def mean_loss(
    adapter: ModelAdapter, batches: Sequence[Batch], on_batch: Callable[[int], None] | None = None
) -> float:
    """Return the mean next-token loss in nats over all valid tokens except each block's first."""
    total, count = summed_loss(adapter, batches, on_batch)
    return total / count


@torch.inference_mode()
def token_losses(
    adapter: ModelAdapter, batches: Sequence[Batch], on_batch: Callable[[int], None] | None = None
) -> Tensor:
    """Return the next-token loss in nats of each token that :func:`mean_loss` averages, float64 [tokens]."""
    losses: list[Tensor] = []
    for logits, targets in _predictions(adapter, batches, on_batch or (lambda tokens: None)):
        targets = targets.flatten()
        loss = cross_entropy(logits.flatten(0, 1).float(), targets, reduction="none")
        losses.append(loss[targets != -100].double().cpu())
    return torch.cat(losses)


@torch.inference_mode()
def summed_loss(
    adapter: ModelAdapter, batches: Sequence[Batch], on_batch: Callable[[int], None] | None = None
) -> tuple[float, int]:
    """Return the sum of the next-token losses in nats that :func:`mean_loss` averages, and their number.

    With several processes, each computes its share of the batches and all return the totals.

    Raises
    ------
    NonFiniteLogits
        A logit is NaN or Inf.
    """
    total, count = 0.0, 0
    for logits, targets in _predictions(
        adapter, distributed.share(batches), on_batch or (lambda tokens: None)
    ):
        loss, tokens = _sum(logits, targets)
        total, count = total + loss, count + tokens
    total, summed = distributed.total(total, count)
    return total, int(summed)


def loss_of_blocks(logits: Tensor, ids: Tensor, valid: Tensor) -> tuple[float, int]:
    """Return what :func:`summed_loss` does, for logits [blocks, length, vocabulary] of ids [blocks, length]."""
    return _sum(*_shifted(logits, ids, valid))


def _sum(logits: Tensor, targets: Tensor) -> tuple[float, int]:
    finite = torch.isfinite(logits).all(dim=-1)
    if not bool((finite | (targets == -100)).all()):
        raise NonFiniteLogits("the model's logits contain NaN or Inf")
    loss = cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum"
    )
    return float(loss), int((targets != -100).sum())


def _predictions(
    adapter: ModelAdapter, batches: Sequence[Batch], on_batch: Callable[[int], None]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield logits [blocks, length - 1, vocabulary] and target ids [blocks, length - 1], -100 for padding."""
    for logits, ids, valid in adapter.logits(batches, on_batch):
        yield _shifted(logits, ids, valid)


def _shifted(logits: Tensor, ids: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    targets = ids[:, 1:].to(logits.device)
    return logits[:, :-1], targets.masked_fill(~valid[:, 1:].to(logits.device), -100)


def perplexity(
    adapter: ModelAdapter, batches: Sequence[Batch], on_batch: Callable[[int], None] | None = None
) -> float:
    """Return exp of :func:`mean_loss`, or infinity on overflow."""
    return exp_or_infinite(mean_loss(adapter, batches, on_batch))


def exp_or_infinite(loss: float) -> float:
    """Return exp of a mean loss, or infinity on overflow."""
    return math.exp(loss) if loss < 700 else math.inf
