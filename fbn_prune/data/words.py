"""Passages of text as tokens that know their word, so that models with different tokenizers can be compared.

A word is a run of characters without white space. A token belongs to the word that holds its last character; tokens of
white space, and those that a tokenizer puts before a text, belong to none.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fbn_prune.data.calibration import MIN_BLOCK_TOKENS, TokenBlocks, prefix_ids
from fbn_prune.errors import InvalidInput

_WORD = re.compile(r"\S+")


@dataclass(frozen=True)
class Passages:
    """Passages of one text.

    Attributes
    ----------
    texts
        The passages.
    starts
        For each passage, the number of words in those before it.
    words
        Number of words in all.
    """

    texts: tuple[str, ...]
    starts: tuple[int, ...]
    words: int

    def spelled(self) -> list[tuple[str, int]]:
        """Return every word, with the number of words before it in its passage."""
        return [
            (match.group(), place)
            for text in self.texts
            for place, match in enumerate(_WORD.finditer(text))
        ]


@dataclass(frozen=True)
class WordBlocks:
    """One block of tokens for each passage, and for each of its tokens the number of its word, or -1."""

    blocks: TokenBlocks
    word_of: tuple[Tensor, ...]


def cut_passages(documents: Iterable[str], characters: int, words: int) -> Passages:
    """Cut documents into passages of at most about `characters` characters, until there are `words` words.

    Raises
    ------
    InvalidInput
        There are fewer than 64 words.
    """
    texts: list[str] = []
    starts: list[int] = []
    total = 0
    for document in documents:
        spans = [match.span() for match in _WORD.finditer(document)]
        while spans and total < words:
            first = spans[0][0]
            inside = list(itertools.takewhile(lambda s: s[1] <= first + characters, spans))  # noqa: B023
            inside = inside or spans[:1]
            texts.append(document[first : inside[-1][1]])
            starts.append(total)
            total += len(inside)
            spans = spans[len(inside) :]
        if total >= words:
            break
    if total < 64:
        raise InvalidInput(f"the text has only {total} words: give more to compare models on")
    return Passages(tuple(texts), tuple(starts), total)


def word_blocks(passages: Passages, tokenizer: Any, context: int) -> WordBlocks:
    """Tokenize passages; what is longer than `context` tokens is cut off.

    Raises
    ------
    InvalidInput
        The tokenizer does not say where in the text its tokens are.
    """
    prefix = prefix_ids(tokenizer)
    blocks: list[Tensor] = []
    word_of: list[Tensor] = []
    for text, start in zip(passages.texts, passages.starts, strict=True):
        try:
            found = tokenizer(
                text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
        except NotImplementedError:
            raise InvalidInput(
                f"the tokenizer ({type(tokenizer).__name__}) does not say where its tokens are in a text: "
                "a fast one (tokenizer.json) is needed"
            ) from None
        place = torch.full((len(text) + 1,), -1, dtype=torch.int64)
        for number, match in enumerate(_WORD.finditer(text)):
            place[match.start() : match.end()] = start + number
        body = context - len(prefix)
        ids, offsets = list(found["input_ids"])[:body], list(found["offset_mapping"])[:body]
        if len(prefix) + len(ids) < MIN_BLOCK_TOKENS:
            continue
        words = [int(place[end - 1]) if end > begin else -1 for begin, end in offsets]
        blocks.append(torch.tensor([*prefix, *ids], dtype=torch.int64))
        word_of.append(torch.tensor([-1] * len(prefix) + words, dtype=torch.int64))
    return WordBlocks(TokenBlocks(tuple(blocks), context, ("passages",)), tuple(word_of))


def by_word(
    values: Sequence[Tensor], word_of: Sequence[Tensor], words: int
) -> tuple[Tensor, Tensor]:
    """Average values over the tokens of each word.

    Parameters
    ----------
    values
        [tokens, features] of each block.
    word_of
        The word of each token, int64 [tokens] for each block; -1 for none.

    Returns
    -------
    tuple of Tensor
        Means [words, features], 0 for a word without a token; and bool [words], whether it has one.
    """
    rows, places = torch.cat(list(values)), torch.cat(list(word_of)).to(values[0].device)
    inside = places >= 0
    sums = rows.new_zeros(words, rows.shape[1]).index_add_(0, places[inside], rows[inside])
    counts = torch.bincount(places[inside], minlength=words)
    return sums / counts.clamp_min(1)[:, None], counts > 0
