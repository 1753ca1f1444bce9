"""Read a task's examples from a file, and keep test questions out of calibration.

A record is ``{"text": ...}`` or ``{"question": ..., "answer": ...}``. The second form becomes the question, the answer
directly after it (any space between them must be part of one of the two), and a line end. A conversation is rendered
with the model's chat template; its question is the user's longest turn.

Test questions must not be used for calibration. The check compares texts, not file names: an example that contains a
test question is refused, and a generic block that contains one is left out. A pruned checkpoint records fingerprints of
its examples, so that an evaluation can check its questions against them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fbn_prune.data.calibration import MIN_BLOCK_TOKENS, TokenBlocks, Tokenizer, tokenize_document
from fbn_prune.data.chat import Chat
from fbn_prune.data.file_kinds import OpenFile, open_file
from fbn_prune.data.forms import DocumentMaker, checked, form_of, found
from fbn_prune.data.records import json_lines, read_records
from fbn_prune.data.text_files import read_text
from fbn_prune.errors import InvalidInput

MOST_BYTES = 64 * 2**20
"""Largest task file that is read."""

RECORD_NAME = "task.json"
"""The file in a pruned checkpoint that records the examples used."""


@dataclass(frozen=True)
class Example:
    """One example: its whole text, and its question (the whole text if no question is marked).

    The text of a conversation is a plain one, to look for questions in; `chat` is what the model is shown.
    """

    text: str
    question: str
    chat: Chat | None = None

    @property
    def fingerprint(self) -> str:
        """The :func:`fingerprint` of the question."""
        return fingerprint(self.question)


def fingerprint(question: str) -> str:
    """Return the SHA-256 of a question in lower case with single spaces."""
    return hashlib.sha256(_normal(question).encode()).hexdigest()


def question_of(record: dict[str, Any]) -> str | None:
    """Return the question of a line of a task file or a document of a data set; None if no field has one."""
    for field in ("question", "question_stem", "goal", "sentence", "context", "text"):
        if isinstance(record.get(field), str):
            return str(record[field])
    return None


def read_examples(path: Path) -> list[Example]:
    """Read the examples of a task from a file of records, see :mod:`fbn_prune.data.records`.

    Raises
    ------
    InvalidInput
        The file is missing, too large, empty or not UTF-8, or a record is not an example.
    """
    name = f"task file {path}"
    examples = []
    read = 0
    with open_file(path, name) as file:
        for where, record in _records(file):
            examples.append(_example(record, where))
            read += len(examples[-1].text)
            if read > MOST_BYTES:
                raise InvalidInput(
                    f"{name} is larger than {MOST_BYTES:,} bytes, the most that is read: give fewer examples"
                )
    if not examples:
        raise InvalidInput(
            f"{name} has no examples: give one a line, as text or question and answer"
        )
    return examples


def _records(file: OpenFile) -> Iterable[tuple[str, Any]]:
    if file.kind == "text":  # JSON lines under another name
        return json_lines(file.text(), file.path)
    return read_records(file, is_record=lambda record: form_of(record) is not None)


def _example(record: Any, where: str) -> Example:
    fields = record if isinstance(record, Mapping) else {}
    question, answer = fields.get("question"), fields.get("answer")
    if isinstance(question, str) and isinstance(answer, str) and question.strip():
        question, answer = checked(question, where, "question"), checked(answer, where, "answer")
        return Example(f"{question}{answer}\n", question)
    if form_of(fields) is not None:
        document = DocumentMaker(None, cure="")(where, fields)
        if isinstance(document, Chat):
            return Example(document.plain(), document.question(), document)
        if document is not None and document.strip():
            return Example(document, document)
    raise InvalidInput(
        f"{where}: give a text, question and answer, or a conversation {found(record)}"
    )


def example_blocks(
    examples: Sequence[Example], tokenizer: Tokenizer, *, context: int, vocabulary: int, source: str
) -> TokenBlocks:
    """Return the examples as blocks of at most `context` tokens; a longer example gives several blocks.

    Raises
    ------
    InvalidInput
        All examples are too short for a block, or the tokenizer's ids do not fit the model.
    """
    texts = [
        one.text
        if one.chat is None
        else one.chat.rendered(tokenizer, f"{source}, example {number}")
        for number, one in enumerate(examples, 1)
    ]
    blocks = [block for text in texts for block in tokenize_document(tokenizer, text, context)]
    if not blocks:
        raise InvalidInput(
            f"{source}: every example has fewer than {MIN_BLOCK_TOKENS} tokens; give longer ones"
        )
    highest = max(int(block.max()) for block in blocks)
    if highest >= vocabulary:
        raise InvalidInput(
            f"{source}: the tokenizer returns the id {highest}, but the model's vocabulary has only {vocabulary}: "
            "use the model's own tokenizer"
        )
    return TokenBlocks(tuple(blocks), context, (source,))


class TestQuestions:
    """The questions of a test, to be searched for in calibration text.

    A text contains a question if the question's words occur in it, ignoring case and spacing, and not as part of longer
    words or numbers.
    """

    __test__ = False  # pytest would collect the class by its name

    def __init__(self, test: Iterable[Example]) -> None:
        test = list(test)
        self._fingerprints = {one.fingerprint for one in test}
        self._questions = sorted({_normal(one.question) for one in test} - {""})

    def in_text(self, text: str) -> bool:
        normal = _normal(text)
        return any(q in normal and _stands_alone(normal, q) for q in self._questions)

    def in_example(self, example: Example) -> bool:
        """Whether an example asks or contains one of the questions."""
        return example.fingerprint in self._fingerprints or self.in_text(example.text)


def require_unseen(
    examples: Iterable[Example], test: Iterable[Example], names: tuple[str, str]
) -> None:
    """Raise InvalidInput if an example asks or contains a test question; `names` are the two files' names."""
    questions = TestQuestions(test)
    for number, one in enumerate(examples, 1):
        if questions.in_example(one):
            shown = _normal(one.question)[:60]
            raise InvalidInput(
                f"example {number} of {names[0]} ({shown!r}) is or contains a test question of {names[1]}: "
                "remove it from one of them"
            )


