"""Heal a cut model on its calibration text, towards the dense model: first layer by layer, then as a whole.

Both steps change only the weights of linear maps in the decoder layers, so the architecture stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fbn_prune.data.calibration import TokenBlocks
from fbn_prune.errors import counted
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.recomputing import recomputed
from fbn_prune.model.spill import Spilled
from fbn_prune.progress import StageClock
from fbn_prune.pruning.recovery import Weights
from fbn_prune.pruning.recovery.distillation import DistillationOptions, distil
from fbn_prune.pruning.recovery.layer_matching import match_layers
from fbn_prune.store import Store

BATCH_TOKENS = 2048
"""Tokens of one step of matching. Distillation takes twice as many steps, as it has only one model to train."""


@dataclass(frozen=True)
class RecoveryOptions:
    """How to train.

    Attributes
    ----------
    passes
        Passes over the blocks in each step.
    rank
        Rank of the adapters.
    seed
        Seed of the order of the blocks.
    steps
        "match" and "distil", in the order in which they run.
    minutes, text_loss, weights
        See :class:`fbn_prune.pruning.recovery.distillation.DistillationOptions`.
    recompute
        Whether the distillation computes the layers' activations again for its gradients, in less memory.
    """

    passes: int
    rank: int
    seed: int
    steps: tuple[str, ...] = ("match", "distil")
    minutes: float | None = None
    text_loss: float = 0.0
    weights: Weights = "adapters"
    recompute: bool = False


@dataclass(frozen=True)
class Healed:
    """What a training did.

    Attributes
    ----------
    warnings
        One line for each part that was left out because it computed NaN or Inf.
    curve
        Of the distillation: tokens trained on, and the loss on text set aside (divergence from the dense model and, at
        its weight, the text's own loss), in nats a token; from before the first step to the end.
    """

    warnings: list[str]
    curve: list[tuple[int, float]]


def heal(
    adapter: ModelAdapter,
    dense: ModelAdapter,
    blocks: TokenBlocks,
    options: RecoveryOptions,
    clock: StageClock,
    *,
    store: Store | None = None,
) -> Healed:
    """Train the cut model in place towards the dense model, on `blocks` only.

    Parameters
    ----------
    adapter, dense
        The cut model and the dense model from which it was cut, on one device.
    store
        Keeps the training's progress, and provides that of an earlier run; None keeps nothing.
    """
    warnings: list[str] = []
    curve: list[tuple[int, float]] = []
    for step in options.steps:
        if step == "match":
            warnings += _match(adapter, dense, blocks, options, clock, store)
            continue
        settings = replace(
            DistillationOptions.for_width(adapter.hidden_size, options.weights),
            rank=options.rank,
            passes=options.passes,
            step_tokens=BATCH_TOKENS // 2,
            seed=options.seed,
            minutes=options.minutes,
            text_loss=options.text_loss,
        )
        layers = chain.from_iterable(adapter.decoder_layers)
        with recomputed(layers) if options.recompute else nullcontext():
            trained = distil(
                adapter.model, dense.model, list(linear_maps(adapter)), blocks, settings, clock, store=store
            )  # fmt: skip
        curve = trained.curve
        if trained.left_out:
            steps = counted(trained.left_out, "step")
            warnings.append(
                f"the recovery left out {steps} of its training that computed NaN or Inf"
            )
    return Healed(warnings, curve)


def _match(
    adapter: ModelAdapter,
    dense: ModelAdapter,
    blocks: TokenBlocks,
    options: RecoveryOptions,
    clock: StageClock,
    store: Store | None,
) -> list[str]:
    left = match_layers(
        adapter,
        dense,
        blocks.batches(BATCH_TOKENS),
        passes=options.passes,
        seed=options.seed,
        clock=clock,
        store=store,
    )
    if not left:
        return []
    named = ", ".join(map(str, left))
    layers = f"layer {named}" if len(left) == 1 else f"layers {named}"
    return [f"the recovery computed NaN or Inf while it fitted {layers}: left as cut"]


def linear_maps(adapter: ModelAdapter) -> dict[str, nn.Module]:
    """Return every linear map of the decoder layers, which healing may change, by its name in the live model.

    Those of layers that are left out are not among them.
    """
    return {
        name: module
        for name, module in adapter.model.named_modules()
        if name.startswith(f"{adapter.family.layers}.")
        and isinstance(module, nn.Linear | Conv1D)
        and adapter.family.layer_of(f"{name}.") not in adapter.left_out
    }


def kept_weights(adapter: ModelAdapter, folder: Path) -> Callable[[], None]:
    """Keep the parameters of all linear maps in a file without a name in `folder`.

    Returns
    -------
    callable
        Puts them back.

    Raises
    ------
    FbnPruneError
        The disk is full, or the folder cannot be written to.
    """
    kept = Spilled(folder)
    for parameter in _parameters(adapter):
        kept.append(parameter)

    def restore() -> None:
        for parameter, values in zip(_parameters(adapter), kept, strict=True):
            parameter.copy_(values)

    return restore


def _parameters(adapter: ModelAdapter) -> Iterator[Tensor]:
    for module in linear_maps(adapter).values():
        for _, parameter in sorted(module.named_parameters(recurse=False)):
            yield parameter.detach()


def healed_tensors(adapter: ModelAdapter, checkpoint: Checkpoint) -> dict[str, Tensor] | None:
    """Return the parameters of all linear maps by their names in the checkpoint; None if a value is not finite there.

    The live parameters are rounded to the checkpoint's dtypes, so that the measured model equals the written one.
    """
    tensors: dict[str, Tensor] = {}
    for name, module in linear_maps(adapter).items():
        weight = checkpoint.stored_name(f"{name}.weight")
        assert weight is not None
        for part, parameter in module.named_parameters(recurse=False):
            rounded = parameter.detach().to(checkpoint.dtype(weight))
            if not bool(rounded.isfinite().all()):
                return None
            with torch.no_grad():
                parameter.copy_(rounded)
            tensors[weight.removesuffix("weight") + part] = parameter.detach()
    return tensors
