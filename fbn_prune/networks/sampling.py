"""Stream a fixed sample of activations layer by layer, as input for the ICA."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fbn_prune import distributed
from fbn_prune.data.calibration import Batch, TokenBlocks
from fbn_prune.errors import InvalidInput
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.layerwise import LayerwiseForward
from fbn_prune.model.perplexity import loss_of_blocks
from fbn_prune.model.spill import Spilled
from fbn_prune.networks import ica
from fbn_prune.progress import Advance, StageClock

LEAST_BLOCKS = 32
"""Sample from at least this many blocks, if available, because the tokens of one block are alike."""

LOSS_TOKENS, LOSS_CONTEXT = 1024, 128
"""Tokens that :attr:`SampledActivations.loss` is measured on, at most so many at the start of a block: the logits of
whole blocks can be larger than the activations."""

CONTEXT_REACH = 8
"""Number of tokens shown before and after a network's top token."""


class SampledActivations:
    """Standardised activations Z [tokens, neurons] of each layer in turn, for a fixed sample of tokens.

    Iteration yields one layer at a time. The first pass also fills `mean` and `std` (lists of float32 [neurons]), and
    `loss`: the model's mean next-token loss in nats on about :data:`LOSS_TOKENS` tokens.

    Parameters
    ----------
    blocks
        Text to sample from: its first blocks, as many as the sample needs.
    tokens
        Size of the sample, which is evenly spaced over those blocks.
    batch_tokens
        Tokens of one forward pass, over all processes.
    keep
        Whether activations stay in memory between passes. Otherwise, a streamed model writes them to disk, and any
        other model computes them again.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        blocks: TokenBlocks,
        tokens: int,
        *,
        batch_tokens: int,
        keep: bool,
        clock: StageClock,
    ) -> None:
        self._adapter, self._clock = adapter, clock
        self._batches: list[Batch] = _sampled_blocks(blocks, tokens).batches(
            max(1, batch_tokens // distributed.world())
        )
        available = sum(batch.tokens for batch in self._batches)
        self.tokens = min(tokens, available)
        self._positions = _positions(self._batches, self.tokens)
        self.layers = adapter.num_layers
        self.widths = adapter.widths
        self._keep = keep
        self._kept: list[Tensor] | Spilled = []
        if not keep and (spilled := adapter.spill()) is not None:
            self._keep, self._kept = True, spilled
        self.mean: list[Tensor] = []
        self.std: list[Tensor] = []
        self.loss = math.nan

    def __iter__(self) -> Iterator[Tensor]:
        if len(self._kept) == self.layers:
            yield from self._kept
            return
        first = not self.mean
        own_batches = distributed.share(self._batches)
        stream = LayerwiseForward(self._adapter, own_batches)
        total = sum(batch.tokens for batch in own_batches)
        with self._clock.stage("activations", total * self.layers, "tokens x layers") as advance:
            for layer in range(self.layers):
                z, mean, std = self._layer(stream, layer, advance)
                if first:
                    self.mean.append(mean.cpu())
                    self.std.append(std.cpu())
                if self._keep:
                    self._kept.append(z)
                yield z
            if first:
                self.loss = self._loss(stream, own_batches)
        self._adapter.release()

    def _layer(
        self, stream: LayerwiseForward, layer: int, advance: Advance
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows: list[Tensor] = []
        positions = distributed.share(self._positions)
        stream.advance(
            lambda index, x: rows.append(x[positions[index].to(x.device)].float()),
            on_batch=advance,
        )
        none = torch.empty(0, self.widths[layer], device=self._adapter.layer_device(layer))
        x = distributed.joined_rows(torch.cat([none, *rows]))
        if not bool(torch.isfinite(x.sum())):
            raise InvalidInput(
                f"NaN or Inf among the MLP activations of layer {layer}: the checkpoint is "
                "damaged, or the compute type overflows (try --dtype float32)"
            )
        return ica.standardise(x)

    def _loss(self, stream: LayerwiseForward, batches: Sequence[Batch]) -> float:
        """Return the mean loss from the outputs of the last layer, which costs no further pass over the layers."""
        total, count = 0.0, 0
        for index, batch in enumerate(batches):
            for row in range(len(batch.input_ids)):
                if count >= LOSS_TOKENS / distributed.world():
                    break
                block = slice(row, row + 1), slice(LOSS_CONTEXT)
                hidden = stream.hidden[index][block].to(self._adapter.device)
                loss, tokens = loss_of_blocks(
                    stream.logits(hidden), batch.input_ids[block], batch.valid[block]
                )
                total, count = total + loss, count + tokens
        total, summed = distributed.total(total, count)
        return total / summed

    def token_ids(self) -> Tensor:
        """Return the sampled token ids, int64 [tokens]."""
        return torch.cat(
            [
                batch.input_ids[batch.valid][positions]
                for batch, positions in zip(self._batches, self._positions, strict=True)
            ]
        )

    def contexts(self, sample: int) -> tuple[list[int], int]:
        """Return the token ids around one sampled token, and the position of the token among them."""
        for batch, positions in zip(self._batches, self._positions, strict=True):
            if sample < len(positions):
                flat = int(torch.nonzero(batch.valid.flatten())[positions[sample]])
                row, column = divmod(flat, batch.input_ids.shape[1])
                ids = batch.input_ids[row][batch.valid[row]].tolist()
                start = max(0, column - CONTEXT_REACH)
                return ids[start : column + CONTEXT_REACH + 1], column - start
            sample -= len(positions)
        raise IndexError(sample)


def _sampled_blocks(blocks: TokenBlocks, tokens: int) -> TokenBlocks:
    enough = max(tokens, sum(len(block) for block in blocks.blocks[:LEAST_BLOCKS]))
    return blocks.subset(enough)


def _positions(batches: list[Batch], tokens: int) -> list[Tensor]:
    """Indices of an even sample of `tokens` tokens, for each batch among its valid tokens."""
    total = sum(batch.tokens for batch in batches)
    wanted = torch.arange(tokens) * total // tokens
    positions, start = [], 0
    for batch in batches:
        inside = (wanted >= start) & (wanted < start + batch.tokens)
        positions.append(wanted[inside] - start)
        start += batch.tokens
    return positions
