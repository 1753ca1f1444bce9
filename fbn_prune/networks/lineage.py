"""Whether two models have a common origin, by the functional networks that they share (arXiv 2601.22692).

Networks are matched by their time courses on the same text, not by neurons. So the models may differ in shape, and
what leaves a model's function as it is (neurons in another order, rescaled, removed without effect) leaves the score as
it is. All models respond to which word they read, so that is subtracted first: what is left is how a model takes the
context into account, which copies share. The space that the networks span tells copies best, with no matching at all.
This module is pure numerics, independent of models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

THRESHOLD = 0.62
"""Overlap of the spaces that networks span from which on two models are taken to be related.

Half-way between the highest of an unrelated pair, two real models trained on similar text, and the least of a copy in
`eval/quality/lineage_table.py`, with 32 networks from 4096 tokens, but for a model of 260 k parameters rounded to 3
bits. So it was set on the pairs themselves; what models set apart gave, 0.50, called those two
related, and two small models trained alike."""

FORM_WEIGHT = 10.0
"""How much the form and place of a word may explain, relative to which word it is: nearly all that they can."""


@dataclass(frozen=True)
class SharedNetworks:
    """Networks of A beside their partners in B, matched one to one.

    Attributes
    ----------
    partner
        int64 [k of A]; index of the matched network in B, -1 for none (B has fewer).
    correlation
        float64 [k of A]; abs correlation of the two time courses, 0 without a partner.
    chance
        Mean correlation of the matched networks when B's words are moved by half of the text.
    score
        0 for the overlap by chance, 1 for the same time courses: (mean correlation - chance) / (1 - chance).
    """

    partner: Tensor
    correlation: Tensor
    chance: float
    score: float


def beyond_words(courses: Tensor, words: Sequence[tuple[str, int]]) -> Tensor:
    """Subtract what a word itself explains of time courses: which it is, how it looks, where in its passage it is.

    Each is explained by ridge regression: of a word that is there n times, n / (n + 1) of its mean is subtracted.

    Parameters
    ----------
    courses
        Time courses [words, k].
    words
        Each word, with the number of words before it in its passage.

    Returns
    -------
    Tensor
        float64 [words, k].
    """
    number: dict[str, int] = {}
    which = torch.tensor([number.setdefault(word, len(number)) for word, _ in words])
    form = torch.tensor([_form(word, place) for word, place in words], dtype=torch.float64)
    form = (form - form.mean(0)) / form.std(0, correction=0).clamp_min(1e-9)
    # With one column for each word, and K = X Xᵀ / ridge, the residuals are (I + K)^-1 A.
    explained = (which[:, None] == which).double() + FORM_WEIGHT * form @ form.T
    explained.diagonal().add_(1)
    centred = courses.double() - courses.double().mean(0)
    return torch.cholesky_solve(centred, torch.linalg.cholesky(explained))


def _form(word: str, place: int) -> list[float]:
    return [
        math.log1p(place),
        place == 0,
        len(word),
        any(c.isdigit() for c in word),
        word[0].isupper(),
        not word[-1].isalnum(),
        not any(c.isalnum() for c in word),
        word.isalpha(),
    ]


def span_overlap(a: Tensor, b: Tensor) -> float:
    """Return how much the spaces overlap that two models' time courses span: their mean canonical correlation.

    As in :func:`shared_networks`, 0 is the overlap by chance and 1 the same space.

    Parameters
    ----------
    a, b
        Time courses [words, networks] on the same words in the same order.
    """

    def mean(one: Tensor, other: Tensor) -> float:
        return float(torch.linalg.svdvals(one.T @ other).clamp_max(1).mean())

    of_a, of_b = (torch.linalg.qr(m.double() - m.double().mean(0)).Q for m in (a, b))
    chance = mean(of_a, of_b.roll(len(of_b) // 2, 0))
    return (mean(of_a, of_b) - chance) / (1 - chance)


def shared_networks(a: Tensor, b: Tensor) -> SharedNetworks:
    """Match the networks of two models by the abs correlation of their time courses.

    Parameters
    ----------
    a, b
        Time courses [words, networks] on the same words in the same order.
    """
    partner, correlation = _matched(a, b)
    least = min(a.shape[1], b.shape[1])
    _, by_chance = _matched(a, b.roll(len(b) // 2, 0))
    chance, mean = float(by_chance.sum()) / least, float(correlation.sum()) / least
    return SharedNetworks(partner, correlation, chance, (mean - chance) / (1 - chance))


def _matched(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    unit_a, unit_b = (
        torch.nn.functional.normalize(m.double() - m.double().mean(0), dim=0) for m in (a, b)
    )
    matrix = (unit_a.T @ unit_b).abs().clamp_max(1)
    rows, columns = linear_sum_assignment(matrix.numpy(), maximize=True)
    partner = torch.full((a.shape[1],), -1, dtype=torch.int64)
    partner[torch.from_numpy(rows)] = torch.from_numpy(columns)
    found = matrix.gather(1, partner.clamp_min(0)[:, None])[:, 0]
    return partner, torch.where(partner >= 0, found, torch.zeros_like(found))


def centred_gram(gram: Tensor) -> Tensor:
    """Return HKH for a Gram matrix K [n, n], with H the matrix that subtracts the mean; float64."""
    k = gram.double()
    return k - k.mean(0, keepdim=True) - k.mean(1, keepdim=True) + k.mean()


def linear_cka(a: Tensor, b: Tensor) -> float:
    """Return linear centred kernel alignment, from 0 to 1, of two Gram matrices [n, n] of the same n samples.

    Kornblith et al., "Similarity of Neural Network Representations Revisited" (arXiv 1905.00414).
    """
    x, y = centred_gram(a), centred_gram(b)
    norm = x.norm() * y.norm()
    return float((x * y).sum() / norm) if float(norm) > 0 else 0.0
