"""Turn text into blocks of tokens, and split them into calibration data and a held-out share.

A block lies within one document and is at most one context long, so the statistics come from inputs like those the
model sees in use. Blocks in a batch are right-padded; under a causal mask padding does not affect the tokens before it,
so no attention mask is needed, and statistics leave padded positions out.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fbn_prune.data.documents import Reading, read_documents
from fbn_prune.data.given import CHARACTERS_READ_PER_TOKEN, GivenData
from fbn_prune.errors import InvalidInput

MIN_BLOCK_TOKENS = 4


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that calibration needs."""

    def __call__(self, text: Any, **kwargs: Any) -> Any: ...


@dataclass(frozen=True)
class Batch:
    """Right-padded blocks of tokens.

    Attributes
    ----------
    input_ids
        int64 [blocks, length].
    valid
        bool [blocks, length]: false for padding.
    weights
        float64 [blocks]: the weight of each block's tokens in statistics; None means 1.
    """

    input_ids: Tensor
    valid: Tensor
    weights: Tensor | None = None

    @property
    def tokens(self) -> int:
        return int(self.valid.sum())

    @property
    def token_weights(self) -> Tensor | None:
        """The weight of every valid token in order, float64 [tokens]; None if all are 1."""
        if self.weights is None:
            return None
        return self.weights[:, None].expand(self.valid.shape)[self.valid]


@dataclass(frozen=True)
class TokenBlocks:
    """Blocks of token ids and the names of their sources.

    Attributes
    ----------
    blocks
        int64 [length] each.
    context
        The largest length of a block.
    sources
        Names of the sources.
    weights
        The weight of each block's tokens in statistics; None means 1.
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
        """SHA-256 of the context length, the weights if there are any, and all blocks in order."""
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
        """Return the blocks' indices in the order of :meth:`batches`, which does not depend on the batch size."""
        return sorted(range(len(self.blocks)), key=lambda i: -len(self.blocks[i]))

    def subset(self, tokens: int) -> TokenBlocks:
        """Return the first blocks with together at least `tokens` tokens, or all blocks if they have fewer."""
        taken, count = 0, 0
        while taken < len(self.blocks) and count < tokens:
            count += len(self.blocks[taken])
            taken += 1
        return self.chosen(range(taken))

    def split(self, every: int) -> tuple[TokenBlocks, TokenBlocks]:
        """Return (the other blocks, every `every`-th block); the second part can validate results of the first."""
        validation = [index for index in range(len(self.blocks)) if index % every == 0]
        rest = [index for index in range(len(self.blocks)) if index % every]
        return self.chosen(rest), self.chosen(validation)

    def chosen(self, indices: Sequence[int]) -> TokenBlocks:
        """Return the blocks of these indices with their weights."""
        blocks = tuple(self.blocks[index] for index in indices)
        weights = self.weights
        chosen = None if weights is None else tuple(weights[index] for index in indices)
        return TokenBlocks(blocks, self.context, self.sources, chosen)


@dataclass(frozen=True)
class CalibrationData:
    """Blocks for calibration, and held-out blocks to measure perplexity before and after; no block is in both."""

    calibrating: TokenBlocks
    held_out: TokenBlocks


def tokenize_document(tokenizer: Tokenizer, document: str, context: int) -> list[Tensor]:
    """Split a document into blocks of at most `context` tokens, int64 [length] each.

    Every block starts with the tokens that the tokenizer puts before a text (a BOS, or none), like the inputs the model
    sees in use. Blocks of fewer than `MIN_BLOCK_TOKENS` tokens are dropped.

    Raises
    ------
    InvalidInput
        `context` has no room beside the special tokens.
    """
    ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
    prefix = prefix_ids(tokenizer)
    body = context - len(prefix)
    if body < 1:
        raise InvalidInput(
            f"context {context} leaves no room beside {len(prefix)} special tokens: give a larger --context"
        )
    blocks = [prefix + list(ids[start : start + body]) for start in range(0, len(ids), body)]
    return [
        torch.tensor(block, dtype=torch.int64) for block in blocks if len(block) >= MIN_BLOCK_TOKENS
    ]


