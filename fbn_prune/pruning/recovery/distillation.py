"""Train low-rank adapters so that the cut model predicts what the dense model predicts, and merge them.

LoRA (arXiv 2106.09685) on every linear map of the decoder layers, through peft and accelerate. The loss is the
Kullback-Leibler divergence of the cut model's next-token distribution from the dense model's (arXiv 1503.02531), so
no labels are needed. The state between two steps can be stored; training resumed from it gives the same weights.
"""

from __future__ import annotations

import math
import random
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from transformers import PreTrainedModel

from fbn_prune.data.calibration import Batch, TokenBlocks
from fbn_prune.model.shards import packed
from fbn_prune.progress import StageClock
from fbn_prune.store import Store

LOGIT_BYTES = 2**28
"""Largest size of a forward pass's float32 logits; a step of more tokens accumulates gradients over several passes."""

WARM_UP = 0.05
"""Share of the steps in which the learning rate rises."""

LONGEST_GRADIENT = 1.0

RATE_TIMES_WIDTH = 0.5
"""Learning rate times hidden size: 2e-3 at 256 channels, where it was measured, and 1.2e-4 at 4096, a common value
there."""


KEEPING_SHARE = 0.05
"""Share of the time to spend on storing states, so that large states are stored less often."""

MOST_LEFT_OUT = 5
"""Steps in a row that may compute NaN or Inf; more are a model that will compute nothing else."""

STATES = "distilled-"
"""Prefix of the names of stored states; the number of finished steps follows, so the last name is the latest state."""


@dataclass(frozen=True)
class DistillationOptions:
    """Settings of the adapters' training.

    Attributes
    ----------
    rank
        Rank of each adapter; its alpha is twice the rank.
    passes
        Passes over all blocks.
    step_tokens
        Tokens of one step.
    learning_rate
        Highest learning rate; after the warm-up, it falls to zero along a cosine.
    seed
        Seed of the adapters' start and of the order of the blocks.
    """

    rank: int = 32
    passes: int = 2
    step_tokens: int = 2048
    learning_rate: float = 2e-3
    seed: int = 0

    @classmethod
    def for_width(cls, hidden_size: int) -> DistillationOptions:
        """Return options with a learning rate that falls with the width, as a step then changes the output more."""
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
) -> int:
    """Train adapters on `model` and merge them into it, in place.

    A step whose gradient is NaN or Inf is left out. After :data:`MOST_LEFT_OUT` of them in a row the training ends.

    Parameters
    ----------
    model, dense
        The cut model and the dense model from which it was cut, on one device.
    maps
        Names of the linear maps to adapt.
    blocks
        Text to train on.
    store
        Keeps states, including the final one, and provides the last state of an earlier run; None keeps nothing.

    Returns
    -------
    int
        Steps that were left out, with those after the training's end.
    """
    store = store or Store()
    training = _Training(model, dense, maps, blocks, options)
    before = store.read_last(STATES)
    if before is not None:
        training.go_on_from(load(before))
    with clock.stage("distillation", blocks.tokens * options.passes, "tokens") as advance:
        kept, cost = time.perf_counter(), 0.0
        for done, step in enumerate(training.steps(), 1):
            if done > training.done and not training.hopeless:
                training.step(step)
                start = time.perf_counter()
                if done == training.total or (start - kept) * KEEPING_SHARE >= cost:
                    store.write(
                        f"{STATES}{done:08d}.safetensors",
                        lambda put: put(packed(training.state())),
                        replaces=store.names(STATES),
                    )
                    kept = time.perf_counter()
                    cost = kept - start
            advance(step.tokens)
    training.merge()
    return training.left_out + training.total - training.done


