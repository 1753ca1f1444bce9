"""Tell the labels of texts from a model's functional networks, and from the controls (the `probe` command)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fbn_prune.data.calibration import TokenBlocks, tokenize_document
from fbn_prune.data.labels import LabelledTexts, read_labels
from fbn_prune.errors import InvalidInput, counted
from fbn_prune.networks.activity import time_courses
from fbn_prune.networks.controls import DRAWS, NETWORKS, control_bases, set_means
from fbn_prune.networks.probe import COUNTS, Floats, Pooling, Probed, pooled, probe_all
from fbn_prune.progress import StageClock
from fbn_prune.recipe import Recipe
from fbn_prune.runs.study import Studied, open_study, with_networks

BASIS_TOKENS = 8192
"""Calibration tokens on which the controls' bases are found."""

NEURONS, SETS = "single neurons", "random sets of neurons"


@dataclass(frozen=True)
class ProbeResult:
    """How well networks and controls tell labels; `--json` prints it as :meth:`to_json` returns it.

    Attributes
    ----------
    texts
        Number of texts of each label.
    probed
        For each description of the texts, the result for each split into halves.
    about
        For each network that was chosen, its driving tokens.
    """

    model: str
    labels: str
    texts: dict[str, int]
    networks: int
    probed: dict[str, list[dict[int, Probed]]]
    about: dict[int, list[str]]

    def to_json(self) -> dict[str, Any]:
        """Return all figures as JSON values."""
        return {
            "model": self.model,
            "labels": self.labels,
            "texts": self.texts,
            "chance": 1 / len(self.texts),
            "networks": self.networks,
            "splits": len(self.probed[NETWORKS]),
            "descriptions": {
                name: {
                    str(count): _spread([split[count].accuracy for split in splits])
                    for count in COUNTS
                }
                for name, splits in self.probed.items()
            },
            "chosen": [
                {"network": network, "splits": splits, "tokens": self.about[network]}
                for network, splits in self.chosen()
            ],
        }

    def chosen(self) -> list[tuple[int, int]]:
        """Return the networks that the probe chose, and in how many splits, the most frequent first."""
        counts: dict[int, int] = {}
        for split in self.probed[NETWORKS]:
            for network in split[max(COUNTS)].features:
                counts[network] = counts.get(network, 0) + 1
        return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def run_probe(
    recipe: Recipe, labels: Path, clock: StageClock, *, splits: int = DRAWS
) -> ProbeResult:
    """Run a probe; see :func:`fbn_prune.api.probe`."""
    if splits < 1:
        raise InvalidInput(f"splits = {splits}: at least one is needed")
    given = read_labels(labels)
    run = open_study(recipe, clock)
    blocks, kept = text_blocks(given, run.tokenizer, run.prepared.context)
    if dropped := len(given.texts) - len(kept):
        clock.note(f"{counted(dropped, 'text')} of {labels} left out: too short for the model")
    numbers = np.array([given.labels[i] for i in kept])
    if np.bincount(numbers, minlength=len(given.names)).min() < 2:
        raise InvalidInput(f"labels {labels}: almost all texts of a label are too short to be used")
    on = with_networks(run)
    bases = bases_of(on, recipe.seed, clock)
    found = describe(on, blocks, bases, seed=recipe.seed, clock=clock)
    with clock.stage("probe"):
        probed = probe_all(found, numbers, range(recipe.seed, recipe.seed + splits))
    names = {name: int((numbers == i).sum()) for i, name in enumerate(given.names)}
    chosen = {n for split in probed[NETWORKS] for n in split[max(COUNTS)].features}
    return ProbeResult(
        recipe.model,
        str(labels),
        names,
        len(on.networks.maps),
        probed,
        {network: _tokens(on, network) for network in chosen},
    )


def bases_of(on: Studied, seed: int, clock: StageClock) -> dict[str, list[Tensor]]:
    """Return the bases of the networks and of their controls, from the time courses on calibration text."""
    sample = on.data.calibrating.subset(BASIS_TOKENS).batches(on.prepared.batch_tokens)
    calibration = torch.cat(time_courses(on.adapter, on.networks, sample, clock))
    return control_bases(calibration, seed=seed)


def describe(
    on: Studied,
    blocks: TokenBlocks,
    bases: dict[str, list[Tensor]],
    *,
    seed: int,
    clock: StageClock,
    pooling: Pooling = "rms",
) -> dict[str, list[Floats]]:
    """Return the features of every block, [blocks, features], by networks and by each control.

    A control that is drawn at random has one array for each draw.

    Parameters
    ----------
    bases
        Those of :func:`bases_of`.
    seed
        Seed of the random sets of neurons.
    pooling
        How the tokens of a block become one value, see :func:`fbn_prune.networks.probe.pooled`.
    """
    batch_tokens, networks = on.prepared.batch_tokens, on.networks
    batches = blocks.batches(batch_tokens)
    lengths = [batch.valid.sum(1).tolist() for batch in batches]
    of_neurons: list[list[Tensor]] = [[] for _ in networks.widths]

    def watch(layer: int, index: int, z: Tensor) -> None:
        of_neurons[layer].append(pooled(z, lengths[index], pooling).cpu())

    courses = torch.cat(time_courses(on.adapter, networks, batches, clock, watch))
    places = torch.argsort(torch.tensor(blocks.batch_order()))
    every = [length for batch in lengths for length in batch]
    found: dict[str, list[Floats]] = {
        name: [pooled(courses @ basis, every, pooling)[places].numpy() for basis in drawn]
        for name, drawn in bases.items()
    }
    neurons = torch.cat([torch.cat(parts) for parts in of_neurons], dim=1)[places]
    found[NEURONS] = [neurons.numpy()]
    sizes = [int(networks.hubs(network).sum()) or 1 for network in range(len(networks.maps))]
    found[SETS] = [set_means(neurons, sizes, seed + draw).numpy() for draw in range(DRAWS)]
    return found


def text_blocks(
    given: LabelledTexts, tokenizer: Any, context: int
) -> tuple[TokenBlocks, Sequence[int]]:
    """Return the first tokens of every text, one block each, and the indices of the texts that have a block."""
    cut = [tokenize_document(tokenizer, text, context)[:1] for text in given.texts]
    kept = [index for index, found in enumerate(cut) if found]
    if not kept:
        raise InvalidInput("the texts have too few tokens for the model: give longer ones")
    return TokenBlocks(tuple(cut[index][0] for index in kept), context, ("labels",)), kept


def _tokens(on: Studied, network: int) -> list[str]:
    driving = on.networks.header.get("driving_tokens")
    if not isinstance(driving, list) or network >= len(driving):
        return []
    return [str(entry["token"]) for entry in driving[network]]


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else 0.0,
    }
