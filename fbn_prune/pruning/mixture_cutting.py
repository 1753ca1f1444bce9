"""Cut the experts of a live mixture, one layer after another: record what the router sends, choose, refit.

Each expert is one more MLP for the criteria of :mod:`fbn_prune.pruning.criteria`: its statistics come from the tokens
that the router sends it, weighted by the square of its gate, because that is the weight of its errors in the output.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from fbn_prune.data.calibration import Batch
from fbn_prune.errors import InvalidInput, counted
from fbn_prune.model.expert_block import ExpertBlock, ExpertsCut, Routed
from fbn_prune.model.layerwise import LayerwiseForward
from fbn_prune.model.mixture_adapter import MixtureAdapter
from fbn_prune.progress import Advance, StageClock
from fbn_prune.pruning.criteria import LayerEvidence
from fbn_prune.pruning.damping import DampingWarning
from fbn_prune.pruning.evidence import CutOptions
from fbn_prune.pruning.experts import block_output, choose_experts, refitted, whole
from fbn_prune.pruning.fitting import fitting_cuts
from fbn_prune.pruning.statistics import GramStatistics

Name = TypeVar("Name")

FEWEST_TOKENS = 2
"""An expert with fewer tokens than this for each of its neurons gets a pooled Hessian."""

POOLED_TOKENS = 8192
"""At most so many tokens of the layer make a pooled Hessian."""

DENSE_SHARE = 0.5
"""Share of what the hidden state lacks, compared with the dense model's, that sequential mode refits for."""

_CHECKED = 32
"""Tokens on which the reading of a layer's experts is checked."""


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
    """

    experts: int
    width: int
    by: str = "second-order"
    criterion: str = "second-order"

    def refits(self, block: ExpertBlock) -> bool:
        """Whether a second-order choice is made, which a refit follows."""
        fewer, narrower = self.experts < block.count, self.width < block.width
        return (fewer and self.by == "second-order") or (
            narrower and self.criterion == "second-order"
        )


@dataclass
class CutExperts:
    """The cuts of all layers.

    Attributes
    ----------
    cuts
        By layer.
    errors
        By layer, what the experts' output lacks as a share of its energy; 0 where nothing was refitted.
    pooled
        Number of experts with a pooled Hessian.
    """

    cuts: list[ExpertsCut]
    errors: list[float]
    pooled: int = 0

    def add(self, cut: ExpertsCut, error: float, pooled: int) -> None:
        """Add the next layer's."""
        self.cuts.append(cut)
        self.errors.append(error)
        self.pooled += pooled

    def lines(self) -> list[str]:
        """Return what the user should know of the cut."""
        if not self.pooled:
            return []
        return [
            f"{counted(self.pooled, 'expert')} of {sum(len(cut.experts) for cut in self.cuts)} got fewer than "
            f"{FEWEST_TOKENS} tokens for each neuron: half of their Hessians comes from all tokens of the layer "
            "(raise --tokens)"
        ]


def cut_experts(
    adapter: MixtureAdapter,
    batches: Sequence[Batch],
    plans: Mapping[Name, MixturePlan],
    options: CutOptions,
    *,
    clock: StageClock,
    stage: str = "prune",
) -> tuple[dict[Name, CutExperts], float]:
    """Make the cuts of several plans, without changing the model.

    Every layer is fitted to the dense model's activations, in one pass for all plans. In sequential mode each plan
    takes a pass of its own, in which a layer reads what the cut layers before it compute.

    Returns
    -------
    cuts
        By the names of the plans.
    seconds
        Time of the bare forward pass.

    Raises
    ------
    InvalidInput
        A layer's experts read NaN or Inf, or compute something else than their tensors say.
    """
    total = sum(batch.tokens for batch in batches) * adapter.num_layers
    if options.sequential:
        with clock.stage(stage, total * len(plans), "tokens x layers") as advance:
            passes = {
                name: _in_sequence(adapter, batches, plan, options, advance)
                for name, plan in plans.items()
            }
        return {name: cut for name, (cut, _) in passes.items()}, sum(s for _, s in passes.values())
    done = {name: CutExperts([], []) for name in plans}
    forward = LayerwiseForward(adapter, batches)
    with clock.stage(stage, total, "tokens x layers") as advance:
        for layer, block in enumerate(adapter.blocks):
            tokens = _recorded(forward, block, batches)
            _check(block, tokens, layer)
            for name, plan in plans.items():
                done[name].add(*cut_block(block, tokens, plan, options, layer=layer))
            advance(len(tokens.hidden))
    return done, forward.forward_seconds


