"""How a run keeps within a memory budget: decided before any work, from the checkpoint's headers and the recipe.

A model that fits is held in memory whole. One that fits no single GPU but all of the machine's together is spread over
them, layer by layer (:mod:`fbn_prune.model.placement`). Any other is streamed (:mod:`fbn_prune.model.streaming`); then,
in this order, activations kept for the ICA go to disk, hidden states go to disk, and batches become smaller. What is
left is the least the run takes: one layer's weights, or one layer's second order, whichever is larger.
"""

from __future__ import annotations

import resource
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from fbn_prune.distributed import processes
from fbn_prune.errors import InvalidInput
from fbn_prune.model.checkpoint import SLICE_BYTES, Checkpoint
from fbn_prune.model.placement import layer_bytes, place_layers
from fbn_prune.networks.sampling import LEAST_BLOCKS
from fbn_prune.recipe import Recipe, parse_size

PROCESS_BYTES = 580 * 10**6
"""Python, torch, transformers and what the report draws with, before any model."""

RECOVERY_TOKENS = 2048
"""Tokens of a training step of the recovery (`recovery/healing.py`, which is slow to import)."""

LOGIT_BYTES = 2**28
"""The largest logits that the recovery makes at once."""


@dataclass(frozen=True)
class MemoryPlan:
    """What is held where.

    Attributes
    ----------
    streamed
        Whether weights are read from the checkpoint a layer at a time instead of loaded whole.
    batch_tokens
        Tokens of one forward batch.
    keep_activations, keep_hidden
        Whether the activations that the ICA reads twice, and the hidden states between two layers, stay in memory.
    stages
        Stage -> predicted peak of the process in bytes, on host and device together.
    scratch
        Folder for what does not stay in memory.
    placement
        For each decoder layer the number of the GPU that holds it, all else being on GPU 0; None where the model is
        not spread over several.
    """

    streamed: bool
    batch_tokens: int
    keep_activations: bool
    keep_hidden: bool
    stages: dict[str, int]
    scratch: Path
    placement: tuple[int, ...] | None = None

    @property
    def peak_bytes(self) -> int:
        return max(self.stages.values())

    @property
    def words(self) -> str:
        """What was decided, in a few words."""
        if self.placement is not None:
            (first, layers), *others = sorted(Counter(self.placement).items())
            more = "".join(f", {count} on GPU {gpu}" for gpu, count in others)
            shares = f"{layers} layers on GPU {first}{more}"
            return f"the model in memory, spread over several GPUs ({shares})"
        if not self.streamed:
            return "the model in memory"
        hidden = "memory" if self.keep_hidden else "disk"
        return f"weights streamed layer by layer, hidden states in {hidden}"


def plan_memory(
    recipe: Recipe,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    context: int,
) -> MemoryPlan:
    """The quickest way of running the recipe within its `memory_budget`, or within what is free.

    Raises
    ------
    InvalidInput
        No way keeps within the budget that the recipe states.
    """
    budget = None
    if recipe.memory_budget is not None:
        budget = parse_size(recipe.memory_budget, "memory_budget")
    free = free_memory(device)
    plans: list[MemoryPlan] = []
    for plan in possible_plans(recipe, checkpoint, device, dtype, context):
        fits_device = plan.placement is not None or plan.peak_bytes <= free
        if budget is None:
            fits = fits_device
        elif may_spread(device) and not plan.streamed:
            fits = plan.peak_bytes <= budget and fits_device
        else:
            fits = plan.peak_bytes <= budget
        if fits:
            return plan
        plans.append(plan)
    least = min(plans, key=lambda plan: plan.peak_bytes)
    if budget is None:
        return least
    stage = max(least.stages, key=least.stages.__getitem__)
    why = ""
    if recipe.needs_whole_model:
        why = ", as gradients need the whole model in memory"
    raise InvalidInput(
        f"memory_budget = {recipe.memory_budget}: the least that this run takes is "
        f"{least.peak_bytes / 1e9:.2f}GB (stage {stage}{why})"
    )


