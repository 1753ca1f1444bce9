"""Cut the experts of one layer: choose experts, choose neurons in each, refit.

Each expert is one more MLP for the criteria of :mod:`fbn_prune.pruning.criteria`: its statistics come from the tokens
that the router sends it, weighted by the square of its gate, because that is the weight of its errors in the output.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import safetensors.torch
import torch
from torch import Tensor

from fbn_prune.model.expert_block import ExpertBlock
from fbn_prune.model.routed import ExpertsCut, Routed
from fbn_prune.model.shards import packed
from fbn_prune.pruning.criteria import LayerEvidence
from fbn_prune.pruning.damping import DampingWarning
from fbn_prune.pruning.evidence import CutOptions
from fbn_prune.pruning.experts import PART, block_output, choose_experts, refitted, whole
from fbn_prune.pruning.fitting import fitting_cuts
from fbn_prune.pruning.statistics import GramStatistics

FEWEST_TOKENS = 2
"""An expert with fewer tokens than this for each of its neurons gets a pooled Hessian."""

POOLED_TOKENS = 8192
"""At most so many tokens of the layer make a pooled Hessian."""


@dataclass(frozen=True)
class MixturePlan:
    """How to cut the experts of every layer.

    Attributes
    ----------
    experts, width
        Experts to keep, and neurons to keep in each.
    by
        Criterion for the experts: "second-order", or the name of a baseline.
    criterion
        Criterion for the neurons, as for other MLPs.
    refit
        Whether a refit follows; None for one after a second-order choice.
    """

    experts: int
    width: int
    by: str = "second-order"
    criterion: str = "second-order"
    refit: bool | None = None

    def refits(self, block: ExpertBlock) -> bool:
        """Whether the output weights of what stays are fitted."""
        if self.refit is not None:
            return self.refit
        fewer, narrower = self.experts < block.count, self.width < block.width
        return (fewer and self.by == "second-order") or (
            narrower and self.criterion == "second-order"
        )


@dataclass(frozen=True)
class FinishedExperts:
    """The cut of one layer's experts, its error, and the number of experts with a pooled Hessian."""

    cut: ExpertsCut
    error: float
    pooled: int

    def to_bytes(self) -> bytes:
        """Return the content of a safetensors file."""
        figures = torch.tensor([self.error, self.pooled], dtype=torch.float64)
        return packed({**self.cut.parts(), "figures": figures})

    @classmethod
    def from_bytes(cls, data: bytes) -> FinishedExperts:
        """Read the bytes of :meth:`to_bytes`, to the CPU."""
        parts = safetensors.torch.load(data)
        error, pooled = parts["figures"].tolist()
        return cls(ExpertsCut.of_parts(parts), error, int(pooled))


def cut_block(
    block: ExpertBlock,
    tokens: Routed,
    plan: MixturePlan,
    options: CutOptions,
    *,
    layer: int,
    more: Tensor | None = None,
) -> FinishedExperts:
    """Return the cut of one layer's experts.

    Parameters
    ----------
    tokens
        The calibration tokens as the router sends them to the uncut experts.
    layer
        The layer's number, for the seed of random choices.
    more
        What the refit is to add to the dense block's output, [tokens, hidden]; None for nothing.
    """
    target = None
    if plan.refits(block):
        target = block_output(block, tokens)
        target = target if more is None else target.float() + more
    made = [
        _cut_to(block, tokens, kept, plan, options, layer=layer, target=target)
        for kept in _candidates(block, tokens, plan, seed=options.seed * 100003 + layer)
    ]
    return min(made, key=lambda one: one.error)


def _candidates(
    block: ExpertBlock, tokens: Routed, plan: MixturePlan, *, seed: int
) -> Sequence[Tensor]:
    """Return the experts to keep; for a second-order choice with a refit also those that REAP keeps, if they differ.

    The second order knows what the experts' absence costs, but not how much of it the refit will make up for.
    """
    if plan.experts == block.count:
        return [torch.arange(block.count)]
    names = ["second-order", "reap"] if plan.by == "second-order" else [plan.by]
    if not plan.refits(block):
        names = names[:1]
    found = [choose_experts(block, tokens, plan.experts, criterion=n, seed=seed) for n in names]
    return found[:1] if torch.equal(found[0], found[-1]) else found


