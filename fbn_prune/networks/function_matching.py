"""Which generic documents use a model as a task does, judged by its functional networks.

A few examples of a task are too few to calibrate on: statistics of them alone overfit, and mixed in they drown. But
they suffice to say which networks the task engages, and generic documents that engage the same ones can stand in for
the task's own. A document's function vector is its mean time course, one number a network, standardised over the
generic documents; the task's is the mean over its examples. Signed means are used, not powers: a network's two
directions are different functions.

Pure numerics in float64: nothing here knows of models or texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SHARPNESS = 3.0
"""How steeply a document's weight grows with its standardised score. Chosen among 0.75, 1.5, 3 and 6 on the embedded
model alone, measured on calibration text that took no other part (`eval/quality/task_table.py --model builtin --tune`,
`eval/results/task_tuning_builtin.json`). At 1.5 a quarter to a third of the weight stays with documents of other kinds;
at 6 too few documents are left."""

EXAMPLES_SHARE = 0.3
"""The part of the statistics that the task's own examples get, however few they are."""


@dataclass(frozen=True)
class FunctionMatch:
    """How generic documents match a task.

    Attributes
    ----------
    vector
        The task's function vector, float64 [networks], in standard deviations over generic documents.
    networks
        The networks that the match was made on, by falling abs(vector).
    scores
        Cosine of each generic document's vector and the task's on those networks, float64 [documents].
    weights
        What each generic document counts in statistics, float64 [documents], of mean 1.
    """

    vector: Tensor
    networks: list[int]
    scores: Tensor
    weights: Tensor


def standardised(activity: Tensor, generic: Tensor) -> Tensor:
    """`activity` [..., networks] in means and standard deviations of `generic` [documents, networks]."""
    std, mean = torch.std_mean(generic, dim=0, correction=0)
    # A network that is equally active in every document tells nothing of a task.
    scale = torch.where(std > 1e-12, std.reciprocal(), torch.zeros_like(std))
    return (activity - mean) * scale


def match_documents(
    generic: Tensor, examples: Tensor, networks: int, *, sharpness: float = SHARPNESS
) -> FunctionMatch:
    """Weigh generic documents by how alike a task's they use the networks.

    Parameters
    ----------
    generic, examples
        Mean time course of each document, float64 [documents, networks] (or any other description of documents
        by one number a feature).
    networks
        How many networks to match on: those on which the task stands out most.
    """
    vector = standardised(examples, generic).mean(0)
    strongest = torch.argsort(vector.abs(), descending=True, stable=True)[:networks]
    scores = torch.nn.functional.cosine_similarity(
        standardised(generic, generic)[:, strongest], vector[strongest][None], dim=1
    )
    return FunctionMatch(vector, strongest.tolist(), scores, score_weights(scores, sharpness))


def score_weights(scores: Tensor, sharpness: float = SHARPNESS) -> Tensor:
    """exp(sharpness * standardised score), normalised to mean 1; float64 [documents]."""
    std, mean = torch.std_mean(scores, correction=0)
    standard = (scores - mean) / std if float(std) > 1e-12 else torch.zeros_like(scores)
    weights = torch.exp(sharpness * standard)
    return weights / weights.mean()


def mixture_weights(
    generic: Tensor,
    generic_tokens: Sequence[int],
    example_tokens: Sequence[int],
    *,
    examples_share: float = EXAMPLES_SHARE,
) -> tuple[Tensor, Tensor]:
    """The weight of every token of each generic document and of each example in joint statistics.

    Together the examples get `examples_share` of the weight and the generic documents the rest, divided among them by
    `generic` (weights of documents, [documents]) times their tokens.

    Returns
    -------
    Two float64 tensors, [documents] and [examples]; over all tokens their mean is 1.
    """
    lengths = torch.tensor(generic_tokens, dtype=torch.float64)
    total = float(lengths.sum()) + sum(example_tokens)
    of_generic = generic * (1 - examples_share) * total / (generic * lengths).sum()
    of_examples = torch.full(
        (len(example_tokens),), examples_share * total / sum(example_tokens), dtype=torch.float64
    )
    return of_generic, of_examples
