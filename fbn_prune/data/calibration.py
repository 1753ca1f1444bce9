"""Any text source -> blocks of tokens with a fingerprint, split into a calibrating and a held-out part.

A block never crosses the border of a document and is at most one context long, so what the statistics see is what
the model sees in use. Blocks are right-padded in a batch; under a causal mask padding cannot reach the tokens before
it, so no attention mask is needed and padded positions are simply left out of every statistic.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fbn_prune.data.documents import read_documents
from fbn_prune.data.given import GivenData
from fbn_prune.errors import InvalidInput

MIN_BLOCK_TOKENS = 4
CHARACTERS_READ_PER_TOKEN = 16
"""How much text is read for each token of the budget: about four times what the tokens need, so that blocks are a
sample of the text and not its beginning, and no more, so that a huge file costs no more than a small one."""


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that calibration needs."""

    def __call__(self, text: Any, **kwargs: Any) -> Any: ...


@dataclass(frozen=True)
class Batch:
    """Right-padded blocks: `input_ids` int64 [blocks, length], `valid` bool of the same shape.

    `weights`, float64 [blocks], says how often each block's tokens count in statistics; None is once.
    """

    input_ids: Tensor
    valid: Tensor
    weights: Tensor | None = None

    @property
    def tokens(self) -> int:
        return int(self.valid.sum())

    @property
    def token_weights(self) -> Tensor | None:
        """The weight of every valid token, float64 [tokens], in order; None where all count once."""
        if self.weights is None:
            return None
        return self.weights[:, None].expand(self.valid.shape)[self.valid]


@dataclass(frozen=True)
class TokenBlocks:
    """Blocks of token ids (int64, each at most `context` long) and where they came from.

    `weights`, one number a block, says how often its tokens count in statistics; None is once.
    """

    blocks: tuple[Tensor, ...]
    context: int
    sources: tuple[str, ...]
    weights: tuple[float, ...] | None = None

    @property
    def tokens(self) -> int:
        return sum(len(block) for block in self.blocks)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the context length and of every block, in order, with the weights if there are."""
        digest = hashlib.sha256(f"context={self.context}".encode())
        if self.weights is not None:
            digest.update(json.dumps(self.weights).encode())
        for block in self.blocks:
            digest.update(len(block).to_bytes(8, "little"))
            digest.update(block.numpy().tobytes())
        return digest.hexdigest()

    def batches(self, batch_tokens: int) -> list[Batch]:
        """Group blocks of similar length into batches of about `batch_tokens` tokens, longest first."""
        order = self.batch_order()
        batches: list[Batch] = []
        while order:
            longest = len(self.blocks[order[0]])
            count = max(1, batch_tokens // longest)
            taken, order = order[:count], order[count:]
            ids = torch.zeros(len(taken), longest, dtype=torch.int64)
            valid = torch.zeros(len(taken), longest, dtype=torch.bool)
            for row, index in enumerate(taken):
                block = self.blocks[index]
                ids[row, : len(block)] = block
                valid[row, : len(block)] = True
            weights = None
            if self.weights is not None:
                weights = torch.tensor([self.weights[i] for i in taken], dtype=torch.float64)
            batches.append(Batch(ids, valid, weights))
        return batches

    def batch_order(self) -> list[int]:
        """The blocks' indices in the order in which :meth:`batches` goes through them, whatever the batch size."""
        return sorted(range(len(self.blocks)), key=lambda i: -len(self.blocks[i]))

    def subset(self, tokens: int) -> TokenBlocks:
        """The first blocks that together hold at least `tokens` tokens (all, if there are fewer)."""
        taken, count = 0, 0
        while taken < len(self.blocks) and count < tokens:
            count += len(self.blocks[taken])
            taken += 1
        return self.chosen(range(taken))

    def split(self, every: int) -> tuple[TokenBlocks, TokenBlocks]:
        """All blocks but each `every`-th one, and those: a share to try on what the others have shaped."""
        apart = [index for index in range(len(self.blocks)) if index % every == 0]
        rest = [index for index in range(len(self.blocks)) if index % every]
        return self.chosen(rest), self.chosen(apart)

    def chosen(self, indices: Sequence[int]) -> TokenBlocks:
        """Some of the blocks, with their weights."""
        blocks = tuple(self.blocks[index] for index in indices)
        weights = self.weights
        chosen = None if weights is None else tuple(weights[index] for index in indices)
        return TokenBlocks(blocks, self.context, self.sources, chosen)


@dataclass(frozen=True)
class CalibrationData:
    """What calibrates and what is held out for the before and after figures; no block is in both."""

    calibrating: TokenBlocks
    held_out: TokenBlocks


