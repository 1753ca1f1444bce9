"""Train a cut model so that it predicts what the dense model predicts.

What is trained are low-rank adapters or all weights of the decoder layers' linear maps
(:mod:`fbn_prune.pruning.recovery.trained`). The loss is the Kullback-Leibler divergence of the cut model's next-token
distribution from the dense model's (arXiv 1503.02531), so no labels are needed; the text's own loss can be added at a
weight. Of several processes each computes the gradients of a share of every step's text, and all take the same step.

A few blocks are set aside: this loss on them is measured as the training goes, and the weights with which it was least
are kept. A model that has become worse than it was before the training goes back to these weights, and on at a lower
rate, so that no rate need be tuned. The state between two steps can be stored; training resumed from it gives the same
weights, unless a time limit sets its length.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import load
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel

from fbn_prune import distributed
from fbn_prune.data.calibration import Batch, TokenBlocks
from fbn_prune.model.shards import packed
from fbn_prune.progress import StageClock
from fbn_prune.pruning.recovery import Weights
from fbn_prune.pruning.recovery.trained import Adapters, AllWeights, Trained
from fbn_prune.store import Store

LOGIT_BYTES = 2**28
"""Largest size of a forward pass's float32 logits; a step of more tokens accumulates gradients over several passes."""

WARM_UP = 0.05
"""Share of the steps in which the learning rate rises."""

LONGEST_GRADIENT = 1.0

RATE_TIMES_WIDTH = 0.5
"""Learning rate of adapters times hidden size: 2e-3 at 256 channels, where it was measured, and 1.2e-4 at 4096, a
common value there."""

RELATIVE_RATE = 5e-4
"""Learning rate of all weights, relative to the root mean square of each tensor: measured on a model of 135 M
parameters, which four times as much makes worse at first; one of 7 M bears ten times as much
(`eval/quality/recovery_ways.py`)."""

SETBACK, SLOWER = 1.01, 0.25
"""If the loss set aside is more than this multiple of what it was at the start, the rate is lowered by this factor."""

KEEPING_SHARE = 0.05
"""Share of the time to spend on storing states, so that large states are stored less often."""

MOST_LEFT_OUT = 5
"""Steps in a row that may compute NaN or Inf; more are a model that will compute nothing else."""

CHECKS = 10
"""How often the training is measured."""

CHECK_TOKENS = 1024
"""Tokens to set aside for that; more take more time."""

LARGEST_PART = 8
"""At most one block in so many is set aside."""

STATES = "distilled-"
"""Prefix of the names of stored states; the number of finished steps follows, so the last name is the latest state."""


@dataclass(frozen=True)
class DistillationOptions:
    """Settings of the training.

    Attributes
    ----------
    weights
        Whether adapters or all weights of the linear maps are trained.
    rank
        Rank of each adapter; its alpha is twice the rank.
    passes
        Passes over all blocks.
    step_tokens
        Tokens of one step.
    learning_rate
        Highest learning rate; after the warm-up, it falls to zero along a cosine. That of all weights is relative to
        the root mean square of each tensor.
    seed
        Seed of the adapters' start and of the order of the blocks.
    minutes
        Longest time; the learning rate then falls to zero by that time. None sets no limit.
    text_loss
        Weight of the text's own loss, between 0 and 1; the divergence has the rest.
    """

    weights: Weights = "adapters"
    rank: int = 32
    passes: int = 2
    step_tokens: int = 2048
    learning_rate: float = 2e-3
    seed: int = 0
    minutes: float | None = None
    text_loss: float = 0.0

    @classmethod
    def for_width(cls, hidden_size: int, weights: Weights = "adapters") -> DistillationOptions:
        """Return options with a learning rate for the hidden size.

        That of adapters falls with it, as a step then changes the output more; that of all weights is relative.
        """
        if weights == "all":
            return cls(weights, learning_rate=RELATIVE_RATE)
        return cls(learning_rate=min(5e-3, RATE_TIMES_WIDTH / hidden_size))


