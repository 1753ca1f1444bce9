"""Cut the experts of a mixture, one layer after another: record what the router sends, then cut the layer by it."""

from __future__ import annotations

from collections.abc import Mapping, MutableSequence, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from fbn_prune.data.calibration import Batch
from fbn_prune.errors import FbnPruneError, InvalidInput, counted
from fbn_prune.model.expert_block import ExpertBlock
from fbn_prune.model.layerwise import LayerwiseForward
from fbn_prune.model.mixture_adapter import MixtureAdapter
from fbn_prune.model.routed import ExpertsCut, Routed
from fbn_prune.model.streaming import SpilledCuts
from fbn_prune.progress import Advance, StageClock
from fbn_prune.pruning.block_cutting import FEWEST_TOKENS, FinishedExperts, MixturePlan, cut_block
from fbn_prune.pruning.evidence import CutOptions
from fbn_prune.store import LAYERS, Store

Name = TypeVar("Name")

DENSE_SHARE = 0.5
"""Share of what the hidden state lacks, compared with the dense model's, that sequential mode refits for."""

_CHECKED = 32
"""Tokens on which the reading of a layer's experts is checked."""


@dataclass
class CutExperts:
    """The cuts of all layers, in the dtype of the checkpoint.

    Attributes
    ----------
    cuts
        By layer, in memory or on disk.
    errors
        By layer, what the experts' output lacks as a share of its energy; 0 where nothing was refitted.
    pooled, experts
        Number of experts with a pooled Hessian, and of all that were cut.
    """

    cuts: MutableSequence[ExpertsCut] | SpilledCuts[ExpertsCut]
    errors: list[float] = field(default_factory=list)
    pooled: int = 0
    experts: int = 0

    def add(self, finished: FinishedExperts) -> None:
        """Add the next layer's."""
        self.cuts.append(finished.cut)
        self.errors.append(finished.error)
        self.pooled += finished.pooled
        self.experts += len(finished.cut.experts)

    def lines(self) -> list[str]:
        """Return what the user should know of the cut."""
        if not self.pooled:
            return []
        return [
            f"{counted(self.pooled, 'expert')} of {self.experts} got fewer than {FEWEST_TOKENS} tokens for each "
            "neuron: half of their Hessians comes from all tokens of the layer (raise --tokens)"
        ]


def cut_experts(
    adapter: MixtureAdapter,
    batches: Sequence[Batch],
    plans: Mapping[Name, MixturePlan],
    options: CutOptions,
    *,
    clock: StageClock,
    stage: str = "prune",
    store: Store | None = None,
) -> tuple[dict[Name, CutExperts], float]:
    """Make the cuts of several plans, without changing the model.

    Every layer is fitted to the dense model's activations, in one pass for all plans. In sequential mode each plan
    takes a pass of its own, in which a layer reads what the cut layers before it compute.

    Parameters
    ----------
    store
        Keeps the finished layers of a single plan, and provides those that an earlier run finished.

    Returns
    -------
    cuts
        By the names of the plans.
    seconds
        Time of the bare forward pass.

    Raises
    ------
    InvalidInput
        A layer's experts read NaN or Inf, or compute something else than their tensors say.
    """
    total = sum(batch.tokens for batch in batches) * adapter.num_layers
    kept = _Kept(store or Store())
    if options.sequential:
        with clock.stage(stage, total * len(plans), "tokens x layers") as advance:
            passes = {
                name: _in_sequence(adapter, batches, plan, options, kept, advance)
                for name, plan in plans.items()
            }
        return {name: cut for name, (cut, _) in passes.items()}, sum(s for _, s in passes.values())
    done = {name: CutExperts(adapter.cuts_list()) for name in plans}
    with clock.stage(stage, total, "tokens x layers") as advance:
        if len(kept) == adapter.num_layers:
            for made in done.values():
                for layer in range(adapter.num_layers):
                    made.add(kept[layer])
            return done, 0.0
        forward = LayerwiseForward(adapter, batches)
        for layer, block in enumerate(adapter.blocks):
            if layer < len(kept):
                forward.advance(on_batch=advance)
                for made in done.values():
                    made.add(kept[layer])
                continue
            tokens = _recorded(forward, block, batches)
            adapter.load_layer(layer)
            _check(block, tokens, layer)
            for name, plan in plans.items():
                finished = cut_block(block, tokens, plan, options, layer=layer)
                kept.keep(layer, finished)
                done[name].add(finished)
            advance(len(tokens.hidden))
    adapter.release()
    return done, forward.forward_seconds


