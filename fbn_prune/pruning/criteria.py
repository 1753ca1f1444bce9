"""How each criterion cuts one layer to a width: ours, and the baselines it has to beat at the same budget.

A criterion is one function from a layer's evidence and a width to a cut, registered by name. Sources:
Wanda (arXiv 2306.11695) summed over a neuron's column, FLAP (arXiv 2312.11983) with its bias compensation,
membership: the union of thresholded network maps without a refit, as in arXiv 2508.05239, which also moves the removed
neurons' mean output into a bias (membership-bias).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from fbn_prune.errors import InvalidInput
from fbn_prune.model.heads import HeadCut
from fbn_prune.model.surgery import MlpCut
from fbn_prune.pruning import second_order
from fbn_prune.pruning.damping import centred, constant_neurons, refit_share, warn_of_outliers


@dataclass(frozen=True, kw_only=True)
class OutputEvidence:
    """What is known of one output projection and its input x. All float64, N inputs, d outputs.

    Attributes
    ----------
    weight, bias
        The projection [d, N] and its bias [d], or None where it has none.
    gram, mean
        H = E[xᵀx] [N, N] and E[x] [N].
    tokens
        Tokens (or their weights) that these are means over.
    cross, target_mean
        E[tᵀx] and E[t] of the signal to reproduce, where that is not x itself (sequential mode).
    loss_root
        R [d, d] with RᵀR = E[g gᵀ] of the loss gradient g at this output, to score errors as the loss feels
        them; None to score them all alike.
    damping, refit_damping
        Shares of mean diag(H) added while choosing and while refitting.
    """

    weight: Tensor
    bias: Tensor | None
    gram: Tensor
    mean: Tensor
    tokens: float
    cross: Tensor | None
    target_mean: Tensor | None
    loss_root: Tensor | None
    damping: float
    refit_damping: float


@dataclass(frozen=True, kw_only=True)
class HeadEvidence(OutputEvidence):
    """What is known of one layer's attention: its inputs are the heads' channels, `group` of them a group of heads."""

    group: int


@dataclass(frozen=True, kw_only=True)
class LayerEvidence(OutputEvidence):
    """What is known of one layer when it is cut: its inputs are the MLP's neurons.

    Attributes
    ----------
    input_norms
        Squared norm of each neuron's weights into it, [N].
    membership
        Largest abs z of each neuron over the kept networks, [N]; None where no networks were found.
    can_have_bias
        Whether the architecture can store a bias of the output projection.
    heads
        What is known of the layer's attention, where its heads are cut too.
    """

    layer: int
    input_norms: Tensor
    can_have_bias: bool
    seed: int
    membership: Tensor | None = None
    heads: HeadEvidence | None = None


Cut = Callable[[LayerEvidence, int], MlpCut]
CRITERIA: dict[str, Cut] = {}
NEED_NETWORKS: set[str] = set()
"""Names of the criteria that read which neurons are members of the kept networks."""


def register_criterion(name: str, *, needs_networks: bool = False) -> Callable[[Cut], Cut]:
    """Register a criterion under the name that `--criterion` and `PruningConfig.criterion` take.

    Parameters
    ----------
    name
        Of a criterion that is not registered yet.
    needs_networks
        Whether it reads :attr:`LayerEvidence.membership`, so that networks have to be discovered.

    Returns
    -------
    A decorator for a function from a layer's evidence and a width (how many neurons stay) to an :class:`MlpCut`.

    Raises
    ------
    InvalidInput
        The name is taken.
    """

    def register(function: Cut) -> Cut:
        if name in CRITERIA:
            raise InvalidInput(f"criterion {name!r} is registered already")
        CRITERIA[name] = function
        if needs_networks:
            NEED_NETWORKS.add(name)
        return function

    return register


def _top(scores: Tensor, width: int) -> Tensor:
    """Ascending indices of the `width` largest scores; ties go to the lower index."""
    return torch.argsort(scores, descending=True, stable=True)[:width].sort().values


def _without_refit(evidence: LayerEvidence, scores: Tensor, width: int) -> MlpCut:
    kept = _top(scores, width)
    return MlpCut(kept.cpu(), evidence.weight[:, kept].cpu(), None)


@register_criterion("random")
def random_neurons(evidence: LayerEvidence, width: int) -> MlpCut:
    """A uniform draw, fixed by the seed and the layer."""
    generator = torch.Generator().manual_seed(evidence.seed * 100003 + evidence.layer)
    scores = torch.rand(evidence.weight.shape[1], generator=generator, dtype=torch.float64)
    return _without_refit(evidence, scores.to(evidence.weight.device), width)


@register_criterion("magnitude")
def magnitude(evidence: LayerEvidence, width: int) -> MlpCut:
    """Norm of all weights of the neuron, in and out."""
    scores = evidence.input_norms + evidence.weight.square().sum(0)
    return _without_refit(evidence, scores, width)


@register_criterion("wanda")
def wanda(evidence: LayerEvidence, width: int) -> MlpCut:
    """Sum over the neuron's output weights of |W_ij| ||x_j||."""
    scores = evidence.weight.abs().sum(0) * evidence.gram.diagonal().sqrt()
    return _without_refit(evidence, scores, width)


@register_criterion("flap")
def flap(evidence: LayerEvidence, width: int) -> MlpCut:
    """Variance of x_j times ||W_j||², the removed neurons' mean output moved into a bias where one can be stored."""
    variance = centred(evidence.gram, evidence.mean).diagonal()
    cut = _without_refit(evidence, variance * evidence.weight.square().sum(0), width)
    return _mean_into_bias(evidence, cut)


