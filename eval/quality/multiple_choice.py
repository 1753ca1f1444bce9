"""Multiple-choice questions in the forms of SciQ, ARC, OpenBookQA and PIQA, and the share that a model answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fbn_prune.data.calibration import TokenBlocks
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.perplexity import token_losses

BATCH_TOKENS = 1024


@dataclass(frozen=True)
class Question:
    stem: str
    choices: list[str]
    answer: int

    @property
    def text(self) -> str:
        return self.stem + self.choices[self.answer]


def read_questions(path: Path) -> list[Question]:
    """Return multiple-choice questions in the forms of SciQ, ARC, OpenBookQA and PIQA."""
    found = []
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        if "correct_answer" in row:
            texts = [row["correct_answer"], *[row[f"distractor{n}"] for n in (1, 2, 3)]]
            stem, answer = row["question"], 0
        elif "goal" in row:
            stem, texts, answer = row["goal"], [row["sol1"], row["sol2"]], int(row["label"])
        else:
            stem, texts = row.get("question") or row["question_stem"], row["choices"]["text"]
            answer = row["choices"]["label"].index(row["answerKey"])
        found.append(Question(f"Question: {stem}\nAnswer:", [f" {text}" for text in texts], answer))
    return found


def accuracy(
    adapter: ModelAdapter, tokenizer: Any, questions: Sequence[Question], context: int
) -> float:
    """Return the share of questions whose right choice has the least loss in the mean over its characters."""
    stems = [len(tokenizer(q.stem)["input_ids"]) for q in questions]
    texts = [q.stem + choice for q in questions for choice in q.choices]
    blocks = [torch.tensor(tokenizer(text)["input_ids"][:context]) for text in texts]
    every = TokenBlocks(tuple(blocks), context, ("questions",))
    losses = torch.split(
        token_losses(adapter, every.batches(BATCH_TOKENS)),
        [len(blocks[i]) - 1 for i in every.batch_order()],
    )
    by_block = dict(zip(every.batch_order(), losses, strict=True))
    right, at = 0, 0
    for q, stem in zip(questions, stems, strict=True):
        sums = [
            float(by_block[at + c][stem - 1 :].sum()) / len(q.choices[c])
            for c in range(len(q.choices))
        ]
        right += sums.index(min(sums)) == q.answer
        at += len(q.choices)
    return right / len(questions)
