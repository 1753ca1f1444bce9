"""Where a task comes from: a file of examples, a training split of the harness, a skill of the embedded model.

A file is a few examples, all of which are used. Of the other two, which hold many, a few are drawn, and what they are
tested on comes with them. No example is a test question, nor holds one: in a file that is an error, and what is drawn
passes over it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fbn_prune.data import builtin
from fbn_prune.data.examples import Example, TestQuestions, read_examples, require_unseen
from fbn_prune.data.harness_tasks import training_and_test
from fbn_prune.errors import InvalidInput

HARNESS_PREFIX = "lm_eval:"
BUILTIN_PREFIX = "builtin:"


@dataclass(frozen=True)
class Task:
    """A task, read and checked.

    Attributes
    ----------
    source, test_source
        What the user named, and where the test questions are from; the latter is empty where there are none.
    examples, test
        What calibrates; what must not.
    passed_over
        Drawn examples that were left out because a test question stands in them.
    """

    source: str
    examples: tuple[Example, ...]
    test_source: str
    test: tuple[Example, ...]
    passed_over: int = 0

    @classmethod
    def read(cls, source: str, test_path: Path | None, *, drawn: int, seed: int) -> Task:
        """Read examples and test questions.

        Parameters
        ----------
        source
            FILE.jsonl, ``lm_eval:NAME`` or ``lm_eval:FILE.yaml``, or ``builtin:SKILL``.
        test_path
            Questions that must not calibrate, beside those that the source brings.
        drawn, seed
            How many examples to draw where the source is no file of examples, and how.

        Raises
        ------
        InvalidInput
            A source cannot be read as examples, or an example is a test question.
        FbnPruneError
            The harness cannot load its task, or is not installed.
        """
        more = () if test_path is None else tuple(read_examples(test_path))
        many = _many(source)
        if many is None:
            examples = read_examples(Path(source))
            require_unseen(examples, more, (source, str(test_path)))
            return cls(source, tuple(examples), "" if test_path is None else str(test_path), more)
        candidates, own = many
        test = (*own, *more)
        examples, passed_over = _draw(candidates, TestQuestions(test), drawn, seed)
        if not examples:
            raise InvalidInput(f"task {source}: a test question stands in every example of it")
        test_source = source if test_path is None else f"{source} and {test_path}"
        return cls(source, tuple(examples), test_source if test else "", test, passed_over)


def _many(source: str) -> tuple[list[Example], list[Example]] | None:
    """All examples and test questions of a source that has many; None for a file of examples."""
    if source.startswith(HARNESS_PREFIX):
        return training_and_test(source.removeprefix(HARNESS_PREFIX))
    if source.startswith(BUILTIN_PREFIX):
        skill = source.removeprefix(BUILTIN_PREFIX)
        if skill not in builtin.SKILLS:
            known = ", ".join(builtin.SKILLS)
            raise InvalidInput(f"task {source!r}: the embedded model has the skills {known}")
        asked = builtin.question_files().get(skill, builtin.held_out_files()[skill])
        return read_examples(builtin.calibration_files()[skill]), read_examples(asked)
    return None


def _draw(
    candidates: Sequence[Example], test: TestQuestions, count: int, seed: int
) -> tuple[list[Example], int]:
    """Up to `count` examples that hold no test question, in a drawn order; how many were passed over."""
    taken: list[Example] = []
    passed_over = 0
    for example in random.Random(seed).sample(candidates, len(candidates)):
        if len(taken) == count:
            break
        if test.in_example(example):
            passed_over += 1
        else:
            taken.append(example)
    return taken, passed_over
