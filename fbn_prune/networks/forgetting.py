"""Which neurons a skill needs and the rest does not, by the networks that the skill's examples engage.

A network is the skill's own if the skill's text engages it more than other text does. Its key neurons are those with
the largest weights in its map. This module is pure numerics, independent of models.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

KEEPING = 0.1
"""Share of the skill's own examples that may look like other text, when text like them is looked for."""


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


def alike(generic: Tensor, examples: Tensor) -> Tensor:
    """Return which generic documents are like the examples, bool [documents].

    The score of a document is the projection of its standardised function vector on the examples' mean vector. A
    document is like the examples if it scores as high as all but :data:`KEEPING` of them do.

    Parameters
    ----------
    generic, examples
        Features of documents, [documents, features].
    """
    std, mean = torch.std_mean(generic.double(), dim=0, correction=0)
    scale = torch.where(std > 1e-12, std.reciprocal(), torch.zeros_like(std))
    of_generic, of_examples = ((x.double() - mean) * scale for x in (generic, examples))
    direction = of_examples.mean(0)
    own = torch.nn.functional.cosine_similarity(of_examples, direction[None], dim=1)
    scores = torch.nn.functional.cosine_similarity(of_generic, direction[None], dim=1)
    return scores >= torch.quantile(own, KEEPING).clamp_min(0)


def candidate_sizes(neurons: int, steps: int = 10) -> list[int]:
    """Return growing numbers of neurons to try, each about 1.7 times the last, up to a quarter of all."""
    largest = max(1, neurons // 4)
    return sorted({max(1, round(largest / 1.7**step)) for step in range(steps)})


def between(low: int, high: int, steps: int = 4) -> list[int]:
    """Return numbers between two sizes, for a closer look."""
    return sorted(
        {low + round((high - low) * i / (steps + 1)) for i in range(1, steps + 1)} - {low, high}
    )


def largest_within(costs: Sequence[tuple[int, float]], most: float) -> int:
    """Return the largest size below which no size costs more than `most`; 0 if the smallest does.

    Parameters
    ----------
    costs
        Sizes and what they cost.
    """
    found = 0
    for size, cost in sorted(costs):
        if cost > most:
            break
        found = size
    return found


def marked(scores: Tensor, count: int) -> Tensor:
    """Return what a neuron is worth to the rest, float64 [N]: below 0 for the `count` highest scores, else above."""
    worth = scores.max() - scores.double() + 1
    chosen = torch.argsort(scores, descending=True, stable=True)[:count]
    worth[chosen] *= -1
    return worth
