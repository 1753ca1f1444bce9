"""Choose whole experts to keep, and refit the output weights of those that stay to the dense block's output.

The second-order choice removes the expert whose loss raises the squared error of the block's output least, with every
token sent where the router then sends it; experts are removed in a few steps. The baselines are REAP (Lasby et al.,
arXiv 2510.13999: mean over an expert's tokens of its gate times the norm of its output), the number of tokens, and
chance. None of them refits.

The refit goes over the experts in turn. Each one's output weights are the least-squares solution for what the block's
output lacks, on the tokens that the router sends it, weighted by the square of its gate, and held near the weights
from before by the damping, as in :func:`fbn_prune.pruning.second_order.refit`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fbn_prune.model.expert_block import ExpertBlock, ExpertsCut, Routed
from fbn_prune.pruning import second_order
from fbn_prune.pruning.damping import DampingWarning, refit_share

CHOICE_TOKENS = 4096
"""At most so many tokens decide which experts stay by the second order."""

CHOICE_VALUES = 2**27
"""At most so many values of experts' outputs are held for that; fewer tokens are taken where they would be more."""

STEPS = 8
"""Experts are removed in about so many steps, or one at a time where fewer are removed."""

SWEEPS = 3
"""Rounds of the refit over all experts."""

_PART = 8192
"""Tokens for which the outputs of experts are computed at once."""

Scores = Callable[[ExpertBlock, Routed, int], Tensor]


def block_output(block: ExpertBlock, tokens: Routed) -> Tensor:
    """Return the gated sum of the experts' outputs, [tokens, hidden]."""
    parts = []
    with torch.inference_mode():
        for start in range(0, len(tokens.hidden), _PART):
            part = slice(start, start + _PART)
            parts.append(block.experts(tokens.hidden[part], tokens.index[part], tokens.gates[part]))
    return torch.cat(parts)


def reap(block: ExpertBlock, tokens: Routed, seed: int) -> Tensor:
    """Return each expert's mean of gate times output norm over its tokens, float64 [experts]; 0 without tokens."""
    scores = torch.zeros(block.count, dtype=torch.float64)
    for expert in range(block.count):
        rows, gates = tokens.of(expert)
        if len(rows):
            output = block.output(expert, block.activation(expert, tokens.hidden[rows]))
            scores[expert] = float((output.double().norm(dim=1) * gates).mean())
    return scores


def frequency(block: ExpertBlock, tokens: Routed, seed: int) -> Tensor:
    """Return the number of each expert's tokens, float64 [experts]."""
    return torch.bincount(tokens.index.flatten(), minlength=block.count).double().cpu()


