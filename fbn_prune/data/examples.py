"""A task as the user has it: a few examples in JSON lines, and perhaps questions that must stay unseen.

A line is ``{"text": ...}``, or ``{"question": ..., "answer": ...}``, which is read as the question with the answer
right behind it (a space between them belongs to one of the two) and the line's end.

Test questions must never calibrate. That is checked on texts, not on file names: an example that is also a test
question is refused, a generic block that holds a test question is left out, and a pruned checkpoint carries the
fingerprints of the examples it was made from, so that an evaluation can check in its turn.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fbn_prune.data.calibration import MIN_BLOCK_TOKENS, TokenBlocks, Tokenizer, tokenize_document
from fbn_prune.data.text_files import is_text, read_text
from fbn_prune.errors import InvalidInput

MOST_BYTES = 64 * 2**20
"""A few examples are no more than that."""

RECORD_NAME = "task.json"
"""File of a pruned checkpoint that says which examples were seen."""


@dataclass(frozen=True)
class Example:
    """One example: all of its text, and what in it is asked (all of it where nothing is marked as a question)."""

    text: str
    question: str

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what is asked, in lower case and with single spaces."""
        return fingerprint(self.question)


def fingerprint(question: str) -> str:
    """SHA-256 of a question, in lower case and with single spaces."""
    return hashlib.sha256(_normal(question).encode()).hexdigest()


def question_of(record: dict[str, Any]) -> str | None:
    """What a line of a task file, or a document of a data set, asks; None where it asks nothing."""
    for field in ("question", "question_stem", "goal", "sentence", "context", "text"):
        if isinstance(record.get(field), str):
            return str(record[field])
    return None


def read_examples(path: Path) -> list[Example]:
    """Read the examples of a task.

    Raises
    ------
    InvalidInput
        The file is missing, empty, no UTF-8, or a line of it is no example.
    """
    lines = read_text(path, f"task file {path}", most_bytes=MOST_BYTES).split("\n")
    examples = [
        _example(line, f"{path}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not examples:
        raise InvalidInput(f"task file {path} holds no examples")
    return examples


def _example(line: str, where: str) -> Example:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError, ValueError):
        raise InvalidInput(f"{where}: not JSON") from None
    fields = record if isinstance(record, dict) else {}
    question, answer, text = (fields.get(key) for key in ("question", "answer", "text"))
    for value in (question, answer, text):
        if isinstance(value, str) and not is_text(value):
            raise InvalidInput(f"{where}: a NUL, or half a character (a lone surrogate)")
    if isinstance(question, str) and isinstance(answer, str) and question.strip():
        return Example(f"{question}{answer}\n", question)
    if isinstance(text, str) and text.strip():
        return Example(text, text)
    have = ", ".join(sorted(fields)) or "no object"
    raise InvalidInput(
        f"{where}: neither a text nor a question and an answer, as strings (found: {have})"
    )


def example_blocks(
    examples: Sequence[Example], tokenizer: Tokenizer, *, context: int, vocabulary: int, source: str
) -> TokenBlocks:
    """The examples as blocks; one longer than a context gives several.

    Raises
    ------
    InvalidInput
        No example gives a block, or the tokenizer's ids do not fit the model.
    """
    blocks = [b for one in examples for b in tokenize_document(tokenizer, one.text, context)]
    if not blocks:
        raise InvalidInput(f"{source}: no example gives {MIN_BLOCK_TOKENS} tokens")
    highest = max(int(block.max()) for block in blocks)
    if highest >= vocabulary:
        raise InvalidInput(
            f"{source}: the tokenizer gives id {highest}, but the model's vocabulary has {vocabulary}"
        )
    return TokenBlocks(tuple(blocks), context, (source,))


class TestQuestions:
    """The questions of a test, to be found again in whatever is to calibrate.

    A question counts as held by a text where its words stand there, whatever the case and the spaces between them, and
    not as part of longer words or numbers.
    """

    __test__ = False  # no test case, whatever its name starts with

    def __init__(self, test: Iterable[Example]) -> None:
        test = list(test)
        self._fingerprints = {one.fingerprint for one in test}
        self._questions = sorted({_normal(one.question) for one in test} - {""})

    def in_text(self, text: str) -> bool:
        normal = _normal(text)
        return any(q in normal and _stands_alone(normal, q) for q in self._questions)

    def in_example(self, example: Example) -> bool:
        """Whether an example asks one of the questions, or one of them stands somewhere in it."""
        return example.fingerprint in self._fingerprints or self.in_text(example.text)


def require_unseen(
    examples: Iterable[Example], test: Iterable[Example], names: tuple[str, str]
) -> None:
    """Refuse examples that ask or hold a test question; `names` are the two files', for the error.

    Raises
    ------
    InvalidInput
    """
    asked = TestQuestions(test)
    for number, one in enumerate(examples, 1):
        if asked.in_example(one):
            shown = _normal(one.question)[:60]
            raise InvalidInput(
                f"example {number} of {names[0]} ({shown!r}) is or holds a test question of {names[1]}: "
                "take it out of one of them"
            )


def without_questions(
    blocks: TokenBlocks, test: Sequence[Example], tokenizer: Any
) -> tuple[TokenBlocks, int]:
    """Blocks that hold none of the test questions, and how many were left out.

    Raises
    ------
    InvalidInput
        No block is left.
    """
    asked = TestQuestions(test)
    free = [
        place
        for place, block in enumerate(blocks.blocks)
        if not asked.in_text(tokenizer.decode(block, skip_special_tokens=True))
    ]
    if not free:
        raise InvalidInput(
            "every calibration block holds a test question: calibrate on text that the test was "
            "not made from"
        )
    kept = TokenBlocks(tuple(blocks.blocks[i] for i in free), blocks.context, blocks.sources)
    return kept, len(blocks.blocks) - len(free)


def record(examples: Sequence[Example], *, source: str, tokens: int, networks: list[int]) -> str:
    """JSON text of what was seen of a task: the content of `task.json`."""
    content = {
        "file": source,
        "examples": len(examples),
        "tokens": tokens,
        "networks": networks,
        "questions_sha256": sorted({one.fingerprint for one in examples}),
    }
    return json.dumps(content, indent=1) + "\n"


def recorded_fingerprints(checkpoint: Path) -> set[str]:
    """Fingerprints of the questions that a checkpoint was made from; empty where there is no record."""
    path = checkpoint / RECORD_NAME
    if not path.is_file():
        return set()
    try:
        found = json.loads(read_text(path, str(path), most_bytes=MOST_BYTES))["questions_sha256"]
        return {str(one) for one in found}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InvalidInput(f"{path} is damaged: it should say which examples were seen") from None


def _normal(text: str) -> str:
    return " ".join(text.split()).casefold()


def _stands_alone(text: str, question: str) -> bool:
    """Whether `question` occurs in `text` and is not part of longer words or numbers there."""
    start = text.find(question)
    while start >= 0:
        stop = start + len(question)
        joined_before = start > 0 and text[start - 1].isalnum() and question[0].isalnum()
        joined_after = stop < len(text) and text[stop].isalnum() and question[-1].isalnum()
        if not joined_before and not joined_after:
            return True
        start = text.find(question, start + 1)
    return False
