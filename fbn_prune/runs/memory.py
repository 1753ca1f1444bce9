"""Plan how a run stays within its memory budget, from the checkpoint's headers and the recipe alone.

A model that fits is loaded whole. If its recovery does not fit, it computes the layers' activations again for its
gradients (:mod:`fbn_prune.model.recomputing`). A model that fits only on several GPUs together is spread over them by
layers (:mod:`fbn_prune.model.placement`). Any other model is streamed (:mod:`fbn_prune.model.streaming`). If that is
not enough, first the activations for the ICA go to disk, then the hidden states, and then batches become smaller. The
minimum is the weights of one layer or the second-order matrices of one layer, whichever is larger.
"""

from __future__ import annotations

import resource
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import psutil
import torch

from fbn_prune.distributed import processes
from fbn_prune.errors import InvalidInput
from fbn_prune.model.checkpoint import SLICE_BYTES, Checkpoint
from fbn_prune.model.placement import layer_bytes, place_layers
from fbn_prune.networks.sampling import LEAST_BLOCKS, LOSS_CONTEXT
from fbn_prune.recipe import Recipe, parse_size

PROCESS_BYTES = 580 * 10**6
"""Memory of the process before it loads a model: Python, torch, transformers and matplotlib."""

RECOVERY_TOKENS = 2048
"""Tokens per training step of the recovery; repeated here because `recovery/healing.py` is slow to import."""

LOGIT_BYTES = 2**28
"""Size of the largest logits that the recovery computes at once."""

CACHE_BYTES = 2**18
"""Bytes of the attention's cache for each token of a batch, while the model writes text: 1 GB on a CPU and 4 GB on a
GPU. A step reads all weights whether it writes few texts or many."""

SHORT_SHARE = 0.25
"""As in `model/writing.py`, which is slow to import."""

ASIDE_TOKENS, LARGEST_PART = 4096, 8
"""As in `pruning/evidence.py`, which is slow to import."""


@dataclass(frozen=True)
class MemoryPlan:
    """Where a run keeps weights, activations and hidden states.

    Attributes
    ----------
    streamed
        Whether weights are read from the checkpoint layer by layer instead of loaded at once.
    batch_tokens
        Tokens per forward batch.
    keep_activations, keep_hidden
        Whether the ICA's activations, and the hidden states between two layers, stay in memory.
    recompute
        Whether the recovery keeps only the layers' inputs for its gradients, and computes the rest again.
    stages
        Predicted peak memory of each stage in bytes, host and device together.
    scratch
        Folder for temporary files.
    placement
        GPU index of each decoder layer (everything else is on GPU 0); None if the model is not spread over GPUs.
    """

    streamed: bool
    batch_tokens: int
    keep_activations: bool
    keep_hidden: bool
    stages: dict[str, int]
    scratch: Path
    placement: tuple[int, ...] | None = None
    recompute: bool = False

    @property
    def peak_bytes(self) -> int:
        return max(self.stages.values())

    @property
    def words(self) -> str:
        """The plan in a few words, for the dry run."""
        if self.placement is not None:
            (first, layers), *others = sorted(Counter(self.placement).items())
            more = "".join(f", {count} on GPU {gpu}" for gpu, count in others)
            shares = f"{layers} layers on GPU {first}{more}"
            return f"the model in memory, spread over several GPUs ({shares})"
        if not self.streamed:
            again = ", activations computed again while it is trained" if self.recompute else ""
            return f"the model in memory{again}"
        hidden = "memory" if self.keep_hidden else "disk"
        return f"weights streamed layer by layer, hidden states in {hidden}"


def plan_memory(
    recipe: Recipe,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    context: int,
    sizes: type[Sizes] | None = None,
) -> MemoryPlan:
    """Return the fastest plan that stays within the recipe's `memory_budget`, or within the free memory.

    Without a budget, the smallest plan is returned if none fits.

    Parameters
    ----------
    sizes
        Predicts the stages. Default: those of models without experts.

    Raises
    ------
    InvalidInput
        If no plan stays within the budget; the message names the smallest possible one.
    """
    budget = None
    if recipe.memory_budget is not None:
        budget = parse_size(recipe.memory_budget, "memory_budget")
    free = free_memory(device)
    plans: list[MemoryPlan] = []
    for plan in possible_plans(recipe, checkpoint, device, dtype, context, sizes):
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
        need = "text that the model writes needs" if recipe.writes_text else "gradients need"
        why = f"; {need} the whole model in memory"
    raise InvalidInput(
        f"memory_budget = {recipe.memory_budget}: this run needs at least "
        f"{least.peak_bytes / 1e9:.2f}GB (stage {stage}{why}); raise it, or lower --tokens or --context"
    )