def chance(block: ExpertBlock, tokens: Routed, seed: int) -> Tensor:
    """Return random scores, float64 [experts], that follow from the seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(block.count, generator=generator, dtype=torch.float64)


BASELINES: dict[str, Scores] = {"reap": reap, "frequency": frequency, "random": chance}
"""Scores of the experts by the name of the criterion; those with the largest stay."""


def choose_experts(
    block: ExpertBlock, tokens: Routed, keep: int, *, criterion: str, seed: int
) -> Tensor:
    """Return the experts to keep, int64 [keep], ascending; the same number in each of the router's groups.

    Parameters
    ----------
    block
        The layer's experts.
    tokens
        The calibration tokens as the router sends them now.
    keep
        Number of experts to keep.
    criterion
        "second-order", or the name of a baseline.
    seed
        Seed of the random choice.
    """
    groups = block.family.groups
    if criterion == "second-order":
        return _by_output_error(block, tokens, keep)
    scores = BASELINES[criterion](block, tokens, seed).view(groups, -1)
    best = scores.argsort(dim=1, descending=True, stable=True)[:, : keep // groups]
    first = torch.arange(groups)[:, None] * scores.shape[1]
    return (best + first).flatten().sort().values


@torch.inference_mode()
def _by_output_error(block: ExpertBlock, tokens: Routed, keep: int) -> Tensor:
    most = max(64, CHOICE_VALUES // (block.count * tokens.hidden.shape[1]))
    every = max(1, -(-len(tokens.hidden) // min(CHOICE_TOKENS, most)))
    hidden = tokens.hidden[::every]
    outputs = torch.stack(
        [block.output(e, block.activation(e, hidden)) for e in range(block.count)]
    )
    target = _combined(outputs, block.route(hidden))
    kept = list(range(block.count))
    groups, size = block.family.groups, block.count // block.family.groups
    step = max(1, (block.count - keep) // STEPS)
    while len(kept) > keep:
        room = {g: sum(e // size == g for e in kept) - keep // groups for g in range(groups)}
        costs: dict[int, float] = {}
        for expert in kept:
            if room[expert // size]:
                left = torch.tensor([other for other in kept if other != expert])
                made = _combined(outputs, block.route(hidden, left))
                costs[expert] = float((made - target).square().sum())
        for expert in sorted(costs, key=lambda e: (costs[e], e))[: min(step, len(kept) - keep)]:
            if room[expert // size]:
                room[expert // size] -= 1
                kept.remove(expert)
    return torch.tensor(kept)


def _combined(outputs: Tensor, routed: Routed) -> Tensor:
    """Return the gated sum of outputs [experts, tokens, hidden] for tokens routed as given, float32."""
    total = outputs.new_zeros(outputs.shape[1:], dtype=torch.float32)
    rows = torch.arange(outputs.shape[1], device=outputs.device)
    for place in range(routed.index.shape[1]):
        total += outputs[routed.index[:, place], rows] * routed.gates[:, place, None]
    return total


def refitted(
    block: ExpertBlock,
    routed: Routed,
    cut: ExpertsCut,
    target: Tensor,
    *,
    damping: float,
    sweeps: int = SWEEPS,
) -> tuple[ExpertsCut, float]:
    """Refit the output weights of a cut to the dense block's output.

    Parameters
    ----------
    block
        The layer's experts, uncut.
    routed
        The tokens as the router sends them to the kept experts; `index` counts all experts.
    cut
        The experts and neurons to keep and their output weights.
    target
        The dense block's output, [tokens, hidden].
    damping
        Share of the mean energy of an expert's neurons, raised where its tokens are few.
    sweeps
        Rounds over all experts.

    Returns
    -------
    cut
        The same with new output weights, float64.
    error
        What the output lacks, as a share of its energy.
    """
    experts = cut.experts.tolist()
    start = [_with_bias(down.double(), cut, number) for number, down in enumerate(cut.down)]
    start = [weight.to(block.device) for weight in start]
    weights = list(start)
    with torch.inference_mode():
        lacking = target.float().clone()
        for number, expert in enumerate(experts):
            rows, gated = _gated(block, routed, expert, cut, number)
            lacking.index_add_(0, rows, -(gated @ weights[number].T.float()))
        for _ in range(sweeps):
            for number, expert in enumerate(experts):
                rows, gated = _gated(block, routed, expert, cut, number)
                if not len(rows):
                    continue
                new = _solved(
                    start[number],
                    weights[number],
                    gated,
                    lacking[rows],
                    rows,
                    routed,
                    expert,
                    damping,
                )
                change = (new - weights[number]).float()
                lacking.index_add_(0, rows, -(gated @ change.T))
                weights[number] = new
        error = float(lacking.square().sum() / target.float().square().sum().clamp(min=1e-30))
    weights = [weight.cpu() for weight in weights]
    if cut.bias is None:
        return replace(cut, down=tuple(weights)), error
    down = tuple(weight[:, :-1] for weight in weights)
    return replace(cut, down=down, bias=tuple(weight[:, -1] for weight in weights)), error


def _with_bias(down: Tensor, cut: ExpertsCut, number: int) -> Tensor:
    """The weights with the bias as those of one more neuron that is always 1."""
    if cut.bias is None:
        return down
    return torch.cat([down, cut.bias[number].double()[:, None]], dim=1)


def _gated(
    block: ExpertBlock, routed: Routed, expert: int, cut: ExpertsCut, number: int
) -> tuple[Tensor, Tensor]:
    """Return an expert's tokens, and its kept neurons' activations times its gates, float32 [tokens, neurons]."""
    rows, gates = routed.of(expert)
    active = block.activation(expert, routed.hidden[rows]).float()
    active = active[:, cut.neurons[number].to(active.device)]
    if cut.bias is not None:
        active = torch.cat([active, active.new_ones(len(active), 1)], dim=1)
    return rows, active * gates.float()[:, None]


def _solved(
    start: Tensor,
    weight: Tensor,
    gated: Tensor,
    lacking: Tensor,
    rows: Tensor,
    routed: Routed,
    expert: int,
    damping: float,
) -> Tensor:
    """The least-squares weights of one expert for what the output lacks, held near `start`; float64."""
    squares = routed.of(expert)[1].square()
    count = float(squares.sum().square() / squares.square().sum().clamp(min=1e-30))
    total = float(squares.sum().clamp(min=1e-30))
    gram = (gated.T @ gated).double() / total
    missing = (lacking.T @ gated).double() / total + (weight - start) @ gram
    every = torch.arange(start.shape[1], device=start.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DampingWarning)
        share = refit_share(damping, count, start.shape[1])
        return second_order.refit(start, gram, every, damping=share, missing=missing)


def whole(block: ExpertBlock, experts: Sequence[int] | Tensor) -> ExpertsCut:
    """Return the cut that keeps these experts with all their neurons and weights."""
    kept = torch.as_tensor(experts)
    every = torch.arange(block.width)
    biases = [block.bias(int(expert)) for expert in kept]
    return ExpertsCut(
        kept,
        tuple(every for _ in kept),
        tuple(block.down(int(expert)).double().cpu() for expert in kept),
        None if biases[0] is None else tuple(b.double().cpu() for b in biases if b is not None),
    )
