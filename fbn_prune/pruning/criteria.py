"""Criteria that cut a layer to a width: the second-order step, and the baselines to compare it with.

A criterion is one function from a layer's evidence and a width to a cut, registered by name. Sources of the
baselines: Wanda (arXiv 2306.11695), summed over a neuron's column; FLAP (arXiv 2312.11983) with its bias
compensation; membership, the union of thresholded network maps without a refit (arXiv 2508.05239), and
membership-bias, that paper's option to move the removed neurons' mean output into a bias.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fbn_prune.errors import InvalidInput
from fbn_prune.model.heads import HeadCut
from fbn_prune.model.surgery import MlpCut
from fbn_prune.pruning import second_order
from fbn_prune.pruning.damping import centred, constant_neurons, refit_share, warn_of_outliers
from fbn_prune.pruning.shortfall import Shortfall, best_shares


@dataclass(frozen=True, kw_only=True)
class OutputEvidence:
    """Weights and calibration statistics of one output projection with N inputs x and d outputs; all tensors float64.

    Attributes
    ----------
    weight, bias
        Weight [d, N] and bias [d] of the projection; the bias is None if it has none.
    gram, mean
        H = E[xᵀx] [N, N] and E[x] [N].
    tokens
        Number of tokens, or the sum of their weights, behind these means.
    shortfall
        What the output lacks because earlier layers are cut (sequential mode), for the refit to make up for; None if it
        lacks nothing.
    loss_root
        R [d, d] with RᵀR = E[g gᵀ], where g is the loss gradient at this output. Scores then weigh output errors by
        their effect on the loss; with None, all errors count alike.
    damping, refit_damping
        Shares of mean diag(H) added to its diagonal for the choice of neurons and for the refit.
    """

    weight: Tensor
    bias: Tensor | None
    gram: Tensor
    mean: Tensor
    tokens: float
    shortfall: Shortfall | None
    loss_root: Tensor | None
    damping: float
    refit_damping: float


@dataclass(frozen=True, kw_only=True)
class HeadEvidence(OutputEvidence):
    """Evidence for one layer's attention: the inputs are the heads' channels, `group` of them per group of heads."""

    group: int


@dataclass(frozen=True, kw_only=True)
class LayerEvidence(OutputEvidence):
    """Evidence for one layer: the inputs of the output projection are the MLP's neurons.

    Attributes
    ----------
    input_norms
        Squared norm of each neuron's input weights, [N].
    membership
        Largest abs z of each neuron over the kept networks, [N]; None without networks.
    can_have_bias
        Whether the architecture can store a bias of the output projection.
    heads
        Evidence for the layer's attention; None unless its heads are cut too.
    erased
        E[xᵀx] on the text of a skill to erase, [N, N]; None without one.
    head_cut
        The cut of the attention with which the other evidence was collected; None if it was whole.
    """

    layer: int
    input_norms: Tensor
    can_have_bias: bool
    seed: int
    membership: Tensor | None = None
    heads: HeadEvidence | None = None
    erased: Tensor | None = None
    head_cut: FinishedHeads | None = None


@dataclass(frozen=True)
class FinishedHeads:
    """The cut of one layer's attention, its relative error, and damping messages."""

    cut: HeadCut
    relative_error: float
    notes: tuple[str, ...] = ()


Cut = Callable[[LayerEvidence, int], MlpCut]
CRITERIA: dict[str, Cut] = {}
NEED_NETWORKS: set[str] = set()
"""Names of the criteria that use membership of the kept networks."""


def register_criterion(name: str, *, needs_networks: bool = False) -> Callable[[Cut], Cut]:
    """Register a criterion under the name that `--criterion` and `PruningConfig.criterion` accept.

    Parameters
    ----------
    name
        A name that is not registered yet.
    needs_networks
        Whether the criterion uses :attr:`LayerEvidence.membership`, which requires discovered networks.

    Returns
    -------
    callable
        A decorator for a function from a layer's evidence and a width (the number of neurons to keep) to an
        :class:`MlpCut`.

    Raises
    ------
    InvalidInput
        The name is registered already.
    """

    def register(function: Cut) -> Cut:
        if name in CRITERIA:
            raise InvalidInput(f"criterion {name!r} is registered already: choose another name")
        CRITERIA[name] = function
        if needs_networks:
            NEED_NETWORKS.add(name)
        return function

    return register


def _top(scores: Tensor, width: int) -> Tensor:
    """Ascending indices of the `width` largest scores; of equal scores, the lower index is kept."""
    return torch.argsort(scores, descending=True, stable=True)[:width].sort().values


def _without_refit(evidence: LayerEvidence, scores: Tensor, width: int) -> MlpCut:
    kept = _top(scores, width)
    return MlpCut(kept.cpu(), evidence.weight[:, kept].cpu(), None)


