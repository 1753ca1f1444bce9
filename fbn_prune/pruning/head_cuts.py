"""Cuts of layers that keep fewer attention heads, or none: the MLP makes up for what the attention lacks.

The heads that stay get a refit of their output weights. The MLP then reads a changed hidden state; its output weights
are refitted, on the activations that it has now, to give what the layer adds to the hidden state as a whole. Measured
without that, an attention block would seem more expensive than it is once the model is refitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fbn_prune import distributed
from fbn_prune.data.calibration import Batch
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.heads import HeadCut
from fbn_prune.model.layerwise import LayerwiseForward
from fbn_prune.model.spill import Spilled
from fbn_prune.model.streaming import spilled_cuts
from fbn_prune.model.surgery import CutsOnRequest, MlpCut, rounded_cut
from fbn_prune.progress import Advance
from fbn_prune.pruning.criteria import HeadEvidence, no_heads
from fbn_prune.pruning.evidence import CutOptions, head_evidence
from fbn_prune.pruning.fitting import DampingNotes, fitting_head_cut
from fbn_prune.pruning.gaps import shared_scale
from fbn_prune.pruning.layout import HeadLevels
from fbn_prune.pruning.making_up import Lacking, on_request
from fbn_prune.pruning.output_sums import OutputSums


def cuts_with_fewer_heads(
    adapter: ModelAdapter,
    batches: Sequence[Batch],
    cuts: Sequence[Sequence[MlpCut]],
    heads: HeadLevels,
    options: CutOptions,
    *,
    scratch: Path,
    advance: Advance,
) -> list[list[CutsOnRequest]]:
    """Return cuts like these for each number of head groups but the last.

    The first layer keeps all heads where it must have some.

    Parameters
    ----------
    batches
        Text to fit them to.
    cuts
        For some widths, from the narrowest to the widest, one cut for each layer.
    advance
        Called with the number of tokens after each batch of a layer, for all heads and for each smaller number.
    """
    own = distributed.share(batches)
    forward = LayerwiseForward(adapter, own)
    kept = Spilled(scratch)
    head_cuts = [spilled_cuts(scratch) for _ in heads.groups[:-1]]
    lacks: list[list[Lacking | None]] = [[] for _ in heads.groups[:-1]]
    for layer in range(adapter.num_layers):
        scale = shared_scale(forward.output_scale())
        adapter.load_layer(layer)
        sums = OutputSums(adapter.attention_output(layer).weight.detach())
        after = adapter.hidden_states()
        for index, batch in enumerate(own):
            after.append(
                forward.run(index, observe_heads=lambda _, x, to=sums: to.update(x, None))  # type: ignore[misc]
            )
            advance(batch.tokens)
        sums.add_up("attention", layer)
        adapter.load_layer(layer)
        evidence = head_evidence(adapter, layer, sums, options)
        whole = adapter.down_weight(layer).clone()
        for level, groups in enumerate(heads.groups[:-1]):
            if layer == 0 and not heads.first_layer(level):
                head_cuts[level].append(_of_heads(whole, None))
                lacks[level].append(None)
                continue
            head_cut = _head_cut(evidence, groups, layer, options.round_to)
            lacking = Lacking(kept, layer, options.refit_damping, scale, whole)
            _observe(adapter, forward, after, own, lacking, head_cut, options.round_to, advance)
            lacking.add_up(whole.shape[1], whole.device)
            head_cuts[level].append(rounded_cut(_of_heads(whole, head_cut), options.round_to))
            lacks[level].append(lacking)
        for index in range(len(own)):
            forward.hidden[index] = after[index]
        forward.next_layer += 1

    def cut(level: int, place: int, layer: int) -> MlpCut:
        base, lacking = cuts[place][layer], lacks[level][layer]
        if lacking is not None:
            base = replace(lacking.made_up(base), heads=head_cuts[level][layer].heads)
        return rounded_cut(base, options.round_to)

    return [
        [
            on_request(partial(cut, level, place), adapter.num_layers, scratch)
            for place in range(len(cuts))
        ]
        for level in range(len(lacks))
    ]


def _of_heads(whole: Tensor, heads: HeadCut | None) -> MlpCut:
    """A cut of the attention alone, to keep it with other cuts."""
    return MlpCut(torch.zeros(1, dtype=torch.int64), whole.new_zeros(len(whole), 1), heads=heads)


def _head_cut(evidence: HeadEvidence, groups: int, layer: int, stored: torch.dtype) -> HeadCut:
    if groups == 0:
        return no_heads(evidence.weight.shape[0])
    with DampingNotes().heard(layer):
        return fitting_head_cut(evidence, groups, stored=stored)


def _observe(
    adapter: ModelAdapter,
    forward: LayerwiseForward,
    after: Sequence[Tensor],
    batches: Sequence[Batch],
    lacking: Lacking,
    heads: HeadCut,
    round_to: torch.dtype,
    advance: Advance,
) -> None:
    """Add what the output of the next layer lacks if its attention is cut and its MLP is whole."""
    with adapter.trying_heads(forward.next_layer, heads, round_to):
        for index, batch in enumerate(batches):
            seen: list[Tensor] = []
            output = forward.run(index, lambda _, x, seen=seen: seen.append(x))  # type: ignore[misc]
            valid = batch.valid.to(output.device)
            lacking.update(after[index].to(output.device)[valid] - output[valid], seen[0])
            advance(batch.tokens)
