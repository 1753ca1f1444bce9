"""Predict the loss rise of a cut from its calibration statistics: as a warning, and as a check on the measured loss.

A layer's relative error is the part of its MLP output's mean square that the cut MLP misses on the calibration text,
plus a third of the same measure for its attention's output. The loss on held-out text rises by about the sum of these
over the layers. Of 114 cuts of four models (five criteria at five widths, and heads), one falls outside the predicted
range (`eval/quality/predicted_rise.py`). A rise outside the range does not prove a fault, but it is always reported.
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
"""Largest expected rise for each unit of summed relative error, in nats a token."""

HEAD_WEIGHT = 1 / 3
"""Weight of an attention's relative error, which costs at most a quarter as much as an MLP's."""

WORTH_A_WARNING = 1.5
"""From this many times the dense model's perplexity on, few people would use a model as it is."""

GOOD = 1.2
"""The multiple of the dense model's perplexity that a warning aims at."""

LEAST_POWER = 1.4
"""The loss rises with the share of removed neurons to this power at least: 1.4 on a model of 135 M parameters, 2 and
more on smaller ones. So an advice from it is rather too careful than too bold."""

SLACK = 0.1
"""Difference in loss between held-out and calibration text that the range allows in either direction, in nats a
token."""


@dataclass(frozen=True)
class PredictedRise:
    """The range of the expected loss rise, in nats a token."""

    least: float
    most: float

    def perplexity(self, before: float) -> tuple[float, float]:
        """Return the range as perplexities, where the dense model's perplexity is `before`."""
        return before * math.exp(self.least), before * math.exp(min(self.most, 600.0))


def relative_error(evidence: LayerEvidence, cut: MlpCut) -> float:
    """Return E||y - y'||² / E||y||² for the outputs y, y' of a layer's MLP before and after (no bias in E||y||²)."""
    return _relative(evidence, cut.kept, cut.down_weight, cut.down_bias)


@dataclass(frozen=True)
class RoughError:
    """The error of a cut MLP's output in float32, see :func:`rough_errors`.

    Attributes
    ----------
    weighted
        E||y - y'||² without changes of the bias; with a loss root R, E||R (y - y')||², the rise of the loss to second
        order.
    relative
        As :func:`relative_error`.
    """

    weighted: float
    relative: float


def rough_errors(evidence: LayerEvidence, cuts: Sequence[MlpCut]) -> list[RoughError]:
    """Return the errors of many cuts of a layer; those of nested cuts, each within the next wider one, take least."""
    weight, root, gram = evidence.weight, evidence.loss_root, evidence.gram.float()
    kept = [cut.kept.to(weight.device) for cut in cuts]
    down = [cut.down_weight.to(weight) for cut in cuts]
    lost = _squared_errors(weight, gram, kept, down)
    weighted = lost
    if root is not None:
        weighted = _squared_errors(root @ weight, gram, kept, [root @ each for each in down])
    rough = weight.float()
    energy = float(((rough @ gram) * rough).sum(dtype=torch.float64))
    outputs = weight @ evidence.mean
    found: list[RoughError] = []
    for index, cut in enumerate(cuts):
        mean_error = outputs - down[index] @ evidence.mean[kept[index]]
        whole = lost[index] + _shifted(evidence, mean_error, cut.down_bias)
        relative = max(whole, 0.0) / energy if energy > 0 else 0.0
        found.append(RoughError(weighted[index], relative))
    return found


def _squared_errors(
    weight: Tensor, gram: Tensor, kept: Sequence[Tensor], down: Sequence[Tensor]
) -> list[float]:
    """E||W x - W' x_kept||² of each cut, with products in float32.

    Neurons are ordered so that each cut keeps the first ones, if the cuts are nested. What the neurons do that are gone
    is then summed once for all cuts.
    """
    widest_first = sorted(range(len(kept)), key=lambda index: -len(kept[index]))
    order = kept[widest_first[-1]]
    for index in reversed(widest_first):
        order = torch.cat([order, kept[index][~torch.isin(kept[index], order)]])
        if len(order) != len(kept[index]):
            return [
                found
                for one, new in zip(kept, down, strict=True)
                for found in _squared_errors(weight, gram, [one], [new])
            ]
    every = torch.arange(weight.shape[1], device=order.device)
    order = torch.cat([order, every[~torch.isin(every, order)]])
    weight, gram = weight[:, order].float(), gram[order][:, order]
    missed, alone, before = torch.zeros_like(weight), 0.0, len(order)
    found = [0.0] * len(kept)
    for index in widest_first:
        width = len(kept[index])
        gone = weight[:, width:before]
        inner = gone @ gram[width:before, width:before]
        alone += float(((2 * missed[:, width:] + inner) * gone).sum(dtype=torch.float64))
        missed = missed[:, :width] + gone @ gram[width:before, :width]
        before = width
        place = torch.empty_like(order[:width])
        place[order[:width].argsort()] = kept[index].argsort()
        change = weight[:, :width] - down[index].float()[:, place]
        own = (2 * missed + change @ gram[:width, :width]) * change
        found[index] = alone + float(own.sum(dtype=torch.float64))
    return found