def _cut_to(
    block: ExpertBlock,
    tokens: Routed,
    kept: Tensor,
    plan: MixturePlan,
    options: CutOptions,
    *,
    layer: int,
    target: Tensor | None,
) -> FinishedExperts:
    """Return the cut to these experts, fitted to the target if there is one."""
    routed = tokens
    if len(kept) < block.count:
        routed = replace(block.route(tokens.hidden, kept), weights=tokens.weights)
    cut, pooled = whole(block, kept), 0
    if plan.width < block.width:
        cut, pooled = _narrowed(block, routed, cut, plan, options, layer)
    if target is None:
        return FinishedExperts(cut.rounded(options.round_to), 0.0, pooled)
    cut, error = refitted(block, routed, cut, target, damping=options.refit_damping)
    return FinishedExperts(cut.rounded(options.round_to), error, pooled)


def _narrowed(
    block: ExpertBlock,
    routed: Routed,
    cut: ExpertsCut,
    plan: MixturePlan,
    options: CutOptions,
    layer: int,
) -> tuple[ExpertsCut, int]:
    """Return the cut with narrower experts, each chosen and refitted by itself, and the number of pooled Hessians."""
    neurons, down, bias, pooled = [], [], [], 0
    for expert in cut.experts.tolist():
        evidence, few = _evidence(block, routed, expert, options, layer)
        pooled += few
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DampingWarning)
            made = fitting_cuts(
                evidence, {plan.width}, criterion=plan.criterion, stored=options.round_to
            )[plan.width]
        neurons.append(made.kept)
        down.append(made.down_weight.float())
        old = block.bias(expert)
        if old is not None:
            bias.append((old if made.down_bias is None else made.down_bias).float().cpu())
    return (
        ExpertsCut(cut.experts, tuple(neurons), tuple(down), tuple(bias) if bias else None),
        pooled,
    )


def _add(
    statistics: GramStatistics,
    block: ExpertBlock,
    expert: int,
    hidden: Tensor,
    rows: Tensor,
    weights: Tensor,
) -> None:
    """Add an expert's activations on some tokens to its statistics."""
    for some, counts in zip(rows.split(PART), weights.split(PART), strict=True):
        statistics.update(block.activation(expert, hidden[some]), counts)


def _evidence(
    block: ExpertBlock, routed: Routed, expert: int, options: CutOptions, layer: int
) -> tuple[LayerEvidence, bool]:
    """Return what is known of an expert, and whether its Hessian is pooled."""
    rows, gates = routed.of(expert)
    counts = routed.counts(rows)
    squares = gates.square()
    own = GramStatistics(block.width, block.device)
    if len(rows):
        weights = (
            counts * squares / squares.mean().clamp(min=1e-30)
        )  # counts stay numbers of tokens
        _add(own, block, expert, routed.hidden, rows, weights)
    few = len(rows) < FEWEST_TOKENS * block.width
    gram, mean, tokens = own.gram, own.mean, own.count
    if few:
        every = max(1, -(-len(routed.hidden) // POOLED_TOKENS))
        some = torch.arange(0, len(routed.hidden), every, device=rows.device)
        pool = GramStatistics(block.width, block.device)
        _add(pool, block, expert, routed.hidden, some, routed.counts(some))
        share = 0.5 if len(rows) else 1.0
        gram = gram * (1 - share) + pool.gram * share
        mean = mean * (1 - share) + pool.mean * share
        tokens = pool.count
    bias = block.bias(expert)
    return (
        LayerEvidence(
            layer=layer * block.count + expert,
            weight=block.down(expert).double(),
            bias=None if bias is None else bias.double(),
            input_norms=block.input_norms(expert),
            loss_root=None,
            can_have_bias=bias is not None,
            damping=options.damping,
            refit_damping=options.refit_damping,
            seed=options.seed,
            gram=gram,
            mean=mean,
            tokens=tokens,
            shortfall=None,
        ),
        few,
    )