class _Training:
    """AdamW on the adapters of a model that is otherwise frozen."""

    def __init__(
        self,
        model: PreTrainedModel,
        dense: PreTrainedModel,
        maps: Sequence[str],
        blocks: TokenBlocks,
        options: DistillationOptions,
    ) -> None:
        self._blocks, self._options, self._dense = blocks, options, dense
        self._trained = [(p, p.requires_grad) for p in model.parameters()]
        vocabulary = int(model.config.vocab_size)
        self._forward_tokens = min(options.step_tokens, LOGIT_BYTES // (4 * vocabulary))
        adapted = _adapted(model, maps, options)
        self._parameters = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
        self._accelerator = Accelerator(cpu=model.device.type == "cpu", device_placement=False)
        self._adapted, self._optimizer = self._accelerator.prepare(
            adapted,
            torch.optim.AdamW(self._parameters.values(), lr=options.learning_rate, weight_decay=0),
        )
        count = len(blocks.blocks)
        self._step_blocks = max(1, options.step_tokens * count // max(blocks.tokens, 1))
        self.total = options.passes * math.ceil(count / self._step_blocks)
        self.done, self.left_out, self._in_a_row = 0, 0, 0

    @property
    def hopeless(self) -> bool:
        """Whether so many steps in a row were left out that the training has ended."""
        return self._in_a_row >= MOST_LEFT_OUT

    def steps(self) -> Iterator[TokenBlocks]:
        """Yield the blocks of each step, in an order that the seed and the number of the pass determine."""
        for index in range(self._options.passes):
            order = list(range(len(self._blocks.blocks)))
            random.Random(f"{self._options.seed} {index}").shuffle(order)
            for first in range(0, len(order), self._step_blocks):
                yield self._blocks.chosen(order[first : first + self._step_blocks])

    def step(self, blocks: TokenBlocks) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self._options.learning_rate * _pace(self.done, self.total)
        for batch in blocks.batches(self._forward_tokens):
            self._accelerator.backward(self._divergence(batch) / blocks.tokens)
        norm = self._accelerator.clip_grad_norm_(self._parameters.values(), LONGEST_GRADIENT)
        if math.isfinite(norm):
            self._optimizer.step()
            self._in_a_row = 0
        else:
            self.left_out, self._in_a_row = self.left_out + 1, self._in_a_row + 1
        self._optimizer.zero_grad()
        self.done += 1

    def _divergence(self, batch: Batch) -> Tensor:
        """Divergence summed over the batch's tokens, in nats."""
        ids = batch.input_ids.to(self._dense.device)
        valid = batch.valid.to(ids.device)
        with torch.no_grad():
            wanted = log_softmax(self._dense(ids, use_cache=False).logits[valid].float(), -1)
        found = log_softmax(self._adapted(ids, use_cache=False).logits[valid].float(), -1)
        divergence = kl_div(found, wanted, reduction="none", log_target=True).sum(-1)
        weights = batch.token_weights
        return divergence.sum() if weights is None else (divergence * weights.to(found)).sum()

    def merge(self) -> None:
        """Merge the adapters into the weights, and restore which parameters require gradients."""
        self._accelerator.unwrap_model(self._adapted).merge_and_unload()
        for parameter, required in self._trained:
            parameter.requires_grad_(required)

    def state(self) -> dict[str, Tensor]:
        """Numbers of steps, adapters and optimizer moments; the options determine everything else."""
        state = {"steps": torch.tensor([self.done, self.left_out, self._in_a_row])}
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
        self.done, self.left_out, self._in_a_row = state["steps"].tolist()
        for name, parameter in self._parameters.items():
            parameter.data.copy_(state[name])
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(self.done - self.left_out)),
                "exp_avg": state[f"{name} first"].to(parameter.device),
                "exp_avg_sq": state[f"{name} second"].to(parameter.device),
            }


def _adapted(
    model: PreTrainedModel, maps: Sequence[str], options: DistillationOptions
) -> PeftModel:
    config = LoraConfig(
        r=options.rank,
        lora_alpha=2 * options.rank,
        target_modules=list(maps),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about peft's internals; users cannot act on them
        torch.manual_seed(options.seed)
        adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    return adapted


def _pace(step: int, steps: int) -> float:
    """The learning rate of a step as a share of the highest."""
    warm_up = max(1, round(WARM_UP * steps))
    return min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / steps)))
