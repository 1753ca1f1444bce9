"""Tasks with an answer to check: two-digit arithmetic, closing brackets, copying letters.

Every task is a line `question + answer`; a document is a group of lines. The tokenizer's
pre-tokens never cross from question to answer (a digit, a space or a line end starts the answer's
first token), so that the tokens of a question alone are a prefix of the tokens of its whole line.
About one question in twenty is held out, by a hash of what it asks: the split needs no file, and
two runs with other seeds share it.
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
    """One task: `question` is the prompt, `answer` the exact completion before the line's end."""

    question: str
    answer: str
    key: str | None
    """What is asked, in one form for `17+72` and `72+17`; None if it is never held out."""

    @property
    def line(self) -> str:
        return f"{self.question}{self.answer}\n"

    @property
    def held_out(self) -> bool:
        return self.key is not None and is_held_out(self.key)


def is_held_out(key: str) -> bool:
    """Whether the question or document of this name is kept from training: one in twenty is."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_SHARE == 0


def arithmetic(rng: random.Random) -> Question:
    """A sum or a difference (never negative) of numbers below 100, digits padded with zeros.

    Half of the questions have two numbers from 10 to 99: those alone may be held out. The others
    have numbers below 10: without them a small model goes on guessing the last digit for long.
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
    """Two to six open brackets of four kinds, up to two closed pairs between them, to be closed."""
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
    """Endless questions of a skill from one side of the split; they may repeat."""
    generate = GENERATORS[skill]
    while True:
        question = generate(rng)
        if question.held_out == held_out:
            yield question


def distinct_questions(skill: str, seed: int, count: int) -> list[Question]:
    """`count` held-out questions, no two asking the same."""
    found: dict[str, Question] = {}
    for question in questions(skill, random.Random(seed), held_out=True):
        found.setdefault(question.question, question)
        if len(found) == count:
            break
    return list(found.values())


def document(source: Iterator[Question], lines: int) -> str:
    """The next `lines` questions with their answers, a line each."""
    return "".join(next(source).line for _ in range(lines))


def is_exact(completion: str, answer: str) -> bool:
    """Whether a model's completion is the answer and nothing else on its first line."""
    first, ended, _ = completion.partition("\n")
    return bool(ended) and first == answer
