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
    """A model computes NaN or Inf."""


def mean_loss(
    adapter: ModelAdapter,
    batches: Sequence[Batch],
    on_batch: Callable[[int], None] | None = None,
) -> float:
    """Mean next-token loss in nats over all valid tokens of all blocks but each block's first."""
    total, count = summed_loss(adapter, batches, on_batch)
    return total / count


@torch.inference_mode()
def token_losses(adapter: ModelAdapter, batches: Sequence[Batch]) -> Tensor:
    """Next-token loss in nats of every token that :func:`mean_loss` is the mean of, float64 [tokens]."""
    losses: list[Tensor] = []
    for logits, targets in _predictions(adapter, batches, lambda tokens: None):
        targets = targets.flatten()
        loss = cross_entropy(logits.flatten(0, 1).float(), targets, reduction="none")
        losses.append(loss[targets != -100].double().cpu())
    return torch.cat(losses)


@torch.inference_mode()
def summed_loss(
    adapter: ModelAdapter,
    batches: Sequence[Batch],
    on_batch: Callable[[int], None] | None = None,
) -> tuple[float, int]:
    """Next-token loss in nats, summed over the tokens that :func:`mean_loss` is the mean of, and their number.

    Raises
    ------
    NonFiniteLogits
        A logit is NaN or Inf.
    """
    total, count = 0.0, 0
    for logits, targets in _predictions(
        adapter, distributed.share(batches), on_batch or (lambda tokens: None)
    ):
        finite = torch.isfinite(logits).all(dim=-1)
        if not bool((finite | (targets == -100)).all()):
            raise NonFiniteLogits("the model gives NaN or Inf as logits")
        loss = cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum"
        )
        total += float(loss)
        count += int((targets != -100).sum())
    total, tokens = distributed.total(total, count)
    return total, int(tokens)


def _predictions(
    adapter: ModelAdapter, batches: Sequence[Batch], on_batch: Callable[[int], None]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits [blocks, length - 1, vocabulary] and what they should predict [blocks, length - 1], -100 for nothing."""
    for logits, ids, valid in adapter.logits(batches, on_batch):
        yield logits[:, :-1], ids[:, 1:].masked_fill(~valid[:, 1:].to(ids.device), -100)


def perplexity(
    adapter: ModelAdapter,
    batches: Sequence[Batch],
    on_batch: Callable[[int], None] | None = None,
) -> float:
    """exp of :func:`mean_loss`; infinite where that overflows."""
    return exp_or_infinite(mean_loss(adapter, batches, on_batch))


def exp_or_infinite(loss: float) -> float:
    """exp of a mean loss; infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