def tokenize_document(tokenizer: Tokenizer, document: str, context: int) -> list[Tensor]:
    """Cut one document into blocks of `context` tokens.

    Every block opens with the tokens that the tokenizer itself puts before a text (a BOS, or none), because a block
    stands for a whole context as the model meets it.
    """
    ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
    prefix = _prefix_ids(tokenizer)
    body = context - len(prefix)
    if body < 1:
        raise InvalidInput(f"context {context} leaves no room beside {len(prefix)} special tokens")
    blocks = [prefix + list(ids[start : start + body]) for start in range(0, len(ids), body)]
    return [
        torch.tensor(block, dtype=torch.int64) for block in blocks if len(block) >= MIN_BLOCK_TOKENS
    ]


def _prefix_ids(tokenizer: Tokenizer) -> list[int]:
    plain = list(tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])
    full = list(tokenizer("a", add_special_tokens=True, verbose=False)["input_ids"])
    for start in range(len(full)):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    return []


def calibration_data(
    sources: Sequence[str | GivenData],
    tokenizer: Tokenizer,
    *,
    tokens: int,
    context: int,
    held_out: float,
    seed: int,
    vocabulary: int,
) -> CalibrationData:
    """Sample about `tokens` calibration tokens, evenly over the sources, and hold out a share beside them.

    Parameters
    ----------
    context
        Tokens of a block; the caller has checked it against the model's.
    held_out
        Held-out tokens as a share of all sampled tokens, at least one block.
    vocabulary
        Ids at or above this are refused.

    Raises
    ------
    InvalidInput
        Empty text, text shorter than one block, or a tokenizer whose ids do not fit the model.
    """
    if not sources:
        raise InvalidInput("no calibration source given")
    share = tokens / len(sources)
    characters = int(share / (1 - held_out) + context) * CHARACTERS_READ_PER_TOKEN
    held: list[Tensor] = []
    candidates: list[list[Tensor]] = []
    names = tuple(source.name if isinstance(source, GivenData) else source for source in sources)
    for index, given in enumerate(sources):
        source = names[index]
        blocks = _source_blocks(given, tokenizer, characters, context, seed)
        _check_ids(blocks, vocabulary, source)
        available = sum(len(block) for block in blocks)
        if available < context or len(blocks) < 2:
            raise InvalidInput(
                f"calibration source {source!r} is too short: {available} tokens in {len(blocks)} "
                f"blocks, where two blocks of up to {context} are needed (one is held out): "
                "give more text or a smaller --context"
            )
        random.Random(f"{seed}/{index}").shuffle(blocks)
        ours = _take(blocks[:-1], held_out * min(available, share / (1 - held_out)))
        held.extend(ours)
        candidates.append(blocks[len(ours) :])
    seen = {bytes(block.numpy()) for block in held}
    calibrating: list[Tensor] = []
    for source, blocks in zip(names, candidates, strict=True):
        fresh = [block for block in blocks if bytes(block.numpy()) not in seen]
        if not fresh:
            raise InvalidInput(
                f"calibration source {source!r} repeats what is held out and nothing else: "
                "give text that differs"
            )
        calibrating.extend(_take(fresh, share))
    random.Random(f"{seed}/order").shuffle(calibrating)
    return CalibrationData(
        TokenBlocks(tuple(calibrating), context, names), TokenBlocks(tuple(held), context, names)
    )


def all_blocks(source: str | GivenData, tokenizer: Tokenizer, context: int) -> TokenBlocks:
    """Every block of a source, in the order of its text.

    Raises
    ------
    InvalidInput
        The source cannot be read, or gives no block.
    """
    name = source.name if isinstance(source, GivenData) else source
    blocks = _source_blocks(source, tokenizer, sys.maxsize, context, seed=0)
    return TokenBlocks(tuple(blocks), context, (name,))


def _source_blocks(
    source: str | GivenData, tokenizer: Tokenizer, characters: int, context: int, seed: int
) -> list[Tensor]:
    name = source.name if isinstance(source, GivenData) else source
    blocks: list[Tensor] = []
    if isinstance(source, GivenData) and source.rows:
        blocks = [piece for row in source.rows for piece in row.split(context)]
        blocks = [block for block in blocks if len(block) >= MIN_BLOCK_TOKENS]
    else:
        empty = True
        for document in read_documents(source, characters=characters, seed=seed):
            empty = False
            blocks.extend(tokenize_document(tokenizer, document, context))
        if empty:
            raise InvalidInput(f"calibration source {name!r} holds no text")
    if not blocks:
        raise InvalidInput(
            f"calibration source {name!r}: no document gives {MIN_BLOCK_TOKENS} tokens"
        )
    return blocks


def _check_ids(blocks: Sequence[Tensor], vocabulary: int, source: str) -> None:
    highest = max(int(block.max()) for block in blocks)
    if highest >= vocabulary:
        raise InvalidInput(
            f"the tokenizer gives id {highest} for {source!r}, but the model's vocabulary has "
            f"{vocabulary}: tokenizer and model do not belong together"
        )


def _take(blocks: Sequence[Tensor], tokens: float) -> list[Tensor]:
    """The first blocks up to `tokens` tokens, at least one."""
    taken: list[Tensor] = []
    count = 0
    for block in blocks:
        if taken and count >= tokens:
            break
        taken.append(block)
        count += len(block)
    return taken
