"""Find a model's functional networks: sampled activations -> spatial ICA -> the artifact.

One ICA over the neurons of all layers together (`scope` global, arXiv 2502.20408), or one for each layer
(arXiv 2508.05239). Activations are sampled from whole blocks, streamed layer by layer; they stay in memory between
the two passes of the solver when they fit, and are computed again when they do not.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fbn_prune.calibration import Batch, TokenBlocks
from fbn_prune.errors import InvalidInput
from fbn_prune.layerwise import LayerwiseForward
from fbn_prune.model.families import Family
from fbn_prune.networks import ica
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.progress import StageClock

LEAST_BLOCKS = 32
"""Networks are found on tokens of at least this many blocks, where there are: tokens of one context are alike."""

CONTEXTS_PER_NETWORK = 5
CONTEXT_REACH = 8
"""Tokens shown before and after a network's top token."""


@dataclass(frozen=True)
class DiscoveryOptions:
    """See the recipe keys of the same names; `recurrence` adds three more decompositions to compare with."""

    networks: int
    network_tokens: int
    scope: str
    seed: int
    recurrence: bool = False


class SampledActivations:
    """Standardised activations Z [tokens, neurons] of one layer after another, for a fixed sample of tokens.

    Iterating yields layer by layer; the first pass also fills `mean` and `std` (lists of [neurons], float32).

    Parameters
    ----------
    tokens
        Size of the sample; evenly spaced over the blocks, which are the first of `blocks` that give enough.
    keep_bytes
        Activations are kept in memory between passes if all layers' together are at most this large.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        family: Family,
        blocks: TokenBlocks,
        tokens: int,
        *,
        batch_tokens: int,
        keep_bytes: int,
        clock: StageClock,
    ) -> None:
        self._model, self._family, self._clock = model, family, clock
        self._batches: list[Batch] = _sampled_blocks(blocks, tokens).batches(batch_tokens)
        available = sum(batch.tokens for batch in self._batches)
        self.tokens = min(tokens, available)
        self._positions = _positions(self._batches, self.tokens)
        self.layers = family.num_layers(model.config)
        self.width = family.width(model.config)
        self._keep = 4 * self.tokens * self.layers * self.width <= keep_bytes
        self._kept: list[Tensor] = []
        self.mean: list[Tensor] = []
        self.std: list[Tensor] = []
        self.forward_seconds = 0.0

    def __iter__(self) -> Iterator[Tensor]:
        if len(self._kept) == self.layers:
            yield from self._kept
            return
        first = not self.mean
        stream = LayerwiseForward(self._model, self._family, self._batches)
        total = sum(batch.tokens for batch in self._batches)
        with self._clock.stage("activations", total * self.layers, "tokens x layers") as advance:
            for layer in range(self.layers):
                z, mean, std = self._layer(stream, layer, advance)
                if first:
                    self.mean.append(mean.cpu())
                    self.std.append(std.cpu())
                if self._keep:
                    self._kept.append(z)
                yield z
        self.forward_seconds += stream.forward_seconds

    def _layer(
        self, stream: LayerwiseForward, layer: int, advance: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows: list[Tensor] = []
        stream.advance(
            lambda index, x: rows.append(x[self._positions[index].to(x.device)].float()),
            on_batch=advance,
        )
        x = torch.cat(rows)
        if not bool(torch.isfinite(x.sum())):
            raise InvalidInput(
                f"NaN or Inf among the MLP activations of layer {layer}: the checkpoint is "
                "damaged, or the compute type overflows (try --dtype float32)"
            )
        return ica.standardise(x)

    def contexts(self, sample: int) -> tuple[list[int], int]:
        """Token ids around one sampled token, and the token's place among them."""
        for batch, positions in zip(self._batches, self._positions, strict=True):
            if sample < len(positions):
                flat = int(torch.nonzero(batch.valid.flatten())[positions[sample]])
                row, column = divmod(flat, batch.input_ids.shape[1])
                ids = batch.input_ids[row][batch.valid[row]].tolist()
                start = max(0, column - CONTEXT_REACH)
                return ids[start : column + CONTEXT_REACH + 1], column - start
            sample -= len(positions)
        raise IndexError(sample)


def discover(
    model: PreTrainedModel,
    family: Family,
    blocks: TokenBlocks,
    options: DiscoveryOptions,
    *,
    tokenizer: Any,
    batch_tokens: int,
    keep_bytes: int,
    header: dict[str, Any],
    clock: StageClock,
) -> tuple[FunctionalNetworks, float]:
    """Find the networks of `model` on `blocks`.

    Parameters
    ----------
    header
        Facts about the run to store with the networks (model, fingerprints, versions).

    Returns
    -------
    The artifact, and the seconds that the model's own forward passes took.

    Raises
    ------
    InvalidInput
        More networks than the tokens allow, or activations that are NaN or Inf (the layer is named).
    """
    activations = SampledActivations(
        model,
        family,
        blocks,
        options.network_tokens,
        batch_tokens=batch_tokens,
        keep_bytes=keep_bytes,
        clock=clock,
    )
    if options.networks > activations.tokens - 1:
        raise InvalidInput(
            f"networks = {options.networks}: the calibration text gives {activations.tokens} tokens "
            f"to find them on, which allow {activations.tokens - 1} at most"
        )
    for _ in activations:  # so that the passes of the model are a stage apart from the solver's
        pass
    with clock.stage("ica", 4 if options.recurrence else 1, "decompositions") as advance:
        found = _decompose(activations, slice(None), options, options.seed, clock)
        advance(1)
        recurrence = _recurrence(activations, found, options, clock, advance)
    widths = [activations.width] * activations.layers
    full_header = {
        **header,
        "scope": options.scope,
        "seed": options.seed,
        "tokens": activations.tokens,
        "convergence": found.facts,
        "contexts": _top_contexts(found.time_courses, activations, tokenizer),
    }
    if recurrence is not None:
        full_header["recurrence"] = recurrence
    networks = FunctionalNetworks(
        maps=found.maps.cpu(),
        widths=widths,
        mean=torch.cat(activations.mean),
        std=torch.cat(activations.std),
        explained_variance=found.explained_variance.cpu(),
        engagement=found.time_courses.double().square().mean(0).cpu(),
        header=full_header,
    )
    return networks, activations.forward_seconds