def possible_plans(
    recipe: Recipe,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    context: int,
) -> Iterator[MemoryPlan]:
    """Every way of running the recipe, quickest first."""
    usual = 16384 if device.type == "cuda" else 4096
    scratch = Path(tempfile.gettempdir()) if recipe.output is None else recipe.output.parent

    def planned(streamed: bool, batch: int, activations: bool, hidden: bool) -> MemoryPlan:
        sizes = _Sizes(recipe, checkpoint, dtype, context, streamed, batch, activations, hidden)
        return MemoryPlan(streamed, batch, activations, hidden, sizes.stages(), scratch)

    yield planned(False, usual, True, True)
    yield planned(False, usual, False, True)
    if may_spread(device):
        free = [free_on_device(gpu) for gpu in range(torch.cuda.device_count())]
        for activations in (True, False):
            plan = planned(False, usual, activations, True)
            copies = 2 if recipe.recover else 1
            if (spread := spread_plan(plan, checkpoint, dtype, free, copies)) is not None:
                yield spread
    if recipe.needs_whole_model:
        return
    yield planned(True, usual, True, True)
    yield planned(True, usual, False, True)
    batch = usual
    while batch >= min(context, usual):
        yield planned(True, batch, False, False)
        batch //= 2


def spread_plan(
    whole: MemoryPlan,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    free: Sequence[int],
    copies: int = 1,
) -> MemoryPlan | None:
    """The plan of a model in memory with its layers spread over several devices, or None where they do not hold it.

    A stage works on one layer at a time and so on every device in turn: each is to have room for all that the stages
    need beside the weights.

    Parameters
    ----------
    free
        Bytes free on each device.
    copies
        Of the model, in memory at once: two while a cut one is trained towards the dense one.
    """
    layers, rest = layer_bytes(checkpoint, dtype)
    beside = max(
        peak - PROCESS_BYTES - (sum(layers) + rest) * (copies if stage == "recovery" else 1)
        for stage, peak in whole.stages.items()
    )
    placement = place_layers(
        [copies * size for size in layers], copies * rest, [size - beside for size in free]
    )
    if placement is None:
        return None
    return replace(whole, placement=placement)


def may_spread(device: torch.device) -> bool:
    """Whether several GPUs may share the model: there are several, none was named, and no launcher dealt them out."""
    return (
        device.type == "cuda"
        and device.index is None
        and processes() == 1
        and torch.cuda.device_count() > 1
    )


def free_on_device(index: int) -> int:
    """Bytes free on one GPU."""
    free, _ = torch.cuda.mem_get_info(index)
    return int(free)


