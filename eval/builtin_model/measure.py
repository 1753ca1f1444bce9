"""Measure perplexity on text and the share of questions that a model answers exactly.

Greedy generation gives an answer exactly if each of its tokens is the most likely one after the correct tokens before
it. One forward pass over question and answer therefore gives the same result as generation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROWS_AT_ONCE = 16


def read_texts(path: Path) -> list[str]:
    """Return the `text` of every line of a JSON lines file."""
    return [record["text"] for record in _records(path)]


def read_questions(path: Path) -> list[tuple[str, str]]:
    """Return the question and answer of every line of a JSON lines file."""
    return [(record["question"], record["answer"]) for record in _records(path)]


def token_rows(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], length: int
) -> torch.Tensor:
    """Join the documents, each after a bos token, and cut them into int64 [rows, length]; drop a shorter last row."""
    stream = [token for text in texts for token in tokenizer(text, verbose=False)["input_ids"]]
    rows = len(stream) // length
    return torch.tensor(stream[: rows * length], dtype=torch.int64).view(rows, length)


@torch.inference_mode()
def perplexity(model: PreTrainedModel, rows: torch.Tensor) -> float:
    """Return exp of the mean next-token loss (nats) over int64 token rows [rows, length]."""
    total = 0.0
    for batch in torch.split(rows, ROWS_AT_ONCE):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
        ).item()
    return math.exp(total / (rows.shape[0] * (rows.shape[1] - 1)))


@torch.inference_mode()
def exact_share(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[tuple[str, str]],
) -> float:
    """Return the share of questions that greedy generation answers exactly, line end included."""
    right = 0
    for start in range(0, len(questions), ROWS_AT_ONCE):
        pairs = questions[start : start + ROWS_AT_ONCE]
        lines = [tokenizer(f"{question}{answer}\n")["input_ids"] for question, answer in pairs]
        longest = max(map(len, lines))
        # No scored token attends to the right padding.
        batch = torch.full((len(lines), longest), int(tokenizer.pad_token_id))
        for row, line in enumerate(lines):
            batch[row, : len(line)] = torch.tensor(line)
        likeliest = model(input_ids=batch, use_cache=False).logits[:, :-1].argmax(-1)
        for row, (line, (question, _)) in enumerate(zip(lines, pairs, strict=True)):
            asked = len(tokenizer(question)["input_ids"])
            right += likeliest[row, asked - 1 : len(line) - 1].tolist() == line[asked:]
    return right / len(questions)


def _records(path: Path) -> Iterator[dict[str, str]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)
