"""Token-level perplexity of a causal LM on token blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from fbn_prune.calibration import Batch


def mean_loss(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    on_batch: Callable[[int], None] | None = None,
) -> float:
    """Mean next-token loss in nats over all valid tokens of all blocks but each block's first."""
    total, count = summed_loss(model, batches, on_batch)
    return total / count


@torch.inference_mode()
def summed_loss(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    on_batch: Callable[[int], None] | None = None,
) -> tuple[float, int]:
    """Next-token loss in nats, summed over the tokens that :func:`mean_loss` is the mean of, and their number."""
    device = model.device
    total, count = 0.0, 0
    for batch in batches:
        ids = batch.input_ids.to(device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        targets = ids[:, 1:].masked_fill(~batch.valid[:, 1:].to(device), -100)
        loss = cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum"
        )
        total += float(loss)
        count += int((targets != -100).sum())
        if on_batch is not None:
            on_batch(batch.tokens)
    return total, count


def perplexity(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    on_batch: Callable[[int], None] | None = None,
) -> float:
    """exp of :func:`mean_loss`; infinite where that overflows."""
    return exp_or_infinite(mean_loss(model, batches, on_batch))


def exp_or_infinite(loss: float) -> float:
    """exp of a mean loss; infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