def free_memory(device: torch.device) -> int:
    """Bytes that the process may still take: of the machine, or of its own limit where that is less; of the GPU."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + PROCESS_BYTES
    process = psutil.Process()
    free = psutil.virtual_memory().available + process.memory_info().rss
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        free = min(free, limit - process.memory_info().vms + process.memory_info().rss)
    return int(free)


@dataclass(frozen=True)
class _Sizes:
    """Bytes of what each stage holds at once."""

    recipe: Recipe
    checkpoint: Checkpoint
    dtype: torch.dtype
    context: int
    streamed: bool
    batch: int
    keep_activations: bool
    keep_hidden: bool

    def stages(self) -> dict[str, int]:
        recipe, family, config = self.recipe, self.checkpoint.family, self.checkpoint.config
        width, layers = family.width(config), family.num_layers(config)
        hidden, vocabulary = family.hidden_size(config), family.vocab_size(config)
        tokens, size = recipe.tokens, self.dtype.itemsize
        layer, largest, rest = self._weights()
        base = PROCESS_BYTES + (rest if self.streamed else self.checkpoint.total_parameters) * size
        piece = min(SLICE_BYTES, largest)
        part = layer * size + piece if self.streamed else 0
        head = vocabulary * hidden * size + piece if self.streamed else 0
        batch = min(self.batch, tokens)
        forward = part + batch * (10 * hidden + 6 * width + self.context) * size
        held_out = int(tokens * recipe.held_out)
        rows = min(self.context if self.streamed else batch, held_out)
        logits = head + rows * vocabulary * (size + 2 * 4)
        # Trials of widths, and comparisons, measure a model in memory as if it were cut: a cut layer, one of its
        # projections on the way there, and the output weights that it is made from.
        as_if = 0 if self.streamed else (layer + 2 * hidden * width) * size
        stages = {
            "perplexity": base
            + self._hidden(held_out)
            + max(logits, head + batch * hidden * size, forward + as_if)
        }
        if not self.streamed:  # the files are mapped while the weights are made from them
            stages["load"] = base + self.checkpoint.total_bytes
        neurons, networks = width * layers, recipe.networks
        maps = 0
        if recipe.needs_networks:
            maps = 4 * networks * neurons
            stages["networks"] = base + max(
                self._discovery(width, layers, max(head, forward)), 7 * maps + recipe.network_tokens
            )
        square = 8 * width * width
        second_order = max(self._fit(width, hidden), part + 8 * hidden * width + 12.8 * width**2)
        waiting = 0
        if recipe.head_sparsity is not None:
            shape = family.head_shape(config)
            channels = shape.heads * shape.size
            second_order = max(second_order, self._fit(channels, hidden))
            # The attention's statistics stay beside the MLP's until both have been fitted.
            waiting = (32 if recipe.sequential else 16) * channels**2
        statistics = (2 if recipe.sequential else 1) * square
        streams = 2 if recipe.sequential else 1
        stages["prune"] = int(
            base
            + maps
            + streams * self._hidden(tokens)
            + waiting
            + max(head, forward + statistics, second_order)
        )
        stages["export"] = int(base + 1.3 * largest + maps)
        if recipe.needs_gradients:
            few = min(tokens, self.batch // 4)
            graph = few * layers * (16 * hidden + 8 * width) * size
            stages["gradients"] = base + graph + layers * 8 * hidden**2 + 3 * 4 * few * vocabulary
            stages["prune"] += layers * 8 * hidden**2
        if recipe.recover:
            few = min(tokens, RECOVERY_TOKENS)
            graph = few * layers * (16 * hidden + 8 * width) * size
            both = base + self.checkpoint.total_parameters * size
            trained = max(16 * layer, 16 * layers * 2 * recipe.recover_rank * (4 * hidden + width))
            logits = 4 * 4 * min(few * vocabulary, LOGIT_BYTES // 4)
            stages["recovery"] = both + max(2 * self._hidden(tokens), graph + logits) + trained
        return stages

    def _fit(self, inputs: int, outputs: int) -> float:
        """Of choosing among the inputs of one output projection, of the refit, and of the check of both."""
        sequential = self.recipe.sequential
        square, columns = 8 * inputs * inputs, 8 * outputs * inputs
        choosing = (7 if sequential else 3.2) * square + 3.5 * columns
        checking = (2.1 if sequential else 1.1) * square + 5 * columns
        return max(choosing, checking)

    def _hidden(self, tokens: int) -> int:
        """Hidden states between two layers."""
        hidden = self.checkpoint.family.hidden_size(self.checkpoint.config)
        held = tokens if self.keep_hidden else min(tokens, 2 * self.batch)
        return held * hidden * self.dtype.itemsize

    def _discovery(self, width: int, layers: int, forward: int) -> int:
        tokens = min(self.recipe.network_tokens, self.recipe.tokens)
        streamed = max(tokens, min(LEAST_BLOCKS * self.context, self.recipe.tokens))
        kept = 4 * tokens * width * (layers if self.keep_activations else 0)
        sampling = self._hidden(streamed) + forward + 3 * 4 * tokens * width
        gram = 4 * tokens * tokens * (1 if tokens > 1024 else 6) + 4 * 4 * tokens * width
        return kept + max(sampling, gram)

    def _weights(self) -> tuple[int, int, int]:
        """Parameters of the largest decoder layer, bytes of the largest tensor, parameters in no layer or embedding."""
        checkpoint, family = self.checkpoint, self.checkpoint.family
        layers: dict[int, int] = {}
        rest = 0
        vocabulary = family.vocab_size(checkpoint.config)
        for name, info in checkpoint.tensors.items():
            if (layer := family.layer_of(name)) is not None:
                layers[layer] = layers.get(layer, 0) + info.parameters
            elif info.shape[:1] != (vocabulary,):
                rest += info.parameters
        return max(layers.values()), max(i.nbytes for i in checkpoint.tensors.values()), rest
