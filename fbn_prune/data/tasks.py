"""Read a task's examples and test questions: from a file, a task of lm-evaluation-harness, or a built-in skill.

All examples of a file are used. From a harness task or a built-in skill, which have many, a few are drawn, and their
test questions are read as well. No example may be or contain a test question: in a file that is an error, and the draw
skips such examples.
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
    """A task's examples and test questions.

    Attributes
    ----------
    source
        The source that the user named.
    examples
        The examples to calibrate with.
    test_source
        The source of the test questions; empty if there are none.
    test
        The test questions, which must not be used for calibration.
    passed_over
        Number of drawn examples that were skipped because they contain a test question.
    """

    source: str
    examples: tuple[Example, ...]
    test_source: str
    test: tuple[Example, ...]
    passed_over: int = 0

    @classmethod
    def read(cls, source: str, test_path: Path | None, *, drawn: int, seed: int) -> Task:
        """Read a task's examples and test questions.

        Parameters
        ----------
        source
            FILE.jsonl, ``lm_eval:NAME`` or ``lm_eval:FILE.yaml``, or ``builtin:SKILL``.
        test_path
            A file of further test questions.
        drawn, seed
            Number of examples to draw from a harness task or a built-in skill, and the seed of the draw.

        Raises
        ------
        InvalidInput
            A source cannot be read as examples, or an example contains a test question.
        FbnPruneError
            The harness cannot load its task, or is not installed.
        """
        file_test = () if test_path is None else tuple(read_examples(test_path))
        pool = _pool(source)
        if pool is None:
            examples = read_examples(Path(source))
            require_unseen(examples, file_test, (source, str(test_path)))
            test_source = "" if test_path is None else str(test_path)
            return cls(source, tuple(examples), test_source, file_test)
        candidates, own_test = pool
        test = (*own_test, *file_test)
        examples, passed_over = _draw(candidates, TestQuestions(test), drawn, seed)
        if not examples:
            raise InvalidInput(
                f"task {source}: every example contains a test question; give another test or task"
            )
        test_source = source if test_path is None else f"{source} and {test_path}"
        return cls(source, tuple(examples), test_source if test else "", test, passed_over)


def _pool(source: str) -> tuple[list[Example], list[Example]] | None:
    """All examples and test questions of a harness task or a built-in skill; None for a file of examples."""
    if source.startswith(HARNESS_PREFIX):
        return training_and_test(source.removeprefix(HARNESS_PREFIX))
    if source.startswith(BUILTIN_PREFIX):
        skill = source.removeprefix(BUILTIN_PREFIX)
        if skill not in builtin.SKILLS:
            known = ", ".join(builtin.SKILLS)
            raise InvalidInput(f"task {source!r}: choose a skill of the built-in model: {known}")
        test = builtin.question_files().get(skill, builtin.held_out_files()[skill])
        return read_examples(builtin.calibration_files()[skill]), read_examples(test)
    return None


def _draw(
    candidates: Sequence[Example], test: TestQuestions, count: int, seed: int
) -> tuple[list[Example], int]:
    """Draw up to `count` examples without test questions; also return the number of examples skipped."""
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