def without_questions(
    blocks: TokenBlocks, test: Sequence[Example], tokenizer: Any
) -> tuple[TokenBlocks, int]:
    """Return the blocks that contain none of the test questions, and the number of blocks left out.

    Raises
    ------
    InvalidInput
        No block is left.
    """
    questions = TestQuestions(test)
    kept = [
        block
        for block in blocks.blocks
        if not questions.in_text(tokenizer.decode(block, skip_special_tokens=True))
    ]
    if not kept:
        raise InvalidInput(
            "every calibration block contains a test question: calibrate on text that the test was not made from"
        )
    left_out = len(blocks.blocks) - len(kept)
    return TokenBlocks(tuple(kept), blocks.context, blocks.sources), left_out


def record(examples: Sequence[Example], *, source: str, tokens: int, networks: list[int]) -> str:
    """Return the content of `task.json`, the record of the task's examples that a run used."""
    content = {
        "file": source,
        "examples": len(examples),
        "tokens": tokens,
        "networks": networks,
        "questions_sha256": sorted({one.fingerprint for one in examples}),
    }
    return json.dumps(content, indent=1) + "\n"


def recorded_fingerprints(checkpoint: Path) -> set[str]:
    """Return the fingerprints of the questions in a checkpoint's `task.json`; empty if there is no such file."""
    path = checkpoint / RECORD_NAME
    if not path.is_file():
        return set()
    try:
        found = json.loads(read_text(path, str(path), most_bytes=MOST_BYTES))["questions_sha256"]
        return {str(one) for one in found}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InvalidInput(f"{path} is damaged: take it from the output of the run again") from None


def _normal(text: str) -> str:
    return " ".join(text.split()).casefold()


def _stands_alone(text: str, question: str) -> bool:
    """Whether `question` occurs in `text` other than as part of longer words or numbers."""
    start = text.find(question)
    while start >= 0:
        stop = start + len(question)
        joined_before = start > 0 and text[start - 1].isalnum() and question[0].isalnum()
        joined_after = stop < len(text) and text[stop].isalnum() and question[-1].isalnum()
        if not joined_before and not joined_after:
            return True
        start = text.find(question, start + 1)
    return False
