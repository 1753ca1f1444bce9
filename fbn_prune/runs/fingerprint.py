"""Compare the functional networks of two checkpoints on the same text (the `fingerprint` command)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fbn_prune.data.documents import read_documents
from fbn_prune.data.words import Passages, by_word, cut_passages, word_blocks
from fbn_prune.errors import InvalidInput
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.networks.activity import time_courses
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.networks.lineage import (
    THRESHOLD,
    SharedNetworks,
    beyond_words,
    linear_cka,
    shared_networks,
    span_overlap,
)
from fbn_prune.progress import StageClock
from fbn_prune.recipe import Recipe
from fbn_prune.runs.study import open_study, with_networks

WORDS = 2048
"""Words that networks are compared on."""

PASSAGE_CHARACTERS, CHARACTERS_A_WORD = 200, 8


@dataclass(frozen=True)
class Fingerprint:
    """What a model does on the words of a text.

    Attributes
    ----------
    courses
        Mean time course of each network in each word, float64 [words, networks].
    gram
        Inner products of the plain activations of all neurons, float64 [words, words].
    seen
        bool [words]: whether the model was shown the word.
    """

    model: str
    courses: Tensor
    gram: Tensor
    seen: Tensor


@dataclass(frozen=True)
class Lineage:
    """How alike two models are.

    Attributes
    ----------
    shared
        The networks that they share, by what words do not explain of their time courses.
    span
        How much the spaces of these time courses overlap, which the verdict goes by.
    cka
        Linear CKA of their plain activations, for comparison.
    words
        Number of words that both were shown.
    """

    models: tuple[str, str]
    shared: SharedNetworks
    span: float
    cka: float
    words: int

    @property
    def related(self) -> bool:
        """Whether the spaces' overlap is at least the threshold."""
        return self.span >= THRESHOLD

    def to_json(self) -> dict[str, Any]:
        """Return all figures as JSON values."""
        shared = self.shared
        return {
            "models": list(self.models),
            "score": shared.score,
            "span": self.span,
            "threshold": THRESHOLD,
            "related": self.related,
            "chance": shared.chance,
            "cka": self.cka,
            "words": self.words,
            "networks": [
                {"a": a, "b": b, "correlation": c}
                for a, (b, c) in enumerate(
                    zip(shared.partner.tolist(), shared.correlation.tolist(), strict=True)
                )
                if b >= 0
            ],
        }


def run_fingerprint(recipe: Recipe, other: str, clock: StageClock) -> Lineage:
    """Compare a recipe's model with another; see :func:`fbn_prune.api.fingerprint`."""
    passages = passages_of(recipe.calibration)
    found = []
    for model in (recipe.model, other):
        clock.note(f"model {model}")
        study = open_study(recipe.model_copy(update={"model": model}), clock)
        on = with_networks(study)
        found.append(
            fingerprint(
                model,
                on.adapter,
                on.tokenizer,
                on.networks,
                passages,
                context=on.prepared.context,
                batch_tokens=on.prepared.batch_tokens,
                clock=clock,
            )
        )
        del study, on
    return compare_fingerprints(found[0], found[1], passages)


def passages_of(sources: Iterable[str], words: int = WORDS) -> Passages:
    """Return passages of the sources, as many words of each, until there are `words`.

    Raises
    ------
    InvalidInput
        A source cannot be read, or all have too few words.
    """
    names = list(sources)
    each = -(-words // len(names))
    documents: list[str] = []
    for name in names:
        found = list(read_documents(name, characters=each * CHARACTERS_A_WORD))
        share = max(PASSAGE_CHARACTERS, each * CHARACTERS_A_WORD // max(1, len(found)))
        documents += [document[:share] for document in found]
    return cut_passages(documents, PASSAGE_CHARACTERS, words)


def fingerprint(
    name: str,
    adapter: ModelAdapter,
    tokenizer: Any,
    networks: FunctionalNetworks,
    passages: Passages,
    *,
    context: int,
    batch_tokens: int,
    clock: StageClock,
) -> Fingerprint:
    """Return what a model does on passages: its networks' time courses, and inner products of its activations."""
    found = word_blocks(passages, tokenizer, context)
    batches = found.blocks.batches(batch_tokens)
    word_of = [found.word_of[i] for i in found.blocks.batch_order()]
    gram = torch.zeros(passages.words, passages.words, dtype=torch.float64)
    rows: list[Tensor] = []
    scales = networks.by_layer(networks.std)
    means = networks.by_layer(networks.mean)

    def watch(layer: int, index: int, z: Tensor) -> None:
        rows.append(z.cpu() * scales[layer] + means[layer])
        if index == len(batches) - 1:
            of_words, _ = by_word(rows, word_of, passages.words)
            gram.add_((of_words @ of_words.T).double())
            rows.clear()

    courses, seen = by_word(
        time_courses(adapter, networks, batches, clock, watch), word_of, passages.words
    )
    return Fingerprint(name, courses, gram, seen)


def compare_fingerprints(a: Fingerprint, b: Fingerprint, passages: Passages) -> Lineage:
    """Compare two models on the words of `passages` that both were shown.

    Raises
    ------
    InvalidInput
        These are fewer than 64.
    """
    both = a.seen & b.seen
    words = int(both.sum())
    if words < 64:
        raise InvalidInput(f"both models were shown only {words} words: give more text")
    cka = linear_cka(a.gram[both][:, both], b.gram[both][:, both])
    left_of_a, left_of_b = courses_beyond_words(a, b, passages)
    return Lineage(
        (a.model, b.model),
        shared_networks(left_of_a, left_of_b),
        span_overlap(left_of_a, left_of_b),
        cka,
        words,
    )


def courses_beyond_words(
    a: Fingerprint, b: Fingerprint, passages: Passages
) -> tuple[Tensor, Tensor]:
    """Return what words do not explain of both time courses, on the words that both were shown."""
    both = a.seen & b.seen
    words = [word for word, seen in zip(passages.spelled(), both.tolist(), strict=True) if seen]
    left = beyond_words(torch.cat([a.courses[both], b.courses[both]], 1), words)
    return left[:, : a.courses.shape[1]], left[:, a.courses.shape[1] :]