@register_criterion("random")
def random_neurons(evidence: LayerEvidence, width: int) -> MlpCut:
    """Keep a uniformly random set of neurons, determined by the seed and the layer."""
    generator = torch.Generator().manual_seed(evidence.seed * 100003 + evidence.layer)
    scores = torch.rand(evidence.weight.shape[1], generator=generator, dtype=torch.float64)
    return _without_refit(evidence, scores.to(evidence.weight.device), width)


@register_criterion("magnitude")
def magnitude(evidence: LayerEvidence, width: int) -> MlpCut:
    """Keep the neurons with the largest norm of all their weights, input and output."""
    scores = evidence.input_norms + evidence.weight.square().sum(0)
    return _without_refit(evidence, scores, width)


@register_criterion("wanda")
def wanda(evidence: LayerEvidence, width: int) -> MlpCut:
    """Keep the neurons with the largest sum of |W_ij| ||x_j|| over their output weights."""
    scores = evidence.weight.abs().sum(0) * evidence.gram.diagonal().sqrt()
    return _without_refit(evidence, scores, width)


@register_criterion("flap")
def flap(evidence: LayerEvidence, width: int) -> MlpCut:
    """Keep the neurons with the largest variance of x_j times ||W_j||², and compensate in the bias for the others."""
    variance = centred(evidence.gram, evidence.mean).diagonal()
    cut = _without_refit(evidence, variance * evidence.weight.square().sum(0), width)
    return _mean_into_bias(evidence, cut)


def _mean_into_bias(evidence: LayerEvidence, cut: MlpCut) -> MlpCut:
    """The cut with the removed neurons' mean output in its bias, if the architecture can store one."""
    if not evidence.can_have_bias:
        return cut
    removed = torch.ones(evidence.weight.shape[1], dtype=torch.bool)
    removed[cut.kept] = False
    shift = evidence.weight.cpu()[:, removed] @ evidence.mean.cpu()[removed]
    bias = shift if evidence.bias is None else evidence.bias.cpu() + shift
    return MlpCut(cut.kept, cut.down_weight, bias)


@register_criterion("membership", needs_networks=True)
def membership(evidence: LayerEvidence, width: int) -> MlpCut:
    """Keep the neurons with the largest abs z over the kept networks."""
    assert evidence.membership is not None
    return _without_refit(evidence, evidence.membership, width)


@register_criterion("membership-bias", needs_networks=True)
def membership_with_bias(evidence: LayerEvidence, width: int) -> MlpCut:
    """Cut by membership, with the bias compensation that arXiv 2508.05239 has as an option."""
    return _mean_into_bias(evidence, membership(evidence, width))


@register_criterion("membership-refit", needs_networks=True)
def membership_with_refit(evidence: LayerEvidence, width: int) -> MlpCut:
    """Keep the neurons with the largest membership and refit their output weights.

    Neurons of a negative membership are to go. Where `width` has room for some of them, they stay with output weights
    of 0, so that layers that lose different numbers of neurons can have one width.
    """
    assert evidence.membership is not None
    kept = _top(evidence.membership, width)
    live = evidence.membership[kept] >= 0
    found, bias = _refitted(evidence, _signal(evidence), kept[live])
    weight = found.new_zeros(len(found), width)
    weight[:, live.cpu()] = found
    return MlpCut(kept.cpu(), weight, bias)


@register_criterion("second-order")
def second_order_cut(evidence: LayerEvidence, width: int) -> MlpCut:
    """Choose neurons by optimal brain surgeon, and refit the output weights.

    An output bias, if there is one, absorbs the change of mean. The networks determine only the budget and the
    widths: in measurements, protecting the kept networks' hubs raised the perplexity.
    """
    signal = _signal(evidence)
    kept = torch.arange(evidence.weight.shape[1], device=evidence.weight.device)
    if width < len(kept):
        scored = _scored(evidence, signal)
        kept = second_order.choose_neurons(scored, signal.gram, width, damping=evidence.damping)
    return MlpCut(kept.cpu(), *_refitted(evidence, signal, kept))


def erasure(evidence: LayerEvidence, strength: float) -> MlpCut:
    """Keep all neurons, with output weights that do little on a skill's text; a bias stays as it is.

    The damping is at least that for the choice of neurons: with less, text that the weights were not fitted on lost
    more (`eval/quality/forget_table.py`).
    """
    assert evidence.erased is not None
    warn_of_outliers(evidence.gram)
    width = evidence.weight.shape[1]
    share = refit_share(evidence.refit_damping, evidence.tokens, width)
    weight = second_order.erased(
        evidence.weight, evidence.gram, evidence.erased,
        strength=strength, damping=max(evidence.damping, share),
    )  # fmt: skip
    return MlpCut(torch.arange(width), weight.cpu())


