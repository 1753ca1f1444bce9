"""Weight generic documents by how similarly they use a model's functional networks to a task's few examples.

A few examples of a task are too few for calibration: statistics from them alone overfit, and added to generic text
they have too little weight. But they are enough to show which networks the task engages, and generic documents that
engage the same networks can replace more examples. A document's function vector is its mean time course (one number
per network), standardised over the generic documents; the task's function vector is the mean over its examples. The
means are signed, because a network's two directions are different functions.

This module is pure numerics in float64, independent of models and texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SHARPNESS = 3.0
"""How steeply a document's weight grows with its standardised score. Chosen among 0.75, 1.5, 3 and 6 on the embedded
model only, by `eval/quality/task_table.py --model builtin --tune` on calibration text that nothing else used
(`eval/results/task_tuning_builtin.json`). At 1.5, documents of other kinds keep a quarter to a third of the
weight; at 6, too few documents remain."""

EXAMPLES_SHARE = 0.3
"""Share of the statistics that the task's own examples get, whatever their number."""


@dataclass(frozen=True)
class FunctionMatch:
    """How well generic documents match a task.

    Attributes
    ----------
    vector
        The task's function vector, float64 [networks], in standard deviations over the generic documents.
    networks
        The networks used for the match, ordered by abs(vector), largest first.
    scores
        Cosine between each generic document's vector and the task's on those networks, float64 [documents].
    weights
        Weight of each generic document in the statistics, float64 [documents], with mean 1.
    """

    vector: Tensor
    networks: list[int]
    scores: Tensor
    weights: Tensor


def standardised(activity: Tensor, generic: Tensor) -> Tensor:
    """Standardise `activity` [..., networks] by the mean and standard deviation of `generic` [documents, networks]."""
    std, mean = torch.std_mean(generic, dim=0, correction=0)
    # A network that is equally active in every document says nothing about a task.
    scale = torch.where(std > 1e-12, std.reciprocal(), torch.zeros_like(std))
    return (activity - mean) * scale


def match_documents(
    generic: Tensor, examples: Tensor, networks: int, *, sharpness: float = SHARPNESS
) -> FunctionMatch:
    """Weight generic documents by how similar their use of the networks is to the task's.

    Parameters
    ----------
    generic, examples
        Mean time course of each document, float64 [documents, networks], or any other features of documents.
    networks
        Number of networks to match on: those with the largest abs value in the task's vector.
    sharpness
        See :data:`SHARPNESS`.
    """
    vector = standardised(examples, generic).mean(0)
    strongest = torch.argsort(vector.abs(), descending=True, stable=True)[:networks]
    scores = torch.nn.functional.cosine_similarity(
        standardised(generic, generic)[:, strongest], vector[strongest][None], dim=1
    )
    return FunctionMatch(vector, strongest.tolist(), scores, score_weights(scores, sharpness))


def score_weights(scores: Tensor, sharpness: float = SHARPNESS) -> Tensor:
    """Return exp(sharpness * standardised score), normalised to mean 1; float64 [documents]."""
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
    """Return the weight of each token in statistics over generic documents and examples together.

    The examples together get `examples_share` of the total weight. The rest is divided among the generic documents in
    proportion to their weight (`generic`, [documents]) times their tokens.

    Returns
    -------
    tuple of Tensor
        Weights per token, float64 [documents] and [examples]; their mean over all tokens is 1.
    """
    lengths = torch.tensor(generic_tokens, dtype=torch.float64)
    total = float(lengths.sum()) + sum(example_tokens)
    of_generic = generic * (1 - examples_share) * total / (generic * lengths).sum()
    of_examples = torch.full(
        (len(example_tokens),), examples_share * total / sum(example_tokens), dtype=torch.float64
    )
    return of_generic, of_examples