def prefix_ids(tokenizer: Tokenizer) -> list[int]:
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
    note: Callable[[str], None] = lambda line: None,
) -> CalibrationData:
    """Sample about `tokens` calibration tokens evenly from the sources, and a held-out share in addition.

    Parameters
    ----------
    sources
        Names of sources as on the command line, or data given in Python.
    tokenizer
        The model's tokenizer.
    tokens
        Number of calibration tokens.
    context
        Most tokens of a block; the caller has checked that the model supports it.
    held_out
        Held-out tokens as a share of all sampled tokens; at least one block of each source is held out.
    seed
        Seed of the sample.
    vocabulary
        Number of the model's embeddings; larger token ids are refused.
    note
        Called with a line on what was found in a source, such as the field that holds its text.

    Raises
    ------
    InvalidInput
        A source has no text or fewer than two blocks, or the tokenizer's ids do not fit the model.
    """
    if not sources:
        raise InvalidInput("no calibration source given: name one with --calibration")
    share = tokens / len(sources)
    characters = int(share / (1 - held_out) + context) * CHARACTERS_READ_PER_TOKEN
    held: list[Tensor] = []
    candidates: list[list[Tensor]] = []
    names = tuple(source.name if isinstance(source, GivenData) else source for source in sources)
    reading = Reading(tokenizer, note)
    for index, (source, name) in enumerate(zip(sources, names, strict=True)):
        blocks = _source_blocks(source, tokenizer, characters, context, seed, reading)
        check_ids(blocks, vocabulary, name)
        available = sum(len(block) for block in blocks)
        if available < context or len(blocks) < 2:
            raise InvalidInput(
                f"calibration source {name!r} is too short: {available} tokens in {len(blocks)} "
                f"blocks, where two blocks of up to {context} are needed (one is held out): "
                "give more text or a smaller --context"
            )
        random.Random(f"{seed}/{index}").shuffle(blocks)
        source_held = _take(blocks[:-1], held_out * min(available, share / (1 - held_out)))
        held.extend(source_held)
        candidates.append(blocks[len(source_held) :])
    held_bytes = {bytes(block.numpy()) for block in held}
    calibrating: list[Tensor] = []
    for name, blocks in zip(names, candidates, strict=True):
        unseen = [block for block in blocks if bytes(block.numpy()) not in held_bytes]
        if not unseen:
            raise InvalidInput(
                f"calibration source {name!r} has no blocks that differ from the held-out ones: give more varied text"
            )
        calibrating.extend(_take(unseen, share))
    random.Random(f"{seed}/order").shuffle(calibrating)
    return CalibrationData(
        TokenBlocks(tuple(calibrating), context, names), TokenBlocks(tuple(held), context, names)
    )


def first_blocks(
    source: str | GivenData,
    tokenizer: Tokenizer,
    context: int,
    *,
    tokens: int = sys.maxsize,
    seed: int = 0,
    note: Callable[[str], None] = lambda line: None,
) -> TokenBlocks:
    """Return the blocks of a source in the order of its text: the first `tokens` tokens, or all.

    Parameters
    ----------
    context
        Tokens of a block at most.
    seed
        Draws the order in which the files of a folder are read.
    note
        Called with a line on what was found in the source.

    Raises
    ------
    InvalidInput
        The source cannot be read, or has no block.
    """
    name = source.name if isinstance(source, GivenData) else source
    characters = min((tokens + context) * CHARACTERS_READ_PER_TOKEN, sys.maxsize)
    reading = Reading(tokenizer, note)
    blocks = _source_blocks(source, tokenizer, characters, context, seed, reading)
    return TokenBlocks(tuple(blocks), context, (name,)).subset(tokens)


def _source_blocks(
    source: str | GivenData,
    tokenizer: Tokenizer,
    characters: int,
    context: int,
    seed: int,
    reading: Reading,
) -> list[Tensor]:
    name = source.name if isinstance(source, GivenData) else source
    blocks: list[Tensor] = []
    if isinstance(source, GivenData) and source.rows:
        blocks = [piece for row in source.rows for piece in row.split(context)]
        blocks = [block for block in blocks if len(block) >= MIN_BLOCK_TOKENS]
    else:
        empty = True
        for document in read_documents(source, characters=characters, seed=seed, reading=reading):
            empty = False
            blocks.extend(tokenize_document(tokenizer, document, context))
        if empty:
            raise InvalidInput(f"calibration source {name!r} has no text: give one that has")
    if not blocks:
        raise InvalidInput(
            f"calibration source {name!r}: every document has fewer than {MIN_BLOCK_TOKENS} tokens; "
            "give longer ones"
        )
    return blocks


def check_ids(blocks: Sequence[Tensor], vocabulary: int, source: str) -> None:
    """Raise InvalidInput if a block of the source has an id that the model's vocabulary does not have."""
    highest = max(int(block.max()) for block in blocks)
    if highest >= vocabulary:
        raise InvalidInput(
            f"the tokenizer returns the id {highest} for {source!r}, but the model's vocabulary has only "
            f"{vocabulary}: use the model's own tokenizer"
        )


def _take(blocks: Sequence[Tensor], tokens: float) -> list[Tensor]:
    """The first blocks with together about `tokens` tokens, at least one block."""
    taken: list[Tensor] = []
    count = 0
    for block in blocks:
        if taken and count >= tokens:
            break
        taken.append(block)
        count += len(block)
    return taken
