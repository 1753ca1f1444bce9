"""How well few features tell the labels of texts: k features chosen on one half of the texts, judged on the other.

The features are any description of a text: the mean time courses of functional networks, those of principal
components, mean activations of neurons. So descriptions can be compared at equal numbers of features (sparse probing,
arXiv 2305.01610). This module is pure numerics, independent of models and texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import train_test_split
from torch import Tensor

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]

Pooling = Literal["rms", "mean"]

COUNTS = (1, 2, 5)
"""Numbers of features to probe with."""


@dataclass(frozen=True)
class Probed:
    """The features that a probe chose, best first, and its balanced accuracy on the other half, from 0 to 1."""

    features: list[int]
    accuracy: float


def pooled(values: Tensor, lengths: Sequence[int], pooling: Pooling = "rms") -> Tensor:
    """Return one value of each feature for each text, [texts, features].

    Parameters
    ----------
    values
        [tokens, features]; the tokens of the texts follow one another.
    lengths
        Number of tokens of each text.
    pooling
        "rms": the root mean square over the text's tokens, which is how strongly a network is engaged; "mean": the
        mean. On the embedded model, networks told labels better by the former (`eval/quality/probe_table.py`).
    """
    parts = torch.split(values, list(lengths))
    if pooling == "mean":
        return torch.stack([part.mean(0) for part in parts])
    return torch.stack([part.square().mean(0).sqrt() for part in parts])


def choose(features: Floats, labels: Ints, count: int) -> list[int]:
    """Return the features that together tell the labels best, by forward selection with least squares.

    Each step takes the feature that explains most of what the former ones leave of the labels' indicator variables
    (orthogonal least squares; Chen, Billings and Luo, 1989). The first is the feature with the largest ratio of the
    variance between labels to that within them.

    Parameters
    ----------
    features
        [texts, features].
    labels
        [texts]; a whole number for each label.
    count
        Number of features to choose; fewer if the others are constant, or repeat them.

    Returns
    -------
    list of int
        Indices of features in the order of their choice.
    """
    x = np.asarray(features, dtype=np.float64)
    x = x - x.mean(0)
    scale = np.sqrt(np.square(x).sum(0))
    x = x / np.where(scale > 0, scale, 1)
    targets = (labels[:, None] == np.unique(labels)[None]).astype(np.float64)
    targets -= targets.mean(0)
    chosen: list[int] = []
    for _ in range(min(count, x.shape[1])):
        left = np.square(x).sum(0)  # of each feature, what the chosen ones do not explain
        gain = np.square(x.T @ targets).sum(1) / np.where(left > 1e-9, left, np.inf)
        best = int(gain.argmax())
        if not gain[best] > 0:
            break
        chosen.append(best)
        direction = x[:, best] / np.sqrt(left[best])
        targets = targets - np.outer(direction, direction @ targets)
        x = x - np.outer(direction, direction @ x)
    return chosen


def halves(labels: Ints, seed: int, each: int | None = None) -> tuple[Ints, Ints]:
    """Return the indices of a training and a test half, with equal shares of every label in both.

    Parameters
    ----------
    each
        Train on so many texts of every label instead of on half of them, and test on all others.
    """
    if each is not None:
        shuffled = np.random.default_rng(seed).permutation(len(labels))
        rows = [shuffled[labels[shuffled] == label] for label in np.unique(labels)]
        return (
            np.sort(np.concatenate([row[:each] for row in rows])),
            np.sort(np.concatenate([row[each:] for row in rows])),
        )
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.5, random_state=seed, stratify=labels
    )
    return np.sort(train), np.sort(test)


def probe(
    features: Floats, labels: Ints, train: Ints, test: Ints, counts: Sequence[int] = COUNTS
) -> dict[int, Probed]:
    """Choose features and fit a logistic regression on one half of the texts, and judge it on the other.

    Parameters
    ----------
    features
        [texts, features].
    labels
        [texts]; a whole number for each label.
    train, test
        Indices of the texts of each half, as from :func:`halves`.
    counts
        Numbers of features; each takes the first ones of the same order.

    Returns
    -------
    dict of int to Probed
        For each number, the features and the balanced accuracy: the mean over labels of the share told right.
    """
    order = choose(features[train], labels[train], max(counts))
    mean, std = features[train].mean(0), features[train].std(0)
    found: dict[int, Probed] = {}
    for count in counts:
        taken = order[:count]
        scale = np.where(std[taken] > 0, std[taken], 1)
        z = (features[:, taken] - mean[taken]) / scale
        model = LogisticRegression(max_iter=1000).fit(z[train], labels[train])
        accuracy = balanced_accuracy_score(labels[test], model.predict(z[test]))
        found[count] = Probed(taken, float(accuracy))
    return found


def probe_all(
    descriptions: Mapping[str, Sequence[Floats]],
    labels: Ints,
    seeds: Sequence[int],
    counts: Sequence[int] = COUNTS,
    each: int | None = None,
) -> dict[str, list[dict[int, Probed]]]:
    """Probe every description with every split into halves.

    Parameters
    ----------
    descriptions
        Name -> features [texts, features]; several for a description that is drawn at random, one for each draw.
    seeds
        One for each split; split number i uses draw number i, and begins again where there are fewer draws.
    each
        See :func:`halves`.

    Returns
    -------
    dict of str to list
        For each description, the result of :func:`probe` for each seed.
    """
    splits = [halves(labels, seed, each) for seed in seeds]
    return {
        name: [
            probe(draws[i % len(draws)], labels, *split, counts) for i, split in enumerate(splits)
        ]
        for name, draws in descriptions.items()
    }