def _mean_into_bias(evidence: LayerEvidence, cut: MlpCut) -> MlpCut:
    """The cut with what the removed neurons put out on average in its bias, where one can be stored."""
    if not evidence.can_have_bias:
        return cut
    removed = torch.ones(evidence.weight.shape[1], dtype=torch.bool)
    removed[cut.kept] = False
    shift = evidence.weight.cpu()[:, removed] @ evidence.mean.cpu()[removed]
    bias = shift if evidence.bias is None else evidence.bias.cpu() + shift
    return MlpCut(cut.kept, cut.down_weight, bias)


@register_criterion("membership", needs_networks=True)
def membership(evidence: LayerEvidence, width: int) -> MlpCut:
    """Largest abs z over the kept networks."""
    assert evidence.membership is not None
    return _without_refit(evidence, evidence.membership, width)


@register_criterion("membership-bias", needs_networks=True)
def membership_with_bias(evidence: LayerEvidence, width: int) -> MlpCut:
    """The same, with the bias compensation that the second paper has as an option."""
    return _mean_into_bias(evidence, membership(evidence, width))


@register_criterion("second-order")
def second_order_cut(evidence: LayerEvidence, width: int) -> MlpCut:
    """Optimal brain surgeon and refit; where the output has a bias, that takes the mean and the weights the rest.

    It does not read the networks, which say how much stays and where: protecting the kept networks' hubs was measured
    to cost perplexity.
    """
    gram, cross = _signal(evidence)
    scored = _scored(evidence, gram, cross)
    kept = second_order.choose_neurons(scored, gram, width, damping=evidence.damping)
    return MlpCut(kept.cpu(), *_refitted(evidence, gram, cross, kept))


def head_cut(evidence: HeadEvidence, groups: int) -> HeadCut:
    """The groups of attention heads that the layer can spare least, the output weights refitted to them.

    The same second-order step as for neurons, whole groups at a time; where the output has a bias, that takes the mean.
    """
    gram, cross = _signal(evidence)
    scored = _scored(evidence, gram, cross)
    kept = second_order.choose_groups(
        scored, gram, evidence.group, groups, damping=evidence.damping
    )
    inner = torch.arange(evidence.group, device=kept.device)
    channels = (kept[:, None] * evidence.group + inner).flatten()
    return HeadCut(kept.cpu(), *_refitted(evidence, gram, cross, channels))


def _signal(evidence: OutputEvidence) -> tuple[Tensor, Tensor | None]:
    """H, or the covariance where a bias takes the mean, and the cross product that goes with it."""
    gram, cross = evidence.gram, evidence.cross
    if evidence.bias is not None:
        gram = centred(gram, evidence.mean)
        if cross is not None and evidence.target_mean is not None:
            cross = cross - torch.outer(evidence.target_mean, evidence.mean)
            cross[:, constant_neurons(evidence.gram, evidence.mean)] = 0
    warn_of_outliers(gram)
    return gram, cross


def _scored(evidence: OutputEvidence, gram: Tensor, cross: Tensor | None) -> Tensor:
    """The output weights as errors score them."""
    weight = evidence.weight
    if cross is not None:
        full = torch.arange(weight.shape[1], device=weight.device)
        weight = second_order.refit(
            weight, gram, full, damping=_refit_damping(evidence), cross=cross
        )
    return weight if evidence.loss_root is None else evidence.loss_root @ weight


def _refit_damping(evidence: OutputEvidence) -> float:
    return refit_share(evidence.refit_damping, evidence.tokens, evidence.weight.shape[1])


def _refitted(
    evidence: OutputEvidence, gram: Tensor, cross: Tensor | None, kept: Tensor
) -> tuple[Tensor, Tensor | None]:
    """New output weights on the kept inputs, and the new bias where there is one; on the CPU."""
    damping = _refit_damping(evidence)
    weight = second_order.refit(evidence.weight, gram, kept, damping=damping, cross=cross)
    bias = None
    if evidence.bias is not None:
        target_mean = evidence.mean if evidence.target_mean is None else evidence.target_mean
        bias = evidence.bias + evidence.weight @ target_mean - weight @ evidence.mean[kept]
        bias = bias.cpu()
    return weight.cpu(), bias


def cuts_to_widths(
    name: str, evidence: LayerEvidence, widths: Collection[int]
) -> dict[int, MlpCut]:
    """What the criterion of that name gives for each width; where the second order decides, by one removal of all."""
    if CRITERIA[name] is not second_order_cut or len(widths) == 1:
        return {width: CRITERIA[name](evidence, width) for width in widths}
    gram, cross = _signal(evidence)
    scored = _scored(evidence, gram, cross)
    order = second_order.removal_order(scored, gram, damping=evidence.damping)
    kept = {width: order[len(order) - width :].sort().values for width in widths}
    return {
        width: MlpCut(stays.cpu(), *_refitted(evidence, gram, cross, stays))
        for width, stays in kept.items()
    }


def neuron_costs(evidence: LayerEvidence) -> Tensor:
    """What each neuron of a layer costs to remove, cheapest first, in its own layer's units; float64 [N]."""
    gram = evidence.gram
    if evidence.bias is not None:
        gram = centred(gram, evidence.mean)
    weight = evidence.weight if evidence.loss_root is None else evidence.loss_root @ evidence.weight
    return second_order.removal_costs(weight, gram, damping=evidence.damping).cpu()
