"""What a cut should cost, from the statistics it was made on; the measured loss is held against it.

A layer's relative error is the share of its MLP output's mean square that the cut MLP misses on the calibration text,
and a third of the same share of its attention's output. The loss on held-out text rises by about the sum of these over
the layers: of 114 cuts of four models, by five criteria to five widths and of heads, one lies outside the range below
(`eval/quality/predicted_rise.py`). To lie outside is no proof of a fault, but it is always said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fbn_prune.errors import FbnPruneError
from fbn_prune.model.heads import HeadCut
from fbn_prune.model.surgery import MlpCut
from fbn_prune.pruning.criteria import HeadEvidence, LayerEvidence, OutputEvidence
from fbn_prune.pruning.second_order import output_error

MOST_RISE = 4.0
"""Nats for each unit of summed relative error."""

HEAD_WEIGHT = 1 / 3
"""How much of an attention's relative error counts: it costs a quarter of what an MLP's does at most."""

SLACK = 0.1
"""Nats by which held-out text may differ from calibration text beside that, up or down."""


@dataclass(frozen=True)
class PredictedRise:
    """The range in which the loss rise should be found, in nats a token."""

    least: float
    most: float

    def perplexity(self, before: float) -> tuple[float, float]:
        """The same as perplexities, the dense model's being `before`."""
        return before * math.exp(self.least), before * math.exp(min(self.most, 600.0))


def relative_error(evidence: LayerEvidence, cut: MlpCut) -> float:
    """E||y - y'||² / E||y||² of the outputs y and y' of a layer's MLP before and after, without its bias in y."""
    return _relative(evidence, cut.kept, cut.down_weight, cut.down_bias)


def relative_head_error(evidence: HeadEvidence, cut: HeadCut) -> float:
    """The same of a layer's attention."""
    inner = torch.arange(evidence.group)
    channels = (cut.kept[:, None] * evidence.group + inner).flatten()
    return _relative(evidence, channels, cut.out_weight, cut.out_bias)


def _relative(
    evidence: OutputEvidence, kept: Tensor, new_weight: Tensor, new_bias: Tensor | None
) -> float:
    weight, gram, mean = evidence.weight, evidence.gram, evidence.mean
    kept, new_weight = kept.to(weight.device), new_weight.to(weight)
    lost = output_error(weight, gram, kept, new_weight)
    if new_bias is not None:
        shift = -new_bias.to(weight)
        if evidence.bias is not None:
            shift = shift + evidence.bias
        mean_error = weight @ mean - new_weight @ mean[kept]
        lost += float(2 * shift @ mean_error + shift @ shift)
    energy = float(((weight @ gram) * weight).sum())
    return max(lost, 0.0) / energy if energy > 0 else 0.0


def predicted_rise(errors: Sequence[float]) -> PredictedRise:
    """The range for a model whose layers have these relative errors."""
    return PredictedRise(-SLACK, MOST_RISE * sum(errors) + SLACK)


def check_rise(
    before: float, after: float, predicted: PredictedRise, vocabulary: int
) -> str | None:
    """Hold the perplexities before and after against the prediction.

    Returns
    -------
    A sentence where the measured rise lies outside the range, else None.

    Raises
    ------
    FbnPruneError
        It lies outside, and the pruned model is worse than guessing.
    """
    rise = math.log(after / before)
    if predicted.least <= rise <= predicted.most:
        return None
    low, high = predicted.perplexity(before)
    told = (
        f"the pruned model's perplexity is {after:.4g}, where the statistics of the cut lead to expect {low:.4g} to "
        f"{high:.4g} (dense: {before:.4g})"
    )
    if rise > predicted.most and after > vocabulary > before:
        raise FbnPruneError(
            f"{told}, and guessing among {vocabulary} tokens would be better: nothing was written; raise --tokens, "
            "calibrate on text like what is held out, or compute in --dtype float32"
        )
    if rise < predicted.least:
        return f"{told}: better than before; the held-out text may be too short to tell"
    return f"{told}: calibrate on more text (--tokens), or on text more like the held-out share"
