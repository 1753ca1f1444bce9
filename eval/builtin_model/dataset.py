"""Make the training rows of the embedded model, and the calibration, held-out and question files shipped with it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from builtin_model.corpus import Corpus, Document
from builtin_model.skills import (
    DOCUMENT_LINES,
    Question,
    distinct_questions,
    document,
    questions,
)
from fbn_prune.data.builtin import QUESTION_SKILLS, SKILLS

CALIBRATION_BYTES = {"prose": 200_000, "code": 200_000}
HELD_OUT_BYTES = {"prose": 100_000, "code": 100_000}
GENERATED_CALIBRATION_BYTES = 100_000
GENERATED_HELD_OUT_BYTES = 35_000
EXCERPT_CHARACTERS = 8_000
ROW_LINES = {"arithmetic": 28, "brackets": 16, "copy": 18}
"""Number of lines that fill a row of 256 tokens."""
QUESTIONS = 200
QUESTION_WEIGHT = 0.1
"""Weight in the loss of a question's tokens, which cannot be predicted; all other tokens have weight 1."""


@dataclass(frozen=True)
class Row:
    """Tokens to train on, with the weight of each in the loss."""

    tokens: list[int]
    weights: list[float]


@dataclass(frozen=True)
class Files:
    """The paths of the text and question files below a root folder."""

    root: Path

    def calibration(self, skill: str) -> Path:
        return self.root / "text" / "calibration" / f"{skill}.jsonl"

    def held_out(self, skill: str) -> Path:
        return self.root / "text" / "held_out" / f"{skill}.jsonl"

    def questions(self, skill: str) -> Path:
        return self.root / "questions" / f"{skill}.jsonl"


def write_files(files: Files, corpus: Corpus, seed: int) -> None:
    """Write the calibration and held-out text of every skill, and its held-out questions if it has any."""
    rng = random.Random(seed)
    for skill in SKILLS:
        for held_out, path in ((False, files.calibration(skill)), (True, files.held_out(skill))):
            if skill in QUESTION_SKILLS:
                source = questions(skill, rng, held_out=held_out)
                texts = _documents(source, ROW_LINES[skill])
                size = GENERATED_HELD_OUT_BYTES if held_out else GENERATED_CALIBRATION_BYTES
            else:
                texts = _excerpts(corpus.documents(skill, held_out=held_out), rng)
                size = (HELD_OUT_BYTES if held_out else CALIBRATION_BYTES)[skill]
            _write_records(path, ({"text": text} for text in _up_to(texts, size)))
    for skill in QUESTION_SKILLS:
        asked = distinct_questions(skill, seed, QUESTIONS)
        records = ({"question": q.question, "answer": q.answer} for q in asked)
        _write_records(files.questions(skill), records)


def tokenizer_texts(corpus: Corpus, seed: int) -> Iterator[str]:
    """Yield training text of all skills for the tokenizer, with as much code as prose."""
    rng = random.Random(seed)
    prose = [d.text for d in corpus.documents("prose", held_out=False)]
    size = sum(map(len, prose))
    yield from prose
    yield from _up_to(_excerpts(corpus.documents("code", held_out=False), rng), size)
    for skill in QUESTION_SKILLS:
        source = questions(skill, rng, held_out=False)
        yield from _up_to(_documents(source, 100), size // 8)


def training_rows(
    skill: str,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    seed: int,
) -> Iterator[Row]:
    """Yield token rows of a skill without end: its documents in new random orders, or new questions."""
    rng = random.Random(f"{skill} {seed}")
    if skill in QUESTION_SKILLS:
        return _generated_rows(skill, tokenizer, length, rng)
    documents = corpus.documents(skill, held_out=False)
    return _text_rows(
        [tokenizer(d.text, verbose=False)["input_ids"] for d in documents], length, rng
    )


def _text_rows(documents: Sequence[list[int]], length: int, rng: random.Random) -> Iterator[Row]:
    while True:
        order = rng.sample(documents, len(documents))
        stream = [token for tokens in order for token in tokens][rng.randrange(length) :]
        starts = list(range(0, len(stream) - length + 1, length))
        rng.shuffle(starts)
        for start in starts:
            yield Row(stream[start : start + length], [1.0] * length)


def _generated_rows(
    skill: str, tokenizer: PreTrainedTokenizerBase, length: int, rng: random.Random
) -> Iterator[Row]:
    source = questions(skill, rng, held_out=False)
    while True:
        tokens: list[int] = []
        weights: list[float] = []
        while len(tokens) < length:
            asked = [next(source) for _ in range(rng.choice(DOCUMENT_LINES))]
            lines = tokenizer([q.line for q in asked], add_special_tokens=False)["input_ids"]
            prompts = tokenizer([q.question for q in asked], add_special_tokens=False)["input_ids"]
            tokens.append(tokenizer.bos_token_id)
            weights.append(QUESTION_WEIGHT)
            for line, prompt in zip(lines, prompts, strict=True):
                tokens += line
                weights += [QUESTION_WEIGHT] * len(prompt) + [1.0] * (len(line) - len(prompt))
        yield Row(tokens[:length], weights[:length])


def _documents(source: Iterator[Question], lines: int) -> Iterator[str]:
    while True:
        yield document(source, lines)


def _excerpts(documents: Sequence[Document], rng: random.Random) -> Iterator[str]:
    for chosen in rng.sample(documents, len(documents)):
        yield chosen.text[:EXCERPT_CHARACTERS]


def _up_to(texts: Iterable[str], size: int) -> Iterator[str]:
    written = 0
    for text in texts:
        yield text
        written += len(text)
        if written >= size:
            return


def _write_records(path: Path, records: Iterable[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")
