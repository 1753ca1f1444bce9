"""Collect the evidence for each layer's cut: statistics of its activations on the calibration data.

One-shot mode (default): all statistics come from one pass of the dense model over the calibration tokens. Sequential
mode: a second stream runs through the layers that are already cut. A layer's statistics come from that stream, with
what its output lacks compared with the dense stream (:mod:`fbn_prune.pruning.shortfall`): the difference between the
uncut layer's outputs on the two streams, and the difference of the hidden states to which they are added.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fbn_prune import distributed
from fbn_prune.data.calibration import Batch
from fbn_prune.errors import InvalidInput
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.layerwise import LayerwiseForward, Observe
from fbn_prune.progress import Advance, StageClock
from fbn_prune.pruning.criteria import HeadEvidence, LayerEvidence
from fbn_prune.pruning.shortfall import SetAside, Shortfall
from fbn_prune.pruning.statistics import CrossStatistics, GramStatistics

ASIDE_TOKENS = 4096
"""Tokens of sequential mode to choose the shares of a :class:`Shortfall` on."""

LARGEST_PART = 8
"""At most this part of the tokens, one in eight, is set aside."""


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
                    sites = self._watched(dense, pruned, layer, advance)
                    yield self._evidence(layer, *sites, self._of_skill(skill, layer))
                if pruned is not None:
                    pruned.advance(on_batch=advance)

    def _watched(
        self,
        dense: LayerwiseForward,
        pruned: LayerwiseForward | None,
        layer: int,
        advance: Advance,
    ) -> tuple[_Statistics, _Statistics | None]:
        """Statistics of one layer's MLP, and of its attention if heads are cut.

        The dense stream moves past the layer; the pruned stream stays before it.
        """
        self._adapter.load_layer(layer)
        weights = [self._adapter.down_weight(layer)]
        if self._options.head_groups is not None:
            weights.append(self._adapter.attention_output(layer).weight.detach())
        sites: Sequence[_Statistics]
        if pruned is None:
            sites = [_Statistics(w) for w in weights]
            dense.advance(*map(self._observer, sites), on_batch=advance)
        else:
            # Only the MLP's output is added to the hidden state that the next layer reads.
            both = [_Shortfalls(w, parts) for w, parts in zip(weights, (2, 1), strict=False)]
            self._watch_both(dense, pruned, both, advance)
            sites = both
        del weights
        for site, name in zip(sites, ("MLP", "attention"), strict=False):
            site.add_up()
            if not site.own.finite:
                raise InvalidInput(
                    f"NaN or Inf among the {name} activations of layer {layer}: the checkpoint is damaged, "
                    "or the compute type overflows (try --dtype float32)"
                )
        self.forward_seconds = dense.forward_seconds
        return sites[0], sites[1] if len(sites) > 1 else None

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

    def _observer(self, site: _Statistics) -> Observe:
        return lambda index, x: site.update(x, self._weights(index, x))

    def _watch_both(
        self,
        dense: LayerwiseForward,
        pruned: LayerwiseForward,
        sites: Sequence[_Shortfalls],
        advance: Advance,
    ) -> None:
        """Add the pruned stream's activations, and what the outputs lack compared with the dense stream's."""
        scale = pruned.output_scale()
        above = [*self._left_out_after(dense.next_layer)]
        for index in range(len(dense.hidden)):
            seen: list[list[Tensor]] = [[] for _ in sites]
            watching: list[Observe] = [lambda _, x, kept=kept: kept.append(x) for kept in seen]  # type: ignore[misc]
            output = dense.run(index, *watching)
            for layer in above:
                with torch.inference_mode():
                    output = dense.through(layer, output, index)
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
        neurons: _Statistics,
        heads: _Statistics | None,
        erased: Tensor | None,
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
        head_evidence = None
        if heads is not None:
            out = adapter.attention_output(layer)
            head_evidence = HeadEvidence(
                weight=out.weight.detach().double(),
                bias=None if out.bias is None else out.bias.detach().double(),
                loss_root=None,  # loss gradients are known only at the MLPs' outputs
                group=adapter.family.head_shape(adapter.config).width,
                damping=options.damping,
                refit_damping=options.refit_damping,
                **heads.facts(),
            )
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
            heads=head_evidence,
            erased=erased,
            **neurons.facts(),
        )


class _Statistics:
    """Sums over the input of one output projection with `weight` [d, N]."""

    def __init__(self, weight: Tensor) -> None:
        self.own = GramStatistics(weight.shape[1], weight.device)

    def update(self, x: Tensor, weights: Tensor | None) -> None:
        self.own.update(x, weights)

    def add_up(self) -> None:
        """Add the sums of all processes."""
        self.own.add_up()

    def facts(self) -> dict[str, Any]:
        """Arguments for :class:`OutputEvidence`."""
        own = self.own
        return {"gram": own.gram, "mean": own.mean, "tokens": own.count, "shortfall": None}


class _Shortfalls(_Statistics):
    """The same sums in sequential mode, and those for a :class:`Shortfall`."""

    def __init__(self, weight: Tensor, parts: int) -> None:
        super().__init__(weight)
        self._weight = weight
        self._parts = [
            CrossStatistics(weight.shape[0], weight.shape[1], weight.device) for _ in range(parts)
        ]
        self._aside: list[tuple[Tensor, Tensor, Tensor]] = []

    def update_both(
        self,
        x_dense: Tensor,
        x: Tensor,
        lacking: Tensor | None,
        set_aside: Tensor | None,
        weights: Tensor | None,
    ) -> None:
        """Add a batch's tokens; `lacking` [tokens, d] is all that the output lacks, None if that is not known."""
        self.own.update(x, weights)
        own = ((x_dense - x) @ self._weight.to(x).T).float()
        more = torch.zeros_like(own) if lacking is None else lacking - own
        parts = [own, more][: len(self._parts)]
        for sums, part in zip(self._parts, parts, strict=True):
            sums.update(part, x, weights)
        if set_aside is not None:
            rows = set_aside.to(x.device)
            counts = x.new_ones(len(x), dtype=torch.float64) if weights is None else weights
            self._aside.append((x[rows].float(), torch.stack(parts)[:, rows], counts[rows]))

    def add_up(self) -> None:
        super().add_up()
        for sums in self._parts:
            sums.add_up()

    def facts(self) -> dict[str, Any]:
        cross = torch.stack([sums.cross for sums in self._parts])
        mean = torch.stack([sums.target_mean for sums in self._parts])
        return super().facts() | {"shortfall": Shortfall(cross, mean, self._joined_aside())}

    def _joined_aside(self) -> SetAside | None:
        outputs, width = self._weight.shape
        empty = self._parts[0].cross.new_zeros(0, dtype=torch.float32)
        found = self._aside or [
            (empty.view(0, width), empty.view(len(self._parts), 0, outputs), empty.double())
        ]
        x, parts, weights = (list(each) for each in zip(*found, strict=True))
        rows = distributed.joined_rows(torch.cat(x))
        lacking = distributed.joined_rows(torch.cat(parts, 1).transpose(0, 1).contiguous())
        counts = distributed.joined_rows(torch.cat(weights))
        return SetAside(rows, lacking.transpose(0, 1), counts) if len(rows) else None


def tokens_set_aside(batches: Sequence[Batch]) -> list[Tensor | None]:
    """Return for each batch which of its valid tokens are set aside, bool [tokens]; None for a batch without any.

    Whole blocks are set aside, about :data:`ASIDE_TOKENS` tokens but at most an eighth of all; of fewer than eight
    blocks, one; of a single block, none.
    """
    blocks = sum(len(batch.input_ids) for batch in batches)
    tokens = sum(batch.tokens for batch in batches)
    if blocks < 2:
        return [None for _ in batches]
    every = min(max(LARGEST_PART, tokens // ASIDE_TOKENS), blocks)
    found: list[Tensor | None] = []
    first = 0
    for batch in batches:
        chosen = torch.arange(first, first + len(batch.input_ids)) % every == every - 1
        first += len(chosen)
        rows = chosen[:, None].expand(batch.valid.shape)[batch.valid]
        found.append(rows if bool(rows.any()) else None)
    return found
