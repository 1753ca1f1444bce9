"""The perplexities that a run measures."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fbn_prune.data.calibration import Batch
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.perplexity import NonFiniteLogits, perplexity
from fbn_prune.progress import StageClock
from fbn_prune.runs.opening import OpenRun
from fbn_prune.runs.stages import measuring_dense


def _perplexity(
    adapter: ModelAdapter, batches: Sequence[Batch], clock: StageClock, stage: str
) -> float:
    with clock.stage(stage, sum(batch.tokens for batch in batches), "tokens") as advance:
        return perplexity(adapter, batches, advance)


def dense_perplexity(on: OpenRun, batches: Sequence[Batch]) -> float:
    """Return the dense model's perplexity."""
    with measuring_dense(on, batches):
        return _perplexity(on.adapter, batches, on.clock, "dense perplexity")


def pruned_perplexity(
    adapter: ModelAdapter, batches: Sequence[Batch], clock: StageClock
) -> float | None:
    """Return a cut model's perplexity; None if it is not finite."""
    try:
        found = _perplexity(adapter, batches, clock, "pruned perplexity")
    except NonFiniteLogits:
        return None
    return found if math.isfinite(found) else None


def perplexity_on_task(on: OpenRun) -> float | None:
    """Return the perplexity of the task's test questions; None without any."""
    if on.task is None or on.task.test is None:
        return None
    batches = on.task.test.batches(on.prepared.batch_tokens)
    return _perplexity(on.adapter, batches, on.clock, "task perplexity")