def relative_head_error(evidence: HeadEvidence, cut: HeadCut) -> float:
    """Return the same measure for a layer's attention output."""
    inner = torch.arange(evidence.group)
    channels = (cut.kept[:, None] * evidence.group + inner).flatten()
    return _relative(evidence, channels, cut.out_weight, cut.out_bias)


def _relative(
    evidence: OutputEvidence, kept: Tensor, new_weight: Tensor, new_bias: Tensor | None
) -> float:
    weight, gram, mean = evidence.weight, evidence.gram, evidence.mean
    kept, new_weight = kept.to(weight.device), new_weight.to(weight)
    lost = output_error(weight, gram, kept, new_weight)
    lost += _shifted(evidence, weight @ mean - new_weight @ mean[kept], new_bias)
    energy = float(((weight @ gram) * weight).sum())
    return max(lost, 0.0) / energy if energy > 0 else 0.0


def _shifted(evidence: OutputEvidence, mean_error: Tensor, new_bias: Tensor | None) -> float:
    """What a new bias adds to E||y - y'||², where `mean_error` is E[y - y'] without it."""
    if new_bias is None:
        return 0.0
    shift = -new_bias.to(mean_error)
    if evidence.bias is not None:
        shift = shift + evidence.bias
    return float(2 * shift @ mean_error + shift @ shift)


def predicted_rise(errors: Sequence[float]) -> PredictedRise:
    """Return the expected range for a model whose layers have these relative errors."""
    return PredictedRise(-SLACK, MOST_RISE * sum(errors) + SLACK)


def advice(multiple: float, removed: float, *, recovered: bool) -> str | None:
    """Return what to do about a perplexity of `multiple` times the dense one; None if it is below the warning's.

    Parameters
    ----------
    multiple
        Of the perplexity.
    removed
        The share of the neurons that was removed, between 0 and 1.
    recovered
        Whether the model is trained after the cut anyway.
    """
    if multiple < WORTH_A_WARNING:
        return None
    less = removed * (math.log(GOOD) / math.log(multiple)) ** (1 / LEAST_POWER)
    share = max(math.floor(100 * less), 1) / 100
    keep_more = f"keep more (--sparsity {share:g} is likely to stay below {GOOD:g} times)"
    return f"train longer, or {keep_more}" if recovered else f"add --recover, or {keep_more}"


def check_rise(
    before: float, after: float, predicted: PredictedRise, vocabulary: int
) -> str | None:
    """Return a sentence if a cut needs one, else None.

    It does if the loss rise between the two perplexities is outside the predicted range, or if the pruned model is
    worse than a uniform guess among `vocabulary` tokens and the dense model was better.

    Raises
    ------
    FbnPruneError
        The rise is above the range, and the pruned model is worse than that guess.
    """
    rise = math.log(after / before)
    if predicted.least <= rise <= predicted.most:
        if not after > vocabulary > before:
            return None
        return (
            f"the pruned model's perplexity is {after:.4g} (dense: {before:.4g}), worse than guessing among "
            f"{vocabulary} tokens: keep more neurons"
        )
    low, high = predicted.perplexity(before)
    finding = (
        f"the pruned model's perplexity is {after:.4g}, but the statistics of the cut predict {low:.4g} to "
        f"{high:.4g} (dense: {before:.4g})"
    )
    if rise > predicted.most and after > vocabulary > before:
        raise FbnPruneError(
            f"{finding}, and guessing among {vocabulary} tokens would be better: nothing was written; raise --tokens, "
            "calibrate on text like the held-out text, or compute in --dtype float32"
        )
    if rise < predicted.least:
        return f"{finding}: the model got better, or the held-out text is too short to tell"
    return f"{finding}: calibrate on more text (--tokens), or on text more like the held-out share"
