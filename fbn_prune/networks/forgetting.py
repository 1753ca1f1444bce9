"""Which neurons a skill needs and the rest does not: by their own activity, or by networks that the examples engage.

A network is the skill's own if the skill's text engages it more than other text does. Its key neurons are those with
the largest weights in its map. `eval/quality/forget_table.py` compares this with the ratio of activity of single
neurons (arXiv 2403.01267). This module is pure numerics, independent of models.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Strengths of erasing to try first: how much the output on the skill's text counts beside that on other text."""

ROUNDS = 20
"""Most rounds of the search for the boundary between text like the examples and other text."""


def selectivity(skill: Tensor, rest: Tensor) -> Tensor:
    """Return how much more a skill engages each network than the rest does: log of the ratio, at least 0.

    Parameters
    ----------
    skill, rest
        Engagement (mean square of the time course) of each network on either text, [networks].

    Returns
    -------
    Tensor
        float64 [networks].
    """
    tiny = torch.finfo(torch.float64).tiny
    ratio = skill.double().clamp_min(tiny) / rest.double().clamp_min(tiny)
    return ratio.log().clamp_min(0)


def key_neurons(maps: Tensor, selective: Tensor) -> Tensor:
    """Return how much each neuron belongs to the skill, float64 [N]: sum over networks of selectivity * z².

    Parameters
    ----------
    maps
        z-scored maps [networks, N].
    selective
        [networks], from :func:`selectivity`.
    """
    return selective.double() @ maps.double().square()


def activity_ratio(skill: Tensor, rest: Tensor) -> Tensor:
    """Return how much more active each neuron is on a skill's text, float64 [N] (selective pruning, arXiv 2403.01267).

    Parameters
    ----------
    skill, rest
        Mean absolute activation of each neuron on either text, [N].
    """
    floor = 1e-6 * float(rest.double().mean()) + torch.finfo(torch.float64).tiny
    return skill.double() / (rest.double() + floor)


def alike(generic: Tensor, examples: Tensor) -> Tensor:
    """Return which generic documents are like the examples, bool [documents].

    The score of a document is the cosine of its standardised function vector and the examples' mean vector. A document
    is like the examples if its score is nearer to theirs than to that of the other documents (means of the two).

    Parameters
    ----------
    generic, examples
        Features of documents, [documents, features].
    """
    std, mean = torch.std_mean(generic.double(), dim=0, correction=0)
    scale = torch.where(std > 1e-12, std.reciprocal(), torch.zeros_like(std))
    of_generic, of_examples = ((x.double() - mean) * scale for x in (generic, examples))
    direction = of_examples.mean(0)
    own = torch.nn.functional.cosine_similarity(of_examples, direction[None], dim=1).mean()
    scores = torch.nn.functional.cosine_similarity(of_generic, direction[None], dim=1)
    boundary = own
    for _ in range(ROUNDS):
        others = scores[scores < boundary]
        if not len(others):
            break
        before, boundary = boundary, (own + others.mean()) / 2
        if boundary == before:
            break
    return scores >= boundary


def candidate_sizes(neurons: int, steps: int = 10) -> list[int]:
    """Return growing numbers of neurons to try, each about 1.7 times the last, up to a quarter of all."""
    largest = max(1, neurons // 4)
    return sorted({max(1, round(largest / 1.7**step)) for step in range(steps)})


def between(low: float, high: float, steps: int = 4) -> list[int]:
    """Return whole numbers between two sizes, for a closer look."""
    return sorted(
        {round(low + (high - low) * i / (steps + 1)) for i in range(1, steps + 1)} - {low, high}
    )


def strengths_between(low: float, high: float, steps: int = 3) -> list[float]:
    """Return strengths of erasing between two, in equal ratios, for a closer look."""
    return [low * (high / low) ** (i / (steps + 1)) for i in range(1, steps + 1)]


def largest_within(costs: Sequence[tuple[float, float]], most: float) -> float:
    """Return the largest dial below which none costs more than `most`; 0 if the smallest does.

    Parameters
    ----------
    costs
        Dials (numbers of neurons, or strengths), and what they cost.
    """
    found = 0.0
    for dial, cost in sorted(costs):
        if cost > most:
            break
        found = dial
    return found


def marked(scores: Tensor, count: int) -> Tensor:
    """Return what a neuron is worth to the rest, float64 [N]: below 0 for the `count` highest scores, else above."""
    worth = scores.max() - scores.double() + 1
    chosen = torch.argsort(scores, descending=True, stable=True)[:count]
    worth[chosen] *= -1
    return worth
