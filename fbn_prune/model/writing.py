"""Let a model write its own calibration text, by sampling from its predictions as they are.

A base model begins with its BOS or, without one, with a random token (LLM-QAT, arXiv 2305.17888). A chat model is given
its chat template as far as the user's first word, so that it writes a question, and then answers it (Magpie, arXiv
2406.08464). So the text is like what the model was trained on last, which published text need not be.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from fbn_prune.data.calibration import MIN_BLOCK_TOKENS, prefix_ids
from fbn_prune.data.chat import turn_texts
from fbn_prune.errors import InvalidInput

QUESTION_SHARE = 0.5
"""Largest part of a block that a question may take."""

SHORT_SHARE = 0.25
"""Length of a short text as a part of the longest; the number of texts in the last batches follows from it."""

MOST_EMPTY = 10
"""Batches in a row that may give no text before the model is refused."""


@dataclass(frozen=True)
class Manner:
    """How a model is brought to write.

    Attributes
    ----------
    question
        Token ids before the user's first word; empty for a model without a chat template.
    answer
        Token ids between the user's last word and the assistant's first.
    prefix
        Token ids that begin every text of a base model.
    stops
        Token ids that end a turn or a text.
    vocabulary
        Ids to draw a first token from where nothing else begins a text.
    """

    question: tuple[int, ...]
    answer: tuple[int, ...]
    prefix: tuple[int, ...]
    stops: tuple[int, ...]
    vocabulary: int

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: Any) -> Manner:
        """Return the manner that a model's tokenizer and generation config state."""

        def ids(text: str) -> tuple[int, ...]:
            return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

        prefix = tuple(prefix_ids(tokenizer))
        turns = turn_texts(tokenizer)
        question, answer = ((), ()) if turns is None else map(ids, turns)
        stated = model.generation_config.eos_token_id if model.generation_config else None
        stated = tokenizer.eos_token_id if stated is None else stated
        ends = [] if stated is None else list(stated) if isinstance(stated, list) else [stated]
        if answer:
            ends.append(answer[0])
        size = min(int(model.config.get_text_config().vocab_size), len(tokenizer))
        own = question if not prefix or question[: len(prefix)] == prefix else (*prefix, *question)
        return cls(own if answer else (), answer, prefix, tuple(dict.fromkeys(ends)), size)


def write_text(
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    tokens: int,
    context: int,
    cached: int,
    seed: str,
    kept: Callable[[int, Callable[[], list[Tensor]]], list[Tensor]] = lambda batch, write: write(),
    advance: Callable[[int], None] = lambda tokens: None,
) -> list[Tensor]:
    """Return texts that the model wrote, int64 [length] each, with together at least `tokens` tokens.

    Parameters
    ----------
    model
        The whole model, in evaluation mode. It is left as it was, and so is torch's random state.
    context
        Most tokens of a text.
    cached
        Most tokens in the attention's cache at once; they decide how many texts are written side by side. There are no
        more of them than what is still missing needs if a text has a quarter of its most tokens.
    seed
        Draws first tokens and all that follow; batches draw apart from one another.
    kept
        Returns the texts of a batch, given its number and a function that writes them.
    advance
        Called with the number of tokens written, as they are written. Where texts of a batch turn out to be of no use
        the last number is negative.

    Raises
    ------
    InvalidInput
        The model writes nothing but empty texts.
    """
    manner = Manner.of(model, tokenizer)
    rows: list[Tensor] = []
    total = batch = empty = 0
    while total < tokens:
        needed = math.ceil((tokens - total) / (SHORT_SHARE * context))
        count = max(1, min(cached // context, needed))
        steps: list[int] = []

        def step(texts: int, steps: list[int] = steps) -> None:
            steps.append(texts)
            advance(texts)

        write = partial(_written, model, manner, count, context, f"{seed} {batch}", step)
        found = kept(batch, write)
        rows += found
        written = sum(len(row) for row in found)
        empty = 0 if written else empty + 1
        if empty == MOST_EMPTY:
            raise InvalidInput("the model writes nothing but empty texts: give calibration text")
        advance(written - sum(steps))
        total, batch = total + written, batch + 1
    return rows


def _written(
    model: PreTrainedModel,
    manner: Manner,
    count: int,
    context: int,
    seed: str,
    step: Callable[[int], None],
) -> list[Tensor]:
    """Return the texts of one batch that are long enough for a block."""
    continued = partial(_continued, model, stops=manner.stops, step=step)
    draw = random.Random(seed)
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(draw.getrandbits(63))
        if not manner.question:
            starts = [manner.prefix or (draw.randrange(manner.vocabulary),) for _ in range(count)]
            rows = continued(starts, context)
        else:
            most = len(manner.question) + max(1, int(QUESTION_SHARE * context))
            asked = continued([manner.question] * count, min(most, context))
            # A question that its own end did not stop is no question yet.
            whole = [
                row[:-1]
                for row in asked
                if row[-1] in manner.stops and len(row) > len(manner.question) + 1
            ]
            prompts = [(*row, *manner.answer) for row in whole]
            prompts = [prompt for prompt in prompts if len(prompt) < context]
            rows = continued(prompts, context) if prompts else []
    return [
        torch.tensor(row[:context], dtype=torch.int64)
        for row in rows
        if len(row) >= MIN_BLOCK_TOKENS
    ]


def _continued(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    length: int,
    *,
    stops: Sequence[int],
    step: Callable[[int], None],
) -> list[tuple[int, ...]]:
    """Return each prompt with a sample of what follows: up to a stop, which is part of it, or to `length` tokens.

    `step` is called after each token with the number of texts that go on.
    """
    longest = max(map(len, prompts))
    if longest >= length:
        return [tuple(prompt[:length]) for prompt in prompts]
    filler = stops[0] if stops else 0
    ids = torch.full((len(prompts), longest), filler)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    as_predicted = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0,
        max_new_tokens=length - min(map(len, prompts)), pad_token_id=filler, bos_token_id=filler,
        eos_token_id=list(stops) or None, use_cache=True,
    )  # fmt: skip
    found = model.generate(  # type: ignore[operator]
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=as_predicted,
        stopping_criteria=StoppingCriteriaList([_Steps(stops, step)]),
    )
    rows: list[tuple[int, ...]] = []
    for prompt, new in zip(prompts, found[:, longest:].tolist(), strict=True):
        end = next((at + 1 for at, token in enumerate(new) if token in stops), len(new))
        rows.append((*prompt, *new[:end])[:length])
    return rows


class _Steps(StoppingCriteria):
    """Tells how many texts go on after each token, and stops none."""

    def __init__(self, stops: Sequence[int], step: Callable[[int], None]) -> None:
        self._stops, self._step = torch.tensor(stops), step

    def __call__(self, input_ids: Tensor, scores: Tensor, **more: Any) -> Tensor:
        last = input_ids[:, -1]  # the filler behind the end of a text is a stop too
        self._step(int((~torch.isin(last, self._stops.to(last.device))).sum()))
        return torch.zeros_like(last, dtype=torch.bool)
