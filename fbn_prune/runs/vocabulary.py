"""Choose the tokens that a model keeps from the texts that use them, and measure the choice on held-out text.

The vocabulary that is written has the tokens of all text. For the measurement on held-out text it is chosen once more
without that text, so that the figures are those of text that the choice has not seen.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from fbn_prune.data.documents import read_documents
from fbn_prune.data.forms import Reading
from fbn_prune.data.pieces import (
    Content,
    ascii_tokens,
    batches,
    check_content,
    closed,
    count_tokens,
    encoded,
    tokens_of_characters,
    trimmed,
)
from fbn_prune.errors import InvalidInput
from fbn_prune.export.shards import write_json
from fbn_prune.export.writer import copy_companions, write_tokenizer
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.headers import one_line, read_object
from fbn_prune.model.vocabulary import VocabularyCut, named_ids, vocabulary_tensors

MOST_CHARACTERS = 2 * 10**8
"""Characters read from each source; Hub data sets can be endless."""
HELD_OUT_EVERY = 10
LONG_DOCUMENT, PASSAGE = 20_000, 2_000
"""Of a longer document, such as a text file, the last tenth is held out, in passages of about this many characters."""


@dataclass(frozen=True)
class VocabularyRule:
    """Which tokens stay.

    Attributes
    ----------
    texts
        Sources of text, named as calibration sources are.
    min_count
        How often the texts must use a token.
    characters
        Characters whose tokens stay however often the texts use them.
    held_out
        Sources to measure on. Default: every tenth document of the texts.
    ascii
        Whether all tokens that consist of ASCII characters stay.
    """

    texts: tuple[str, ...]
    min_count: int = 1
    characters: str = ""
    held_out: tuple[str, ...] = ()
    ascii: bool = False


@dataclass(frozen=True)
class VocabularyFigures:
    """What a trimmed vocabulary saves, and what it does to text that it was not chosen from.

    Attributes
    ----------
    tokens_before, tokens_after
        Rows of the embedding.
    parameters_removed, bytes_removed
        Of the embedding and the head.
    text_tokens
        Number of tokens of the texts.
    held_out_documents
        Number of held-out documents.
    identical_documents
        Share of them that get the same pieces as before; None without held-out documents.
    growth
        Increase in the number of tokens of the other documents, as a share; None if there are none.
    """

    tokens_before: int
    tokens_after: int
    parameters_removed: int
    bytes_removed: int
    text_tokens: int
    held_out_documents: int
    identical_documents: float | None
    growth: float | None


def choose_vocabulary(
    checkpoint: Checkpoint,
    rule: VocabularyRule,
    *,
    more: Sequence[str] = (),
    read: Callable[[int], None] = lambda characters: None,
) -> tuple[VocabularyCut, VocabularyFigures]:
    """Count the tokens of the texts and return the cut to the tokens that stay, with its figures.

    Parameters
    ----------
    more
        Further documents, of which no part is held out.
    read
        Called with the number of characters counted since the last call.

    Raises
    ------
    InvalidInput
        A text cannot be read, the tokenizer cannot be trimmed, or all tokens stay.
    """
    chooser = _Chooser(checkpoint, rule)
    reading = Reading(chooser.tokenizer)
    texts = _Texts(rule.texts, reading, hold_out=not rule.held_out)
    counts = count_tokens(chooser.tokenizer, texts, read)
    counts.update(count_tokens(chooser.tokenizer, more))
    if not counts:
        raise InvalidInput(f"the texts {', '.join(rule.texts)} have no tokens to choose from")
    unseen = chooser.cut(counts)
    held_out = texts.held or [
        passage
        for source in rule.held_out
        for document in read_documents(source, characters=MOST_CHARACTERS, reading=reading)
        for passage in passages(document)
    ]
    share, growth = chooser.compared(unseen, held_out)
    if texts.held:
        counts.update(count_tokens(chooser.tokenizer, texts.held))
    cut = chooser.cut(counts)
    if len(cut.kept) == cut.total:
        raise InvalidInput(
            f"{checkpoint.path}: the vocabulary is already minimal: all {cut.total:,} tokens are used by the texts or "
            "always kept; give less text, or raise the count"
        )
    chooser.check(cut)
    figures = VocabularyFigures(
        tokens_before=cut.total,
        tokens_after=len(cut.kept),
        parameters_removed=cut.removed_parameters(checkpoint),
        bytes_removed=cut.removed_bytes(checkpoint),
        text_tokens=counts.total(),
        held_out_documents=len(held_out),
        identical_documents=share,
        growth=growth,
    )
    return cut, figures


def passages(document: str) -> list[str]:
    """Cut a long document at line ends into passages of about :data:`PASSAGE` characters; a short one stays whole."""
    if len(document) <= LONG_DOCUMENT:
        return [document]
    found, lines, characters = [], list[str](), 0
    for line in document.splitlines(keepends=True):
        lines.append(line)
        characters += len(line)
        if characters >= PASSAGE:
            found.append("".join(lines))
            lines, characters = [], 0
    return [passage for passage in (*found, "".join(lines)) if passage.strip()]


@dataclass
class _Texts:
    """The documents of several sources; the held-out ones are collected instead of yielded."""

    sources: Sequence[str]
    reading: Reading
    hold_out: bool
    held: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[str]:
        for source in self.sources:
            documents = read_documents(source, characters=MOST_CHARACTERS, reading=self.reading)
            for index, document in enumerate(documents):
                if not self.hold_out:
                    yield document
                elif len(document) > LONG_DOCUMENT:
                    end = document.rfind("\n", 0, len(document) - len(document) // HELD_OUT_EVERY)
                    if end > 0:
                        self.held += passages(document[end + 1 :])
                    yield document[: end + 1] or document
                elif index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1:
                    self.held.append(document)
                else:
                    yield document


class _Chooser:
    """Makes cuts of one checkpoint's vocabulary from counts of its tokens."""

    def __init__(self, checkpoint: Checkpoint, rule: VocabularyRule) -> None:
        self.checkpoint, self.rule = checkpoint, rule
        self.tokenizer = checkpoint.load_tokenizer()
        self._content = tokenizer_content(checkpoint, self.tokenizer)
        self._tensors = vocabulary_tensors(checkpoint)
        self._total = checkpoint.family.vocab_size(checkpoint.config)
        self._wanted = self._always() | tokens_of_characters(
            self.tokenizer, self._content, rule.characters
        )
        if rule.ascii:
            self._wanted |= ascii_tokens(self.tokenizer)

    def cut(self, counts: dict[int, int]) -> VocabularyCut:
        """Return the cut to the tokens with these counts."""
        if counts and max(counts) >= self._total:
            raise InvalidInput(
                f"{self.checkpoint.path}: the tokenizer returns the id {max(counts)}, but the model has only "
                f"{self._total} embeddings"
            )
        used = {token for token, count in counts.items() if count >= self.rule.min_count}
        kept = closed(self._content, used | self._wanted)
        rows = [token for token in kept if token < self._total]
        return VocabularyCut(
            kept=torch.tensor(rows, dtype=torch.int64),
            beyond=tuple(kept[len(rows) :]),
            total=self._total,
            tensors=self._tensors,
            tokenizer=trimmed(self._content, kept),
        )

    def _always(self) -> set[int]:
        """The ids of special and added tokens, and those that a config names."""
        path = self.checkpoint.folder
        ids = {*self.tokenizer.added_tokens_decoder, *self.tokenizer.all_special_ids}
        ids |= named_ids(self.checkpoint.config, self._total)
        for name in ("generation_config.json", "tokenizer_config.json"):
            if (path / name).is_file():
                ids |= named_ids(read_object(path / name), self._total)
        return ids

    def check(self, cut: VocabularyCut) -> Any:
        """Load the trimmed tokenizer, and return it if it gives each kept token its new id.

        Raises
        ------
        InvalidInput
            It does not: its class in transformers makes a vocabulary of its own.
        """
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            write_json(folder / "config.json", self.checkpoint.config)
            copy_companions(self.checkpoint, folder)
            write_tokenizer(self.checkpoint, cut, folder)
            try:
                tokenizer = replace(self.checkpoint, path=folder, gguf=None).load_tokenizer()
            except InvalidInput as error:
                raise InvalidInput(
                    f"{self.checkpoint.path}: the trimmed tokenizer does not load: {one_line(error)}"
                ) from error
        old = self.tokenizer.get_vocab()
        new = {old_id: index for index, old_id in enumerate(cut.ids)}
        expected = {text: new[index] for text, index in old.items() if index in new}
        if tokenizer.get_vocab() != expected:
            wrong = sorted(set(tokenizer.get_vocab().items()) ^ set(expected.items()))
            raise InvalidInput(
                f"{self.checkpoint.path}: the vocabulary cannot be trimmed: {type(tokenizer).__name__} of transformers "
                f"does not follow tokenizer.json, first at {wrong[0][0]!r}"
            )
        return tokenizer

    def compared(
        self, cut: VocabularyCut, documents: Sequence[str]
    ) -> tuple[float | None, float | None]:
        """Return the share of documents with the same pieces, and the growth in tokens of the others."""
        if not documents:
            return None, None
        tokenizer, ids = self.check(cut), cut.ids
        same = before = after = 0
        for batch in batches(documents):
            for old, new in zip(
                encoded(self.tokenizer, batch), encoded(tokenizer, batch), strict=True
            ):
                if old == [ids[index] for index in new]:
                    same += 1
                else:
                    before += len(old)
                    after += len(new)
        return same / len(documents), after / before - 1 if before else None


def tokenizer_content(checkpoint: Checkpoint, tokenizer: Any) -> Content:
    """Return the content of a checkpoint's `tokenizer.json`, or of the one that transformers makes if there is none.

    Raises
    ------
    InvalidInput
        The tokenizer is code, or its vocabulary cannot be trimmed.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise InvalidInput(
            f"{checkpoint.path}: the tokenizer is code ({type(tokenizer).__name__}); only the vocabulary of tokenizers "
            "of the package `tokenizers` can be trimmed"
        )
    # The file is what counts: loading it may change steps, and loading the trimmed one changes the same.
    file = checkpoint.folder / "tokenizer.json"
    content: Content = json.loads(
        (Tokenizer.from_file(str(file)) if file.is_file() else backend).to_str()
    )
    check_content(content, str(checkpoint.path))
    return content