def possible_plans(
    recipe: Recipe,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    context: int,
    sizes: type[Sizes] | None = None,
) -> Iterator[MemoryPlan]:
    """Yield all plans for a run, fastest first; parameters as in :func:`plan_memory`."""
    kind = sizes or Sizes
    usual = 16384 if device.type == "cuda" else 4096
    scratch = Path(tempfile.gettempdir()) if recipe.output is None else recipe.output.parent

    def planned(
        streamed: bool, batch: int, activations: bool, hidden: bool, recompute: bool = False
    ) -> MemoryPlan:
        found = kind(
            recipe, checkpoint, dtype, context, streamed, batch, activations, hidden, recompute
        )
        stages = found.stages()
        return MemoryPlan(
            streamed, batch, activations, hidden, stages, scratch, recompute=recompute
        )

    whole = [
        planned(False, usual, activations, True, recompute)
        for recompute in ((False, True) if recipe.distils else (False,))
        for activations in (True, False)
    ]
    yield from whole
    if may_spread(device) and kind.spreads:
        free = [free_on_device(gpu) for gpu in range(torch.cuda.device_count())]
        copies = 2 if recipe.recover else 1
        for plan in whole:
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
    """Return the plan with the model's layers spread over several devices, or None if it does not fit on them.

    A stage works on one layer after another, and so on every device. Each device therefore needs room for everything
    that a stage holds in addition to the weights.

    Parameters
    ----------
    whole
        The plan for one device with enough memory.
    free
        Free bytes of each device.
    copies
        Copies of the model in memory: two if the recovery trains the cut model to match the dense one.
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
    """Return whether the model may use several GPUs: they exist, no index was given, and no launcher assigned them."""
    return (
        device.type == "cuda"
        and device.index is None
        and processes() == 1
        and torch.cuda.device_count() > 1
    )


def cached_tokens(
    checkpoint: Checkpoint, dtype: torch.dtype, batch_tokens: int, context: int
) -> int:
    """Return how many tokens the attention's cache holds while the model writes text, at least one context.

    Keys and values count as wide as the hidden state, which few models exceed; not all state their heads.
    """
    family, config = checkpoint.family, checkpoint.config
    token = 2 * family.hidden_size(config) * family.num_layers(config) * dtype.itemsize
    return max(context, CACHE_BYTES * batch_tokens // token)


def free_on_device(index: int) -> int:
    """Return the free bytes of one GPU."""
    free, _ = torch.cuda.mem_get_info(index)
    return int(free)


def free_memory(device: torch.device) -> int:
    """Return the bytes that the process may use in all: of the GPU, or of the machine and the process's own limit."""
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
class Sizes:
    """Predicts the peak memory of each stage in bytes."""

    spreads: ClassVar[bool] = True
    """Whether the model may be spread over several GPUs."""

    recipe: Recipe
    checkpoint: Checkpoint
    dtype: torch.dtype
    context: int
    streamed: bool
    batch: int
    keep_activations: bool
    keep_hidden: bool
    recompute: bool = False

    def stages(self) -> dict[str, int]:
        recipe, family, config = self.recipe, self.checkpoint.family, self.checkpoint.config
        widths = family.widths(config)
        width, neurons, layers = max(widths), sum(widths), len(widths)
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
        few_logits = head + min(LOSS_CONTEXT, self.context) * vocabulary * (size + 2 * 4)
        # Trials of widths and comparisons cut one layer at a time in memory: the cut layer, one of its projections
        # while it is cut, and the output weights that it is made from.
        trial = 0 if self.streamed else (layer + 2 * hidden * width) * size
        stages = {
            "perplexity": base
            + self._hidden(held_out)
            + max(logits, head + batch * hidden * size, forward + trial)
        }
        if not self.streamed:  # the files are memory-mapped while the weights are loaded
            stages["load"] = base + self.checkpoint.total_bytes
        networks = recipe.networks
        maps = 0
        if recipe.needs_networks:
            maps = 4 * networks * neurons
            stages["networks"] = base + max(
                self._discovery(width, neurons, max(few_logits, forward)),
                7 * maps + recipe.network_tokens,
            )
        square = 8 * width * width
        second_order = max(self._fit(width, hidden), part + 8 * hidden * width + 12.8 * width**2)
        waiting = 0
        if recipe.head_sparsity is not None or recipe.removes_heads:
            shape = family.head_shape(config)
            channels = shape.heads * shape.size
            second_order = max(second_order, self._fit(channels, hidden))
            # The statistics of the attention stay in memory with those of the MLP until both are fitted.
            waiting = 16 * channels**2
            if recipe.fits_in_sequence:
                waiting += self._aside(channels, hidden)
        if recipe.forget is not None and recipe.forget_by == "erasing":
            waiting += 2 * square  # the statistics of the skill's text, and what they are made from
        statistics = square + (self._aside(width, hidden) if recipe.fits_in_sequence else 0)
        streams = 2 if recipe.fits_in_sequence else 1
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
            graph = few * (16 * hidden * layers + 8 * neurons) * size
            stages["gradients"] = base + graph + layers * 8 * hidden**2 + 3 * 4 * few * vocabulary
            stages["prune"] += layers * 8 * hidden**2
        if recipe.writes_text:
            wanted = max(tokens / (1 - recipe.held_out), recipe.recover_tokens or tokens)
            most = wanted / SHORT_SHARE + 3 * self.context  # no more texts than are still missing
            cache = min(CACHE_BYTES * self.batch, 2 * hidden * layers * size * most)
            # Each step copies the cache of one layer after another as it grows.
            stages["writing"] = int(base + 1.5 * cache + few_logits)
        if recipe.recover:
            few = min(tokens, RECOVERY_TOKENS)
            inside, deep = (neurons, layers) if not self.recompute else (width, 1)
            graph = few * (16 * hidden * deep + 8 * inside) * size
            if self.recompute:
                graph += few * hidden * layers * size
            both = base + self.checkpoint.total_parameters * size
            if recipe.recover_weights == "all":
                # Gradients, two moments and the best values, besides copies of values that are not float32.
                trained = (16 + (4 + size if size < 4 else 0)) * layer * layers
            else:
                adapters = 2 * recipe.recover_rank_or_default * (4 * hidden * layers + neurons)
                trained = max((16 + size) * layer, 16 * adapters)
            logits = 4 * 4 * min(few * vocabulary, LOGIT_BYTES // 4)
            stages["recovery"] = both + max(2 * self._hidden(tokens), graph + logits) + trained
        return stages

    def _fit(self, inputs: int, outputs: int) -> float:
        """Return the bytes for selecting inputs of one output projection, refitting it, and checking the result."""
        square, columns = 8 * inputs * inputs, 8 * outputs * inputs
        choosing = 3.2 * square + 3.5 * columns
        checking = 1.1 * square + 5 * columns
        if not self.recipe.fits_in_sequence:
            return max(choosing, checking)
        # The shares are chosen with statistics of their own, of all inputs, and float64 copies of the set-aside tokens.
        aside = self._aside(inputs, outputs)
        return max(5 * square + 10 * columns + 4 * aside, checking + aside)

    def _aside(self, inputs: int, outputs: int) -> int:
        """Return the bytes of what sequential mode knows of the difference from the dense model."""
        tokens = min(self.recipe.tokens / LARGEST_PART + self.context, ASIDE_TOKENS + self.context)
        return int(2 * 8 * outputs * inputs + 4 * tokens * (inputs + 2 * outputs))

    def _hidden(self, tokens: int) -> int:
        """Return the bytes of the hidden states between two layers."""
        hidden = self.checkpoint.family.hidden_size(self.checkpoint.config)
        held = tokens if self.keep_hidden else min(tokens, 2 * self.batch)
        return held * hidden * self.dtype.itemsize

    def _discovery(self, width: int, neurons: int, forward: int) -> int:
        tokens = min(self.recipe.network_tokens, self.recipe.tokens)
        streamed = max(tokens, min(LEAST_BLOCKS * self.context, self.recipe.tokens))
        kept = 4 * tokens * (neurons if self.keep_activations else 0)
        sampling = self._hidden(streamed) + forward + 3 * 4 * tokens * width
        gram = 4 * tokens * tokens * (1 if tokens > 1024 else 6) + 4 * 4 * tokens * width
        return kept + max(sampling, gram)

    def _weights(self) -> tuple[int, int, int]:
        """Return parameters of the largest layer, bytes of the largest tensor, parameters in no layer or embedding."""
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