def distil(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    maps: Sequence[str],
    blocks: TokenBlocks,
    options: DistillationOptions,
    clock: StageClock,
    *,
    store: Store | None = None,
) -> Distilled:
    """Train `model` in place.

    A step whose gradient is NaN or Inf is left out. After :data:`MOST_LEFT_OUT` of them in a row the training ends.

    Parameters
    ----------
    model, dense
        The cut model and the dense model from which it was cut, on one device.
    maps
        Names of the linear maps to train.
    blocks
        Text to train on.
    store
        Keeps states, including the final one, and provides the last state of an earlier run; None keeps nothing.
    """
    store = store or Store()
    blocks, aside = _set_aside(blocks)
    training = _Training(model, dense, maps, blocks, aside, options)
    before = store.read_last(STATES)
    if before is not None:
        training.go_on_from(load(before))
    with clock.stage("distillation", blocks.tokens * options.passes, "tokens") as advance:
        kept, cost = time.perf_counter(), 0.0
        for done, step in enumerate(training.steps(), 1):
            if done > training.done and not training.over:
                training.step(step)
                training.check()
                start = time.perf_counter()
                if training.over or (start - kept) * KEEPING_SHARE >= cost:
                    store.write(
                        f"{STATES}{done:08d}.safetensors",
                        lambda put: put(packed(training.state())),
                        replaces=store.names(STATES),
                    )
                    kept = time.perf_counter()
                    cost = kept - start
            advance(step.tokens)
    training.merge()
    unable = training.total - training.done if training.hopeless else 0
    return Distilled(training.left_out + unable, training.curve)


