"""Collect the evidence for each layer's cut: statistics of its activations on the calibration data.

One-shot mode (default): all statistics come from one pass of the dense model over the calibration tokens. Sequential
mode: a second stream runs through the layers that are already cut. A layer's statistics come from that stream, and
the refit's target is the mean of the uncut layer's outputs on the two streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from fbn_prune.pruning.statistics import CrossStatistics, GramStatistics


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
    done
        Number of leading layers that an earlier run has cut; they yield no evidence.
    again
        Repeats the cut of such a layer, once the dense stream has passed it.

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
        clock: StageClock,
        stage: str = "prune",
        done: int = 0,
        again: Callable[[int], None] = lambda layer: None,
    ) -> None:
        self._adapter = adapter
        self._batches: Sequence[Batch] = batches
        self._own_batches: Sequence[Batch] = batches
        self._options, self._clock = options, clock
        self._loss_roots, self._stage = loss_roots, stage
        self._done, self._again = done, again
        self.forward_seconds = 0.0

    def __iter__(self) -> Iterator[LayerEvidence]:
        adapter = self._adapter
        if self._done == adapter.num_layers:
            for layer in range(self._done):
                self._again(layer)
            return
        self._own_batches = distributed.share(self._batches)
        dense = LayerwiseForward(adapter, self._own_batches)
        pruned = None
        if self._options.sequential:
            pruned = LayerwiseForward(adapter, self._own_batches)
        layers = adapter.num_layers
        passes = 1 if pruned is None else 3
        total = sum(batch.tokens for batch in self._own_batches) * layers * passes
        with self._clock.stage(self._stage, total, "tokens x layers") as advance:
            for layer in range(layers):
                if layer < self._done:
                    dense.advance(on_batch=advance)
                    self._again(layer)
                else:
                    yield self._evidence(layer, *self._watched(dense, pruned, layer, advance))
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
            weights.append(self._adapter.attention_output(layer).weight)
        sites = [_Statistics(w.shape[1], w.device, both=pruned is not None) for w in weights]
        del weights
        if pruned is None:
            dense.advance(*map(self._observer, sites), on_batch=advance)
        else:
            self._watch_both(dense, pruned, sites, advance)
        for site, name in zip(sites, ("MLP", "attention"), strict=False):
            site.add_up()
            if not site.own.finite:
                raise InvalidInput(
                    f"NaN or Inf among the {name} activations of layer {layer}: the checkpoint is damaged, "
                    "or the compute type overflows (try --dtype float32)"
                )
        self.forward_seconds = dense.forward_seconds
        return sites[0], sites[1] if len(sites) > 1 else None

    def _weights(self, index: int, x: Tensor) -> Tensor | None:
        weights = self._own_batches[index].token_weights
        return None if weights is None else weights.to(x.device)

    def _observer(self, site: _Statistics) -> Observe:
        return lambda index, x: site.update(x, self._weights(index, x))

    def _watch_both(
        self,
        dense: LayerwiseForward,
        pruned: LayerwiseForward,
        sites: Sequence[_Statistics],
        advance: Advance,
    ) -> None:
        """Add the pruned stream's activations, with the mean of both streams' activations as the target."""
        for index in range(len(dense.hidden)):
            seen: list[list[Tensor]] = [[] for _ in sites]
            watching: list[Observe] = [lambda _, x, kept=kept: kept.append(x) for kept in seen]  # type: ignore[misc]
            output = dense.run(index, *watching)
            pruned.run(index, *watching)
            dense.hidden[index] = output
            tokens = len(seen[0][0])
            for site, (x_dense, x_pruned) in zip(sites, seen, strict=True):
                site.update_both(x_dense, x_pruned, self._weights(index, x_pruned))
            advance(2 * tokens)
        dense.next_layer += 1

    def _evidence(
        self, layer: int, neurons: _Statistics, heads: _Statistics | None
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
            **neurons.facts(),
        )


class _Statistics:
    """Sums over the input of one output projection; with `both`, also over the mean of both streams' inputs."""

    def __init__(self, width: int, device: torch.device, *, both: bool) -> None:
        self.own = GramStatistics(width, device)
        self._cross = CrossStatistics(width, device) if both else None

    def update(self, x: Tensor, weights: Tensor | None) -> None:
        self.own.update(x, weights)

    def update_both(self, x_dense: Tensor, x_pruned: Tensor, weights: Tensor | None) -> None:
        assert self._cross is not None
        self.own.update(x_pruned, weights)
        self._cross.update((x_dense + x_pruned) / 2, x_pruned, weights)

    def add_up(self) -> None:
        """Add the sums of all processes."""
        self.own.add_up()
        if self._cross is not None:
            self._cross.add_up()

    def facts(self) -> dict[str, Any]:
        """Arguments for :class:`OutputEvidence`."""
        return {
            "gram": self.own.gram,
            "mean": self.own.mean,
            "tokens": self.own.count,
            "cross": None if self._cross is None else self._cross.cross,
            "target_mean": None if self._cross is None else self._cross.target_mean,
        }