def _in_sequence(
    adapter: MixtureAdapter,
    batches: Sequence[Batch],
    plan: MixturePlan,
    options: CutOptions,
    advance: Advance,
) -> tuple[CutExperts, float]:
    """Return the cuts of one plan, each layer on the output of the cut ones, and the seconds of the dense pass."""
    dense, pruned = LayerwiseForward(adapter, batches), LayerwiseForward(adapter, batches)
    made, before = CutExperts([], []), [block.saved() for block in adapter.blocks]
    try:
        for layer, block in enumerate(adapter.blocks):
            scale = pruned.output_scale()
            parts, lacking = [], []
            for index, batch in enumerate(batches):
                dense.hidden[index] = dense.run(index)
                with block.recording() as seen:
                    output = pruned.run(index)
                parts.append(_valid(seen, batch))
                if scale is not None:
                    valid = batch.valid.to(output.device)
                    lacks = dense.hidden[index].to(output)[valid].float() - output[valid].float()
                    lacking.append(lacks * (DENSE_SHARE / scale))
            dense.next_layer += 1
            tokens = Routed.joined(parts)
            _check(block, tokens, layer)
            more = torch.cat(lacking) if lacking else None
            made.add(*cut_block(block, tokens, plan, options, layer=layer, more=more))
            block.cut(made.cuts[-1], round_to=options.round_to)
            pruned.advance()
            advance(len(tokens.hidden))
    finally:
        for block, state in zip(adapter.blocks, before, strict=True):
            block.restore(state)
    return made, dense.forward_seconds


def _check(block: ExpertBlock, tokens: Routed, layer: int) -> None:
    if not bool(torch.isfinite(tokens.hidden).all()):
        raise InvalidInput(
            f"NaN or Inf among what the experts of layer {layer} read: the checkpoint is damaged, or the "
            "compute type overflows (try --dtype float32)"
        )
    some = slice(_CHECKED)
    block.check(Routed(tokens.hidden[some], tokens.index[some], tokens.gates[some]))


def _recorded(forward: LayerwiseForward, block: ExpertBlock, batches: Sequence[Batch]) -> Routed:
    """Run the next layer on all batches and return what its router sends to the experts, without padding."""
    parts = []
    for index, batch in enumerate(batches):
        with block.recording() as seen:
            forward.hidden[index] = forward.run(index)
        parts.append(_valid(seen, batch))
    forward.next_layer += 1
    return Routed.joined(parts)


def _valid(seen: Sequence[Routed], batch: Batch) -> Routed:
    """Return the one call that was recorded for a batch, without padding."""
    (one,) = seen
    valid = batch.valid.flatten().to(one.hidden.device)
    return Routed(one.hidden[valid], one.index[valid], one.gates[valid])


def cut_block(
    block: ExpertBlock,
    tokens: Routed,
    plan: MixturePlan,
    options: CutOptions,
    *,
    layer: int,
    more: Tensor | None = None,
) -> tuple[ExpertsCut, float, int]:
    """Return the cut of one layer's experts, its error, and the number of experts with a pooled Hessian.

    Parameters
    ----------
    tokens
        The calibration tokens as the router sends them to the uncut experts.
    layer
        The layer's number, for the seed of random choices.
    more
        What the refit is to add to the dense block's output, [tokens, hidden]; None for nothing.
    """
    kept, routed = torch.arange(block.count), tokens
    if plan.experts < block.count:
        kept = choose_experts(
            block,
            tokens,
            plan.experts,
            criterion=plan.by,
            seed=options.seed * 100003 + layer,
        )
        routed = block.route(tokens.hidden, kept)
    cut, pooled = whole(block, kept), 0
    if plan.width < block.width:
        cut, pooled = _narrowed(block, routed, cut, plan, options, layer)
    if not plan.refits(block):
        return cut, 0.0, pooled
    target = block_output(block, tokens)
    if more is not None:
        target = target.float() + more
    cut, error = refitted(block, routed, cut, target, damping=options.refit_damping)
    return cut, error, pooled


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
        down.append(made.down_weight.double())
        old = block.bias(expert)
        if old is not None:
            bias.append((old if made.down_bias is None else made.down_bias).double().cpu())
    return (
        ExpertsCut(cut.experts, tuple(neurons), tuple(down), tuple(bias) if bias else None),
        pooled,
    )


def _evidence(
    block: ExpertBlock, routed: Routed, expert: int, options: CutOptions, layer: int
) -> tuple[LayerEvidence, bool]:
    """Return what is known of an expert, and whether its Hessian is pooled."""
    rows, gates = routed.of(expert)
    squares = gates.square()
    own = GramStatistics(block.width, block.device)
    if len(rows):
        weights = squares / squares.mean().clamp(min=1e-30)  # counts stay numbers of tokens
        own.update(block.activation(expert, routed.hidden[rows]), weights)
    few = len(rows) < FEWEST_TOKENS * block.width
    gram, mean, tokens = own.gram, own.mean, own.count
    if few:
        every = max(1, -(-len(routed.hidden) // POOLED_TOKENS))
        pool = GramStatistics(block.width, block.device)
        pool.update(block.activation(expert, routed.hidden[::every]))
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