def _set_aside(blocks: TokenBlocks) -> tuple[TokenBlocks, TokenBlocks | None]:
    """The blocks to train on, and those to measure on; None of fewer than eight blocks."""
    if len(blocks.blocks) < LARGEST_PART:
        return blocks, None
    every = max(LARGEST_PART, blocks.tokens // CHECK_TOKENS)
    return blocks.split(min(every, len(blocks.blocks)))


@dataclass(frozen=True)
class Distilled:
    """Steps that were left out, with those after an end by NaN or Inf; and tokens with the loss, as measured."""

    left_out: int
    curve: list[tuple[int, float]]


class _Training:
    """AdamW on parts of a model that is otherwise frozen."""

    def __init__(
        self,
        model: PreTrainedModel,
        dense: PreTrainedModel,
        maps: Sequence[str],
        blocks: TokenBlocks,
        aside: TokenBlocks | None,
        options: DistillationOptions,
    ) -> None:
        self._blocks, self._options, self._dense = blocks, options, dense
        self._aside = aside
        vocabulary = int(model.config.vocab_size)
        own = math.ceil(options.step_tokens / distributed.world())
        self._forward_tokens = min(own, LOGIT_BYTES // (4 * vocabulary))
        self._trained: Trained = (
            AllWeights(model, maps)
            if options.weights == "all"
            else Adapters(model, maps, options.rank, options.seed)
        )
        self._parameters = self._trained.parameters
        groups = [
            {"params": [parameter], "lr": rate, "highest": rate}
            for parameter, rate in self._trained.rates(options.learning_rate)
        ]
        self._model = self._trained.model
        self._optimizer = torch.optim.AdamW(groups, weight_decay=0)
        count = len(blocks.blocks)
        self._step_blocks = max(1, options.step_tokens * count // max(blocks.tokens, 1))
        self.total = options.passes * math.ceil(count / self._step_blocks)
        self.done, self.left_out, self._in_a_row = 0, 0, 0
        self.tokens, self._seconds = 0, 0.0
        self._best: dict[str, Tensor] = {}
        self._rate, self._since = 1.0, 0
        self.curve: list[tuple[int, float]] = []

    @property
    def hopeless(self) -> bool:
        """Whether so many steps in a row were left out that the training has ended."""
        return self._in_a_row >= MOST_LEFT_OUT

    @property
    def over(self) -> bool:
        """Whether the training has ended: all steps are done, the time is up, or it is hopeless."""
        return self.hopeless or self._progress >= 1

    @property
    def _progress(self) -> float:
        """Share of the training that is done, in steps or, if that is more, in time."""
        share = self.done / self.total
        if self._options.minutes is None:
            return share
        return max(share, self._seconds / (60 * self._options.minutes))

    def check(self) -> None:
        """Measure the loss on the blocks set aside if a check is due; keep the best values, or go back to them."""
        due = int(self._progress * CHECKS) >= len(self.curve)
        if self._aside is None or not (due or self.over):
            return
        start = time.perf_counter()
        with torch.no_grad():
            own = distributed.share(self._aside.batches(self._forward_tokens))
            (total,) = distributed.total(
                sum(float(self._loss(b, self._options.text_loss)) for b in own)
            )
        self._record(total / self._aside.tokens)
        self._seconds += distributed.of_first(time.perf_counter() - start)

    def _record(self, loss: float) -> None:
        best = min((value for _, value in self.curve), default=math.inf)
        self.curve.append((self.tokens, loss))
        if not self._best or loss < best:
            self._best = {name: p.detach().clone() for name, p in self._parameters.items()}
        elif not loss <= SETBACK * self.curve[0][1] and not self.over:
            self._put_best()
            self._trained.apply()
            self._optimizer.state.clear()
            self._rate, self._since = self._rate * SLOWER, 0

    def _put_best(self) -> None:
        with torch.no_grad():
            for name, values in self._best.items():
                self._parameters[name].copy_(values)

    def steps(self) -> Iterator[TokenBlocks]:
        """Yield the blocks of each step, in an order that the seed and the number of the pass determine."""
        for index in range(self._options.passes):
            order = list(range(len(self._blocks.blocks)))
            random.Random(f"{self._options.seed} {index}").shuffle(order)
            for first in range(0, len(order), self._step_blocks):
                yield self._blocks.chosen(order[first : first + self._step_blocks])

    def step(self, blocks: TokenBlocks) -> None:
        if not self.curve:
            self.check()
        start = time.perf_counter()
        for group in self._optimizer.param_groups:
            group["lr"] = group["highest"] * self._pace()
        for batch in distributed.share(blocks.batches(self._forward_tokens)):
            (self._loss(batch, self._options.text_loss) / blocks.tokens).backward()
            self._trained.gather()
        self._add_up_gradients()
        norm = clip_grad_norm_(self._parameters.values(), LONGEST_GRADIENT)
        if math.isfinite(norm):
            self._optimizer.step()
            self._trained.apply()
            self._in_a_row, self._since = 0, self._since + 1
        else:
            self.left_out, self._in_a_row = self.left_out + 1, self._in_a_row + 1
        self._optimizer.zero_grad()
        self.done, self.tokens = self.done + 1, self.tokens + blocks.tokens
        self._seconds += distributed.of_first(time.perf_counter() - start)

    def _add_up_gradients(self) -> None:
        """Give every process the gradients of the whole step; one that had no batch of it has none of its own."""
        if distributed.world() > 1:
            for parameter in self._parameters.values():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                distributed.add_up(parameter.grad)

    def _loss(self, batch: Batch, text_loss: float) -> Tensor:
        """Divergence and, at the weight `text_loss`, the text's own loss, summed over the batch's tokens, in nats."""
        ids = batch.input_ids.to(self._dense.device)
        valid = batch.valid.to(ids.device)
        with torch.no_grad():
            wanted = log_softmax(self._dense(ids, use_cache=False).logits[valid].float(), -1)
        found = log_softmax(self._model(ids, use_cache=False).logits[valid].float(), -1)
        loss = kl_div(found, wanted, reduction="none", log_target=True).sum(-1)
        if text_loss > 0:
            following = ids.roll(-1, 1)
            told = valid & valid.roll(-1, 1)  # the last token of a block has no next one
            told[:, -1] = False
            own = -found.gather(1, following[valid][:, None])[:, 0] * told[valid]
            loss = (1 - text_loss) * loss + text_loss * own
        weights = batch.token_weights
        return loss.sum() if weights is None else (loss * weights.to(found)).sum()

    def _pace(self) -> float:
        """The learning rate of the next step as a share of the highest."""
        warm_up = max(1, round(WARM_UP * self.total))
        falling = 0.5 * (1 + math.cos(math.pi * min(self._progress, 1.0)))
        return self._rate * min((self._since + 1) / warm_up, falling)

    def merge(self) -> None:
        """Give the model the best values, and restore which parameters require gradients."""
        self._put_best()
        self._trained.merge()

    def state(self) -> dict[str, Tensor]:
        """Numbers of steps, values and optimizer moments; the options determine everything else."""
        numbers = [self.done, self.left_out, self._in_a_row, self.tokens, self._since]
        state = {"steps": torch.tensor(numbers), "curve": torch.tensor(self.curve).double()}
        state["seconds"] = torch.tensor(self._seconds, dtype=torch.float64)
        state["rate"] = torch.tensor(self._rate, dtype=torch.float64)
        state |= {f"{name} best": values for name, values in self._best.items()}
        for name, parameter in self._parameters.items():
            moments = self._optimizer.state.get(parameter, {})  # none before the first step
            state |= {
                name: parameter.detach(),
                f"{name} first": moments.get("exp_avg", torch.zeros_like(parameter)),
                f"{name} second": moments.get("exp_avg_sq", torch.zeros_like(parameter)),
            }
        return state

    def go_on_from(self, state: dict[str, Tensor]) -> None:
        """Resume from a state of :meth:`state`."""
        self.done, self.left_out, self._in_a_row, self.tokens, self._since = state["steps"].tolist()
        self._seconds, self._rate = float(state["seconds"]), float(state["rate"])
        self.curve = [(int(tokens), value) for tokens, value in state["curve"].tolist()]
        for name, parameter in self._parameters.items():
            parameter.data.copy_(state[name])
            if f"{name} best" in state:
                self._best[name] = state[f"{name} best"].to(parameter.device)
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(self._since)),
                "exp_avg": state[f"{name} first"].to(parameter.device),
                "exp_avg_sq": state[f"{name} second"].to(parameter.device),
            }
        self._trained.apply()