def head_cut(evidence: HeadEvidence, groups: int) -> HeadCut:
    """Keep `groups` groups of attention heads, remove those that cost least, and refit the output weights.

    The second-order step is that for neurons, applied to whole groups; an output bias absorbs the change of mean.
    """
    signal = _signal(evidence)
    kept = second_order.choose_groups(
        _scored(evidence, signal), signal.gram, evidence.group, groups, damping=evidence.damping
    )
    inner = torch.arange(evidence.group, device=kept.device)
    channels = (kept[:, None] * evidence.group + inner).flatten()
    return HeadCut(kept.cpu(), *_refitted(evidence, signal, channels))


def no_heads(hidden: int) -> HeadCut:
    """Return the cut that leaves out an attention whose output has `hidden` channels."""
    return HeadCut(torch.zeros(0, dtype=torch.int64), torch.zeros(hidden, 0))


@dataclass(frozen=True)
class _Signal:
    """H and the shortfall; with `mean`, centred, because an output bias absorbs the mean."""

    gram: Tensor
    shortfall: Shortfall | None
    mean: Tensor | None


def _signal(evidence: OutputEvidence) -> _Signal:
    gram, shortfall, mean = evidence.gram, evidence.shortfall, None
    if evidence.bias is not None:
        mean = evidence.mean
        gram = centred(gram, mean)
        if shortfall is not None:
            cross = shortfall.cross - shortfall.mean[:, :, None] * mean
            cross[:, :, constant_neurons(evidence.gram, mean)] = 0
            shortfall = replace(shortfall, cross=cross)
    warn_of_outliers(gram)
    return _Signal(gram, shortfall, mean)


def _scored(evidence: OutputEvidence, signal: _Signal) -> Tensor:
    """The output weights with which removal costs are computed."""
    weight = evidence.weight
    if signal.shortfall is not None:
        every = torch.arange(weight.shape[1], device=weight.device)
        weight, _ = _fitted(evidence, signal, every)
    return weight if evidence.loss_root is None else evidence.loss_root @ weight


def _fitted(
    evidence: OutputEvidence, signal: _Signal, kept: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The refitted weights [d, n], and the mean of what they make up for, [d]; None without a shortfall."""
    damping = refit_share(evidence.refit_damping, evidence.tokens, evidence.weight.shape[1])
    missing = mean = None
    if (shortfall := signal.shortfall) is not None:
        shares = best_shares(
            evidence.weight,
            signal.gram,
            shortfall,
            kept,
            mean=signal.mean,
            tokens=evidence.tokens,
            damping=damping,
        )
        missing = torch.einsum("p,pdn->dn", shares, shortfall.cross)
        mean = shares @ shortfall.mean
    weight = second_order.refit(
        evidence.weight, signal.gram, kept, damping=damping, missing=missing
    )
    return weight, mean


def _refitted(
    evidence: OutputEvidence, signal: _Signal, kept: Tensor
) -> tuple[Tensor, Tensor | None]:
    """New output weights on the kept inputs, and the new bias if the projection has one; on the CPU."""
    return _with_bias(evidence, kept, *_fitted(evidence, signal, kept))


def _with_bias(
    evidence: OutputEvidence, kept: Tensor, weight: Tensor, missing: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    bias = None
    if evidence.bias is not None:
        bias = evidence.bias + evidence.weight @ evidence.mean - weight @ evidence.mean[kept]
        bias = (bias if missing is None else bias + missing).cpu()
    return weight.cpu(), bias


def cuts_to_widths(
    name: str, evidence: LayerEvidence, widths: Collection[int]
) -> dict[int, MlpCut]:
    """Return the named criterion's cut to each width; the second order needs only one removal of all neurons."""
    if CRITERIA[name] is not second_order_cut or len(widths) == 1:
        return {width: CRITERIA[name](evidence, width) for width in widths}
    signal = _signal(evidence)
    scored = _scored(evidence, signal)
    order = second_order.removal_order(scored, signal.gram, damping=evidence.damping)
    if signal.shortfall is not None:
        kept = [order[len(order) - width :].sort().values for width in widths]
        return {len(one): MlpCut(one.cpu(), *_refitted(evidence, signal, one)) for one in kept}
    damping = refit_share(evidence.refit_damping, evidence.tokens, len(order))
    found = second_order.nested_refits(
        evidence.weight, signal.gram, order.flip(0), widths, damping=damping
    )
    return {
        len(one): MlpCut(one.cpu(), *_with_bias(evidence, one, weight)) for one, weight in found
    }


def neuron_costs(evidence: LayerEvidence) -> Tensor:
    """Return each neuron's cost in squared MLP output, when neurons are removed cheapest first; float64 [N]."""
    gram = evidence.gram
    if evidence.bias is not None:
        gram = centred(gram, evidence.mean)
    weight = evidence.weight if evidence.loss_root is None else evidence.loss_root @ evidence.weight
    return second_order.removal_costs(weight, gram, damping=evidence.damping).cpu()
