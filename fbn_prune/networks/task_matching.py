"""Function-matched calibration: weight generic text by how similarly it uses the networks to a task's few examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fbn_prune.data.calibration import CalibrationData, TokenBlocks
from fbn_prune.data.examples import example_blocks, without_questions
from fbn_prune.data.tasks import Task
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.networks.activity import block_activity
from fbn_prune.networks.function_matching import FunctionMatch, match_documents, mixture_weights
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.progress import StageClock

TEST_TOKENS = 32768
"""The test questions are measured on at most this many of their tokens; all of them are kept out of calibration."""


@dataclass(frozen=True)
class TaskCalibration:
    """Calibration data for a task.

    Attributes
    ----------
    data
        The generic data, without the blocks that contain a test question.
    examples
        The examples' blocks.
    test
        Blocks of test questions, the first :data:`TEST_TOKENS` tokens; None without test questions.
    left_out
        Number of generic blocks removed because they contain a test question.
    """

    task: Task
    data: CalibrationData
    examples: TokenBlocks
    test: TokenBlocks | None
    left_out: int


@dataclass(frozen=True)
class MatchedCalibration:
    """Generic blocks and examples together, with weights, and the match that gave the weights."""

    blocks: TokenBlocks
    match: FunctionMatch

    @property
    def effective_documents(self) -> float:
        """Number of equally weighted generic documents with the same sampling variance: (sum w)² / sum w²."""
        weights = self.match.weights
        return float(weights.sum().square() / weights.square().sum())


def task_calibration(
    task: Task, data: CalibrationData, tokenizer: Any, *, context: int, vocabulary: int
) -> TaskCalibration:
    """Tokenize a task into blocks of at most `context` tokens, and remove its test questions from the generic data.

    Raises
    ------
    InvalidInput
        The texts give no block, their token ids exceed the `vocabulary`, or every generic block contains a test
        question.
    """
    examples = example_blocks(
        task.examples, tokenizer, context=context, vocabulary=vocabulary, source=task.source
    )
    if not task.test:
        return TaskCalibration(task, data, examples, None, 0)
    test = example_blocks(
        task.test, tokenizer, context=context, vocabulary=vocabulary, source=task.test_source
    ).subset(TEST_TOKENS)
    calibrating, left_out = without_questions(data.calibrating, task.test, tokenizer)
    return TaskCalibration(
        task, CalibrationData(calibrating, data.held_out), examples, test, left_out
    )


def match_calibration(
    adapter: ModelAdapter,
    networks: FunctionalNetworks,
    generic: TokenBlocks,
    examples: TokenBlocks,
    *,
    matched_on: int,
    batch_tokens: int,
    clock: StageClock,
    keep: Callable[[Callable[[], Tensor]], Tensor] = lambda compute: compute(),
) -> MatchedCalibration:
    """Weight the `generic` blocks by how well they match the task of `examples`.

    Parameters
    ----------
    matched_on
        Number of networks to match on: those with the largest abs value in the task's function vector.
    keep
        Returns the documents' mean activity [documents, networks]: calls its argument to compute it, or reads a
        stored result.
    """
    together = TokenBlocks(generic.blocks + examples.blocks, generic.context, generic.sources)
    activity = keep(
        lambda: block_activity(adapter, networks, together, batch_tokens=batch_tokens, clock=clock)
    )
    count = len(generic.blocks)
    match = match_documents(activity[:count], activity[count:], matched_on)
    of_generic, of_examples = mixture_weights(
        match.weights,
        [len(block) for block in generic.blocks],
        [len(block) for block in examples.blocks],
    )
    weights = (*of_generic.tolist(), *of_examples.tolist())
    sources = (*generic.sources, *examples.sources)
    return MatchedCalibration(
        TokenBlocks(together.blocks, generic.context, sources, weights), match
    )
