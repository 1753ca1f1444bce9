"""Low-rank adapters trained to make the cut model predict what the dense one predicts, and merged into its weights.

LoRA (arXiv 2106.09685) on every linear map of the decoder layers, through peft and accelerate; the loss is the
Kullback-Leibler divergence of the cut model's next-token distribution from the dense model's (arXiv 1503.02531), so no
labels are needed. The state between two steps can be kept, and training goes on from it to the same weights.
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
"""Largest float32 logits of a forward pass; a step of more tokens adds up the gradients of several."""

WARM_UP = 0.05
"""Share of the steps in which the learning rate rises."""

LONGEST_GRADIENT = 1.0

RATE_TIMES_WIDTH = 0.5
"""2e-3 at 256 channels, where it was measured; 1.2e-4 at 4096, which is customary there."""


KEEPING_SHARE = 0.05
"""Share of the time that may go into keeping states: often where that costs little, seldom where they are large."""

STATES = "distilled-"
"""What the names of kept states begin with; the number of steps done follows, so that the last one is the latest."""


@dataclass(frozen=True)
class DistillationOptions:
    """How the adapters are trained.

    Attributes
    ----------
    rank
        Of each adapter; its scale is twice that over the rank, as usual.
    passes
        Over all blocks.
    step_tokens
        Tokens of one step.
    learning_rate
        The highest; after the warm-up it falls to nothing along a cosine.
    """

    rank: int = 32
    passes: int = 2
    step_tokens: int = 2048
    learning_rate: float = 2e-3
    seed: int = 0

    @classmethod
    def for_width(cls, hidden_size: int) -> DistillationOptions:
        """A step that falls with the width of the model, as what a step does to its output grows with it."""
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
) -> None:
    """Train adapters on `model` and merge them into it, in place.

    Parameters
    ----------
    model, dense
        The cut model and the one it was cut from, on one device.
    maps
        Names of the linear maps to adapt.
    store
        Where the state comes from that an earlier run was in, and states go, the last one among them.
    """
    store = store or Store()
    training = _Training(model, dense, maps, blocks, options)
    before = store.read_last(STATES)
    if before is not None:
        training.go_on_from(load(before))
    with clock.stage("distillation", blocks.tokens * options.passes, "tokens") as advance:
        kept, cost = time.perf_counter(), 0.0
        for done, step in enumerate(training.steps(), 1):
            if done > training.done:
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
        self.done = 0

    def steps(self) -> Iterator[TokenBlocks]:
        """The blocks of each step, in an order drawn for each pass by the seed and the pass."""
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
        self._accelerator.clip_grad_norm_(self._parameters.values(), LONGEST_GRADIENT)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.done += 1

    def _divergence(self, batch: Batch) -> Tensor:
        """Summed over the batch's tokens, in nats."""
        ids = batch.input_ids.to(self._dense.device)
        valid = batch.valid.to(ids.device)
        with torch.no_grad():
            wanted = log_softmax(self._dense(ids, use_cache=False).logits[valid].float(), -1)
        found = log_softmax(self._adapted(ids, use_cache=False).logits[valid].float(), -1)
        divergence = kl_div(found, wanted, reduction="none", log_target=True).sum(-1)
        weights = batch.token_weights
        return divergence.sum() if weights is None else (divergence * weights.to(found)).sum()

    def merge(self) -> None:
        """Leave the model with the adapters' work in its weights, and as it was otherwise."""
        self._accelerator.unwrap_model(self._adapted).merge_and_unload()
        for parameter, required in self._trained:
            parameter.requires_grad_(required)

    def state(self) -> dict[str, Tensor]:
        """How many steps are done, the adapters, and their moments; all else follows from the options."""
        state = {"steps": torch.tensor(self.done)}
        for name, parameter in self._parameters.items():
            moments = self._optimizer.state[parameter]
            state |= {
                name: parameter.detach(),
                f"{name} first": moments["exp_avg"],
                f"{name} second": moments["exp_avg_sq"],
            }
        return state

    def go_on_from(self, state: dict[str, Tensor]) -> None:
        """Be in the state that :meth:`state` gave."""
        self.done = int(state["steps"])
        for name, parameter in self._parameters.items():
            parameter.data.copy_(state[name])
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(self.done)),
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
        warnings.simplefilter("ignore")  # about the insides of peft, and nobody can act on them
        torch.manual_seed(options.seed)
        adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    return adapted


def _pace(step: int, steps: int) -> float:
    """The learning rate of a step as a share of the highest."""
    warm_up = max(1, round(WARM_UP * steps))
    return min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / steps)))
