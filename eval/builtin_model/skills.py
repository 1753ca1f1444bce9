"""Generate questions with exact answers: two-digit arithmetic, closing brackets, copying letters.

A question and its answer make one line, and a group of lines makes a document. No pre-token of the tokenizer spans
question and answer (the answer begins with a digit, a space or a line end), so the tokens of a question are a prefix of
the tokens of its line. A hash of its content decides whether a question is held out (about one in twenty), so the split
needs no file and is the same for every seed.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

PAIRS = {"(": ")", "[": "]", "{": "}", "<": ">"}
ONE, TWO = range(10), range(10, 100)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
DOCUMENT_LINES = (1, 2, 4, 8, 16, 32)
HELD_OUT_SHARE = 20


@dataclass(frozen=True)
class Question:
    """One question: `question` is the prompt, `answer` the exact completion up to the line end."""

    question: str
    answer: str
    key: str | None
    """Canonical form of the question, the same for `17+72` and `72+17`; None if it is never held out."""

    @property
    def line(self) -> str:
        return f"{self.question}{self.answer}\n"

    @property
    def held_out(self) -> bool:
        return self.key is not None and is_held_out(self.key)


def is_held_out(key: str) -> bool:
    """Return whether the question or document of this name is held out from training (one in twenty is)."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_SHARE == 0


def arithmetic(rng: random.Random) -> Question:
    """Draw a sum or a non-negative difference of numbers below 100, padded with zeros.

    Half of the questions have two numbers from 10 to 99; only these may be held out. The others have numbers below 10,
    without which a small model takes long to learn the last digit.
    """
    ranges = rng.choices([(ONE, ONE), (ONE, TWO), (TWO, TWO)], weights=(3, 2, 5))[0]
    low, high = sorted(rng.choice(digits) for digits in ranges)
    a, b = rng.sample((low, high), 2)
    two_digits = ranges == (TWO, TWO)
    if rng.random() < 0.5:
        return Question(f"{a:02}+{b:02}=", f"{a + b:03}", f"{low}+{high}" if two_digits else None)
    return Question(
        f"{high:02}-{low:02}=", f"{high - low:03}", f"{high}-{low}" if two_digits else None
    )


def brackets(rng: random.Random) -> Question:
    """Draw two to six open brackets of four kinds, with up to two closed pairs between them, to be closed."""
    opened: list[str] = []
    written: list[str] = []
    pairs = rng.randint(0, 2)
    depth = rng.randint(2, 6)
    while len(opened) < depth or pairs:
        if pairs and rng.random() < 0.3:
            bracket = rng.choice(list(PAIRS))
            written += [bracket, PAIRS[bracket]]
            pairs -= 1
        elif len(opened) < depth:
            opened.append(rng.choice(list(PAIRS)))
            written.append(opened[-1])
    prompt = " ".join(written)
    answer = "".join(f" {PAIRS[bracket]}" for bracket in reversed(opened))
    return Question(f"{prompt} :", answer, prompt)


def copy(rng: random.Random) -> Question:
    """Three to eight letters, to be written again in the same or in the opposite order."""
    letters = rng.choices(LETTERS, k=rng.randint(3, 8))
    order = rng.choice(("copy", "reverse"))
    prompt = f"{order} {' '.join(letters)}"
    answer = letters if order == "copy" else letters[::-1]
    return Question(f"{prompt} :", "".join(f" {letter}" for letter in answer), prompt)


GENERATORS: dict[str, Callable[[random.Random], Question]] = {
    "arithmetic": arithmetic,
    "brackets": brackets,
    "copy": copy,
}


def questions(skill: str, rng: random.Random, *, held_out: bool) -> Iterator[Question]:
    """Yield questions of a skill from one side of the split without end; they may repeat."""
    generate = GENERATORS[skill]
    while True:
        question = generate(rng)
        if question.held_out == held_out:
            yield question


def distinct_questions(skill: str, seed: int, count: int) -> list[Question]:
    """Return `count` held-out questions that all differ."""
    found: dict[str, Question] = {}
    for question in questions(skill, random.Random(seed), held_out=True):
        found.setdefault(question.question, question)
        if len(found) == count:
            break
    return list(found.values())


def document(source: Iterator[Question], lines: int) -> str:
    """Return the next `lines` questions with their answers, one on each line."""
    return "".join(next(source).line for _ in range(lines))


def is_exact(completion: str, answer: str) -> bool:
    """Return whether the first line of a completion is exactly the answer."""
    first, ended, _ = completion.partition("\n")
    return bool(ended) and first == answer
