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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fbn_prune.model.expert_block import ExpertBlock
from fbn_prune.model.routed import ExpertsCut, Routed
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

PART = 4096
"""Tokens for which the experts compute at once."""

Scores = Callable[[ExpertBlock, Routed, int], Tensor]


def block_output(block: ExpertBlock, tokens: Routed) -> Tensor:
    """Return the gated sum of the experts' outputs, [tokens, hidden]."""
    found = torch.empty_like(tokens.hidden)
    with torch.inference_mode():
        for start in range(0, len(tokens.hidden), PART):
            part = slice(start, start + PART)
            found[part] = block.experts(tokens.hidden[part], tokens.index[part], tokens.gates[part])
    return found


def reap(block: ExpertBlock, tokens: Routed, seed: int) -> Tensor:
    """Return each expert's mean of gate times output norm over its tokens, float64 [experts]; 0 without tokens."""
    scores = torch.zeros(block.count, dtype=torch.float64)
    for expert in range(block.count):
        rows, gates = tokens.of(expert)
        counts = tokens.counts(rows)
        total = 0.0
        for part in torch.arange(len(rows), device=rows.device).split(PART):
            output = block.output(expert, block.activation(expert, tokens.hidden[rows[part]]))
            total += float((output.double().norm(dim=1) * gates[part] * counts[part]).sum())
        scores[expert] = total / max(float(counts.sum()), 1e-30)
    return scores


def frequency(block: ExpertBlock, tokens: Routed, seed: int) -> Tensor:
    """Return the number of each expert's tokens, float64 [experts]."""
    every = torch.arange(len(tokens.index), device=tokens.index.device)
    each = tokens.counts(every)[:, None].expand(tokens.index.shape).flatten()
    return torch.bincount(tokens.index.flatten(), each, minlength=block.count).double().cpu()


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
    counts = tokens.counts(torch.arange(len(tokens.hidden), device=hidden.device)[::every]).float()
    outputs = hidden.new_empty(block.count, *hidden.shape)
    for expert in range(block.count):
        outputs[expert] = block.output(expert, block.activation(expert, hidden))
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
                costs[expert] = float((made - target).square().sum(1) @ counts)
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
        The same with new output weights, float32.
    error
        What the output lacks, as a share of its energy.
    """
    experts = cut.experts.tolist()
    start = [_with_bias(down, cut, number) for number, down in enumerate(cut.down)]
    start = [weight.to(block.device) for weight in start]
    weights = list(start)
    with torch.inference_mode():
        every = torch.arange(len(target), device=target.device)
        lacking = target.float() * routed.counts(every).sqrt().float()[:, None]
        energy = lacking.square().sum()
        for number, expert in enumerate(experts):
            tokens = _Tokens(block, routed, expert, cut, number)
            tokens.add_output(lacking, -weights[number])
        for _ in range(sweeps):
            for number, expert in enumerate(experts):
                tokens = _Tokens(block, routed, expert, cut, number)
                if not len(tokens.rows):
                    continue
                old = weights[number].double()
                new = tokens.solved(start[number].double(), old, lacking, damping)
                tokens.add_output(lacking, old - new)
                weights[number] = new.float()
        error = float(lacking.square().sum() / energy.clamp(min=1e-30))
    weights = [weight.cpu() for weight in weights]
    if cut.bias is None:
        return replace(cut, down=tuple(weights)), error
    down = tuple(weight[:, :-1] for weight in weights)
    return replace(cut, down=down, bias=tuple(weight[:, -1] for weight in weights)), error


def _with_bias(down: Tensor, cut: ExpertsCut, number: int) -> Tensor:
    """The weights with the bias as those of one more neuron that is always 1."""
    if cut.bias is None:
        return down
    return torch.cat([down, cut.bias[number].to(down)[:, None]], dim=1)


class _Tokens:
    """An expert's tokens with the activations of its kept neurons times gate and root of the token's weight.

    The activations are held where they are few, and computed anew in parts where they are many.
    """

    def __init__(
        self, block: ExpertBlock, routed: Routed, expert: int, cut: ExpertsCut, number: int
    ) -> None:
        self._block, self._routed, self._expert = block, routed, expert
        self._neurons = cut.neurons[number].to(block.device)
        self._with_bias = cut.bias is not None
        self.rows, gates = routed.of(expert)
        self._factors = gates * routed.counts(self.rows).sqrt()
        self._held: list[tuple[Tensor, Tensor]] | None = None

    def _parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield some of the tokens, and their activations, float32 [tokens, neurons]."""
        if self._held is None and len(self.rows) <= PART:
            self._held = [(self.rows, self._gated(self.rows, self._factors))]
        if self._held is not None:
            yield from self._held
            return
        for rows, factors in zip(self.rows.split(PART), self._factors.split(PART), strict=True):
            yield rows, self._gated(rows, factors)

    def _gated(self, rows: Tensor, factors: Tensor) -> Tensor:
        active = self._block.activation(self._expert, self._routed.hidden[rows]).float()
        active = active[:, self._neurons]
        if self._with_bias:
            active = torch.cat([active, active.new_ones(len(active), 1)], dim=1)
        return active * factors.float()[:, None]

    def add_output(self, total: Tensor, weight: Tensor) -> None:
        """Add the expert's output with these weights [hidden, neurons] to float32 [tokens, hidden] in place."""
        for rows, gated in self._parts():
            total.index_add_(0, rows, gated @ weight.T.float())

    def solved(self, start: Tensor, weight: Tensor, lacking: Tensor, damping: float) -> Tensor:
        """Return the least-squares weights for what the output lacks with `weight`, held near `start`; float64."""
        squares = self._factors.square()
        count = float(squares.sum().square() / squares.square().sum().clamp(min=1e-30))
        total = float(squares.sum().clamp(min=1e-30))
        gram, missing = weight.new_zeros(weight.shape[1], weight.shape[1]), torch.zeros_like(weight)
        for rows, gated in self._parts():
            gram += gated.T @ gated
            missing += lacking[rows].T @ gated
        gram /= total
        missing = missing / total + (weight - start) @ gram
        every = torch.arange(start.shape[1], device=start.device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DampingWarning)
            share = refit_share(damping, count, start.shape[1])
            return second_order.refit(start, gram, every, damping=share, missing=missing)


def whole(block: ExpertBlock, experts: Sequence[int] | Tensor) -> ExpertsCut:
    """Return the cut that keeps these experts with all their neurons; its weights are views of the block's."""
    kept = torch.as_tensor(experts)
    every = torch.arange(block.width)
    biases = [block.bias(int(expert)) for expert in kept]
    return ExpertsCut(
        kept,
        tuple(every for _ in kept),
        tuple(block.down(int(expert)) for expert in kept),
        None if biases[0] is None else tuple(b for b in biases if b is not None),
    )
