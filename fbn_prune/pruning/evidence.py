"""Collect the evidence for each layer's cut: statistics of its activations on the calibration data.

One-shot mode (default): all statistics come from one pass of the dense model over the calibration tokens. Sequential
mode: a second stream runs through the layers that are already cut. A layer's statistics come from that stream, with
what its output lacks compared with the dense stream (:mod:`fbn_prune.pruning.shortfall`): the difference between the
uncut layer's outputs on the two streams, and the difference of the hidden states to which they are added.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from fbn_prune import distributed
from fbn_prune.data.calibration import Batch
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.layerwise import LayerwiseForward, Observe
from fbn_prune.progress import Advance, StageClock
from fbn_prune.pruning.criteria import FinishedHeads, HeadEvidence, LayerEvidence, no_heads
from fbn_prune.pruning.fitting import DampingNotes, fitting_head_cut
from fbn_prune.pruning.output_sums import OutputSums, SumsOfBoth, tokens_set_aside
from fbn_prune.pruning.prediction import relative_head_error
from fbn_prune.pruning.statistics import GramStatistics


@dataclass(frozen=True)
class CutOptions:
    """Settings of the cuts, apart from the data; the recipe keys of the same names explain them.

    Attributes
    ----------
    round_to
        The dtype of the written checkpoint. The live model's weights are rounded to it, so that its measured quality
        is that of the written checkpoint.
    head_groups
        Groups of attention heads that each layer keeps; None leaves the attention unchanged.
    """

    sequential: bool
    damping: float
    refit_damping: float
    seed: int
    round_to: torch.dtype

    loss_aware: bool = False

    head_groups: int | None = None


class EvidencePass:
    """One pass over the calibration data; iteration yields each layer's :class:`LayerEvidence` in order.

    In sequential mode, the caller must cut each layer before it requests the next evidence. In one-shot mode, the
    model may stay unchanged, so one pass can serve any number of criteria and widths.

    Parameters
    ----------
    loss_roots
        R [hidden, hidden] for each layer, copied to the evidence; None to count all errors alike.
    skill
        Text of a skill to erase; not in sequential mode.
    done
        Number of leading layers that an earlier run has cut; they yield no evidence.
    again
        Repeats the cut of such a layer, once the dense stream has passed it.
    left_out
        Layers that the cut model does not have; they yield no evidence. The layer before such a layer is fitted to
        what the hidden state lacks after it. Needs sequential mode.
    passed
        Called with each of them, once the dense stream has passed it.
    head_groups
        For each layer, the groups of attention heads that it keeps; None if all. The evidence is that of a layer whose
        attention is cut already, so that the MLP can make up for it. Needs sequential mode.

    Attributes
    ----------
    forward_seconds
        Time that the dense model's forward pass has taken so far.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        batches: Sequence[Batch],
        options: CutOptions,
        *,
        loss_roots: Sequence[Tensor] | None = None,
        skill: Sequence[Batch] = (),
        clock: StageClock,
        stage: str = "prune",
        done: int = 0,
        again: Callable[[int], None] = lambda layer: None,
        left_out: Collection[int] = (),
        passed: Callable[[int], None] = lambda layer: None,
        head_groups: Sequence[int] | None = None,
    ) -> None:
        self._adapter = adapter
        self._batches: Sequence[Batch] = batches
        self._own_batches: Sequence[Batch] = batches
        self._set_aside: Sequence[Tensor | None] = []
        self._options, self._clock = options, clock
        self._loss_roots, self._stage = loss_roots, stage
        self._skill = skill
        self._done, self._again = done, again
        self._left_out, self._passed = left_out, passed
        self._head_groups = head_groups
        self.forward_seconds = 0.0

    def __iter__(self) -> Iterator[LayerEvidence]:
        adapter = self._adapter
        if self._done == adapter.num_layers:
            for layer in range(self._done):
                self._again(layer)
            return
        self._own_batches = distributed.share(self._batches)
        self._set_aside = distributed.share(tokens_set_aside(self._batches))
        dense = LayerwiseForward(adapter, self._own_batches)
        pruned = skill = None
        if self._skill:
            assert not self._options.sequential
            skill = LayerwiseForward(adapter, distributed.share(self._skill))
        if self._options.sequential:
            pruned = LayerwiseForward(adapter, self._own_batches)
        layers = adapter.num_layers
        passes = 1 if pruned is None else 3
        total = sum(batch.tokens for batch in self._own_batches) * layers * passes
        with self._clock.stage(self._stage, total, "tokens x layers") as advance:
            for layer in range(layers):
                if layer < self._done or layer in self._left_out:
                    if dense.next_layer <= layer:
                        dense.advance(on_batch=advance)
                    if skill is not None:
                        skill.advance()
                    (self._again if layer < self._done else self._passed)(layer)
                else:
                    cut_heads = self._cut_heads(dense, pruned, layer, advance)
                    sites = self._watched(dense, pruned, layer, cut_heads, advance)
                    erased = self._of_skill(skill, layer)
                    yield self._evidence(layer, *sites, erased, cut_heads)
                if pruned is not None:
                    pruned.advance(on_batch=advance)

    def _watched(
        self,
        dense: LayerwiseForward,
        pruned: LayerwiseForward | None,
        layer: int,
        cut_heads: FinishedHeads | None,
        advance: Advance,
    ) -> tuple[OutputSums, OutputSums | None]:
        """Statistics of one layer's MLP, and of its attention if that is cut at the same time.

        The dense stream moves past the layer; the pruned stream stays before it.
        """
        self._adapter.load_layer(layer)
        weights = [self._adapter.down_weight(layer)]
        if self._options.head_groups is not None:
            weights.append(self._adapter.attention_output(layer).weight.detach())
        sites: Sequence[OutputSums]
        if pruned is None:
            sites = [OutputSums(w) for w in weights]
            dense.advance(*map(self._observer, sites), on_batch=advance)
        else:
            # Only the MLP's output is added to the hidden state that the next layer reads.
            both = [SumsOfBoth(w, parts) for w, parts in zip(weights, (2, 1), strict=False)]
            self._watch_both(dense, pruned, both, self._trying(layer, cut_heads), advance)
            sites = both
        del weights
        for site, name in zip(sites, ("MLP", "attention"), strict=False):
            site.add_up(name, layer)
        self.forward_seconds = dense.forward_seconds
        return sites[0], sites[1] if len(sites) > 1 else None

    def _cut_heads(
        self,
        dense: LayerwiseForward,
        pruned: LayerwiseForward | None,
        layer: int,
        advance: Advance,
    ) -> FinishedHeads | None:
        """The cut of a layer's attention that comes before that of its MLP; None if the attention stays as it is."""
        adapter, options = self._adapter, self._options
        if self._head_groups is None or pruned is None:
            return None
        groups = self._head_groups[layer]
        if groups == adapter.family.head_shape(adapter.config).groups:
            return None
        if groups == 0:
            return FinishedHeads(no_heads(adapter.hidden_size), 1.0)
        adapter.load_layer(layer)
        site = SumsOfBoth(adapter.attention_output(layer).weight.detach(), 1)
        for index in range(len(dense.hidden)):
            seen: list[Tensor] = []
            for stream in (dense, pruned):
                stream.run(index, observe_heads=lambda _, x, seen=seen: seen.append(x))  # type: ignore[misc]
            weights = self._weights(index, seen[1])
            site.update_both(seen[0], seen[1], None, self._set_aside[index], weights)
            advance(2 * len(seen[0]))
        site.add_up("attention", layer)
        evidence = head_evidence(adapter, layer, site, options)
        notes = DampingNotes()
        with notes.heard(layer, "attention: "):
            cut = fitting_head_cut(evidence, groups, stored=options.round_to)
        return FinishedHeads(cut, relative_head_error(evidence, cut), notes.of(layer))

    def _trying(
        self, layer: int, cut: FinishedHeads | None
    ) -> Callable[[], AbstractContextManager[None]]:
        """A function that returns a context in which the layer has this cut of its attention."""
        if cut is None:
            return nullcontext
        adapter, round_to = self._adapter, self._options.round_to
        return lambda: adapter.trying_heads(layer, cut.cut, round_to)

    def _of_skill(self, stream: LayerwiseForward | None, layer: int) -> Tensor | None:
        """E[xᵀx] of the skill's text, whose stream moves past the layer."""
        if stream is None:
            return None
        sums = GramStatistics(self._adapter.widths[layer], self._adapter.layer_device(layer))
        stream.advance(lambda index, x: sums.update(x))
        sums.add_up()
        return sums.gram

    def _weights(self, index: int, x: Tensor) -> Tensor | None:
        weights = self._own_batches[index].token_weights
        return None if weights is None else weights.to(x.device)

    def _observer(self, site: OutputSums) -> Observe:
        return lambda index, x: site.update(x, self._weights(index, x))

    def _watch_both(
        self,
        dense: LayerwiseForward,
        pruned: LayerwiseForward,
        sites: Sequence[SumsOfBoth],
        trying: Callable[[], AbstractContextManager[None]],
        advance: Advance,
    ) -> None:
        """Add the pruned stream's activations, and what the outputs lack compared with the dense stream's.

        The pruned stream runs in the context that `trying` makes.
        """
        scale = pruned.output_scale()
        above = [*self._left_out_after(dense.next_layer)]
        for index in range(len(dense.hidden)):
            seen: list[list[Tensor]] = [[] for _ in sites]
            watching: list[Observe] = [lambda _, x, kept=kept: kept.append(x) for kept in seen]  # type: ignore[misc]
            output = dense.run(index, *watching)
            for layer in above:
                with torch.inference_mode():
                    output = dense.through(layer, output, index)
            with trying():
                changed = pruned.run(index, *watching)
            valid = self._own_batches[index].valid.to(output.device)
            lacking: list[Tensor | None] = [None for _ in sites]
            if scale is not None:
                lacking[0] = (output[valid].float() - changed[valid].float()) / scale
            dense.hidden[index] = output
            del output, changed
            tokens = len(seen[0][0])
            for site, (x_dense, x_pruned), more in zip(sites, seen, lacking, strict=True):
                weights = self._weights(index, x_pruned)
                site.update_both(x_dense, x_pruned, more, self._set_aside[index], weights)
            advance(2 * tokens)
        dense.next_layer += 1 + len(above)

    def _left_out_after(self, layer: int) -> Iterator[int]:
        """The layers right above this one that are left out."""
        while (layer := layer + 1) in self._left_out:
            yield layer

    def _evidence(
        self,
        layer: int,
        neurons: OutputSums,
        heads: OutputSums | None,
        erased: Tensor | None,
        cut_heads: FinishedHeads | None,
    ) -> LayerEvidence:
        adapter, options = self._adapter, self._options
        adapter.load_layer(layer)
        weight = adapter.down_weight(layer).double()
        bias = adapter.down_bias(layer)
        loss_root = None
        if self._loss_roots is not None:
            loss_root = self._loss_roots[layer].to(weight.device)
        input_norms = sum(
            (
                torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()
                for rows in adapter.input_weights(layer)
            ),
            start=weight.new_zeros(weight.shape[1]),
        )
        of_heads = None if heads is None else head_evidence(adapter, layer, heads, options)
        adapter.release()  # the evidence contains all that the cut needs
        return LayerEvidence(
            layer=layer,
            weight=weight,
            bias=None if bias is None else bias.double(),
            input_norms=input_norms,
            loss_root=loss_root,
            can_have_bias=adapter.family.accepts_bias(adapter.config),
            damping=options.damping,
            refit_damping=options.refit_damping,
            seed=options.seed,
            heads=of_heads,
            erased=erased,
            head_cut=cut_heads,
            **neurons.facts(),
        )


def head_evidence(
    adapter: ModelAdapter, layer: int, heads: OutputSums, options: CutOptions
) -> HeadEvidence:
    """Return the evidence for a layer's attention, whose weights are loaded."""
    out = adapter.attention_output(layer)
    return HeadEvidence(
        weight=out.weight.detach().double(),
        bias=None if out.bias is None else out.bias.detach().double(),
        loss_root=None,  # loss gradients are known only at the MLPs' outputs
        group=adapter.family.head_shape(adapter.config).width,
        damping=options.damping,
        refit_damping=options.refit_damping,
        **heads.facts(),
    )