@dataclass(frozen=True)
class _Decomposition:
    maps: Tensor
    time_courses: Tensor
    explained_variance: Tensor
    facts: list[dict[str, Any]]


def _decompose(
    activations: SampledActivations,
    tokens: slice,
    options: DiscoveryOptions,
    seed: int,
    clock: StageClock,
) -> _Decomposition:
    """Networks of some of the sampled tokens, global or layer by layer."""
    if options.scope == "global":
        return _join(
            [_solve(lambda: (z[tokens] for z in activations), options.networks, seed, clock)],
            [(0, activations.layers * activations.width)],
            activations.layers * activations.width,
        )
    results = []
    for z in activations:
        part = z[tokens]
        results.append(_solve(lambda part=part: iter([part]), options.networks, seed, clock))  # type: ignore[misc]
    spans = [(i * activations.width, (i + 1) * activations.width) for i in range(len(results))]
    return _join(results, spans, activations.layers * activations.width)


def _solve(layers: ica.Layers, networks: int, seed: int, clock: StageClock) -> ica.IcaResult:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ica.IcaConvergenceWarning)
        result = ica.spatial_ica(layers, networks, seed=seed)
    for warning in caught:
        clock.note(f"warning: {warning.message}")
    return result


def _join(
    results: list[ica.IcaResult], spans: list[tuple[int, int]], neurons: int
) -> _Decomposition:
    """Maps over all layers: a layer-wise map is zero outside its layer."""
    maps, facts = [], []
    for result, (start, stop) in zip(results, spans, strict=True):
        full = torch.zeros(len(result.maps), neurons)
        full[:, start:stop] = result.maps.cpu()
        maps.append(full)
        facts.append(
            {
                "converged": result.converged,
                "eigen_iterations": result.eigen_iterations,
                "eigen_residual": result.eigen_residual,
                "ica_iterations": result.ica_iterations,
                "ica_change": result.ica_change,
            }
        )
    return _Decomposition(
        torch.cat(maps),
        torch.cat([result.time_courses.cpu() for result in results], dim=1),
        torch.cat([result.explained_variance.cpu() for result in results]),
        facts,
    )


def _recurrence(
    activations: SampledActivations,
    found: _Decomposition,
    options: DiscoveryOptions,
    clock: StageClock,
    advance: Any,
) -> dict[str, list[float]] | None:
    """For each network: member overlap (IoU) between two halves of the tokens, and overlap and correlation between
    two seeds."""
    if not options.recurrence or options.networks > activations.tokens // 2 - 1:
        return None
    middle = activations.tokens // 2
    halves = []
    for tokens in (slice(0, middle), slice(middle, None)):
        halves.append(_decompose(activations, tokens, options, options.seed, clock))
        advance(1)
    again = _decompose(activations, slice(None), options, options.seed + 1, clock)
    advance(1)
    in_halves = [
        torch.as_tensor(ica.spatial_overlap(found.maps, half.maps, threshold=2.0))
        for half in halves
    ]
    return {
        "iou_halves": torch.minimum(*in_halves).tolist(),
        "iou_seeds": torch.as_tensor(
            ica.spatial_overlap(found.maps, again.maps, threshold=2.0)
        ).tolist(),
        "correlation_seeds": ica.matched_correlation(found.maps, again.maps).tolist(),
    }


def _top_contexts(
    time_courses: Tensor, activations: SampledActivations, tokenizer: Any
) -> list[list[dict[str, Any]]]:
    """For each network the tokens where its time course is strongest, with the text around them."""
    contexts: list[list[dict[str, Any]]] = []
    count = min(CONTEXTS_PER_NETWORK, activations.tokens)
    for course in time_courses.T:
        cards = []
        for sample in torch.topk(course.abs(), count).indices.tolist():
            ids, place = activations.contexts(sample)
            cards.append(
                {
                    "before": tokenizer.decode(ids[:place]),
                    "token": tokenizer.decode(ids[place : place + 1]),
                    "after": tokenizer.decode(ids[place + 1 :]),
                    "activity": float(course[sample]),
                }
            )
        contexts.append(cards)
    return contexts


def _sampled_blocks(blocks: TokenBlocks, tokens: int) -> TokenBlocks:
    enough = max(tokens, sum(len(block) for block in blocks.blocks[:LEAST_BLOCKS]))
    return blocks.subset(enough)


def _positions(batches: list[Batch], tokens: int) -> list[Tensor]:
    """For each batch the indices, among its valid tokens, of an even sample of `tokens` over all batches."""
    total = sum(batch.tokens for batch in batches)
    wanted = torch.arange(tokens) * total // tokens
    positions, start = [], 0
    for batch in batches:
        inside = (wanted >= start) & (wanted < start + batch.tokens)
        positions.append(wanted[inside] - start)
        start += batch.tokens
    return positions