class _Kept:
    """The finished layers in a run's store; those that an earlier run finished are read when they are asked for."""

    def __init__(self, store: Store) -> None:
        self._store, self._count = store, 0
        while store.read(_name(self._count)) is not None:
            self._count += 1

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, layer: int) -> FinishedExperts:
        data = self._store.read(_name(layer))
        if data is None:
            raise FbnPruneError(f"{_name(layer)} was changed during the run: start the run again")
        return FinishedExperts.from_bytes(data)

    def keep(self, layer: int, finished: FinishedExperts) -> None:
        """Keep another layer."""
        self._store.write(_name(layer), lambda put: put(finished.to_bytes()))


def _name(layer: int) -> str:
    return f"{LAYERS}{layer:05d}.safetensors"


def _in_sequence(
    adapter: MixtureAdapter,
    batches: Sequence[Batch],
    plan: MixturePlan,
    options: CutOptions,
    kept: _Kept,
    advance: Advance,
) -> tuple[CutExperts, float]:
    """Return the cuts of one plan, each layer on the output of the cut ones, and the seconds of the dense pass."""
    made = CutExperts(adapter.cuts_list())
    if len(kept) == adapter.num_layers:
        for layer in range(adapter.num_layers):
            made.add(kept[layer])
        return made, 0.0
    dense, pruned = LayerwiseForward(adapter, batches), LayerwiseForward(adapter, batches)
    adapter.release()
    before = [block.saved() for block in adapter.blocks]
    try:
        for layer, block in enumerate(adapter.blocks):
            if layer < len(kept):
                dense.advance(on_batch=advance)
                finished = kept[layer]
            else:
                tokens, more = _both_recorded(dense, pruned, block, batches)
                adapter.load_layer(layer)
                _check(block, tokens, layer)
                finished = cut_block(block, tokens, plan, options, layer=layer, more=more)
                kept.keep(layer, finished)
                advance(len(tokens.hidden))
                del tokens, more
            made.add(finished)
            adapter.load_layer(layer)
            block.cut(finished.cut, round_to=options.round_to)
            pruned.advance()
    finally:
        adapter.release()
        for block, state in zip(adapter.blocks, before, strict=True):
            block.restore(state)
    return made, dense.forward_seconds


def _both_recorded(
    dense: LayerwiseForward,
    pruned: LayerwiseForward,
    block: ExpertBlock,
    batches: Sequence[Batch],
) -> tuple[Routed, Tensor | None]:
    """Return what the router of the next layer sends after the cut layers, and what the hidden state lacks after it.

    The dense stream advances; the pruned one stays before the layer.
    """
    scale = pruned.output_scale()
    parts, lacking = [], []
    for index, batch in enumerate(batches):
        dense.hidden[index] = dense.run(index)
        with block.recording() as seen:
            output = pruned.run(index)
        parts.append(_valid(seen, batch))
        if scale is not None:
            valid = batch.valid.to(output.device)
            lacks = dense.hidden[index].to(output)[valid].float() - output[valid].float()
            lacking.append(lacks * (DENSE_SHARE / scale))
    dense.next_layer += 1
    return Routed.joined(parts), torch.cat(lacking) if lacking else None


def _check(block: ExpertBlock, tokens: Routed, layer: int) -> None:
    if not bool(torch.isfinite(tokens.hidden).all()):
        raise InvalidInput(
            f"NaN or Inf among what the experts of layer {layer} read: the checkpoint is damaged, or the "
            "compute type overflows (try --dtype float32)"
        )
    some = slice(_CHECKED)
    block.check(Routed(tokens.hidden[some], tokens.index[some], tokens.gates[some]))


def _recorded(forward: LayerwiseForward, block: ExpertBlock, batches: Sequence[Batch]) -> Routed:
    """Run the next layer on all batches and return what its router sends to the experts, without padding."""
    parts = []
    for index, batch in enumerate(batches):
        with block.recording() as seen:
            forward.hidden[index] = forward.run(index)
        parts.append(_valid(seen, batch))
    forward.next_layer += 1
    return Routed.joined(parts)


def _valid(seen: Sequence[Routed], batch: Batch) -> Routed:
    """Return the one call that was recorded for a batch, without padding."""
    (one,) = seen
    valid = batch.valid.flatten().to(one.hidden.device)
    weights = batch.token_weights
    return Routed(
        one.hidden[valid],
        one.index[valid],
        one.gates[valid],
        None if weights is None else weights.to(valid.device),
    )
