"""Print how well networks tell labels, by how the activations are standardised and pooled, beside the controls.

    python eval/quality/label_sets.py LABELS
    python eval/quality/probe_table.py LABELS --model builtin

Every file of LABELS is one label set. Each figure is the balanced accuracy of a logistic regression on k features that
were chosen on one half of the texts and judged on the other, averaged over label sets and splits; below it, the
spread over splits. `raw` finds networks in activations that are centred and not standardised.
"""

from __future__ import annotations

import itertools
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import protocol
import torch
import typer
from rich.console import Console
from rich.table import Table

from fbn_prune.data.labels import read_labels
from fbn_prune.model.layerwise import LayerwiseForward
from fbn_prune.networks import ica
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.networks.probe import COUNTS, Pooling, probe_all
from fbn_prune.progress import StageClock
from fbn_prune.recipe import build_recipe
from fbn_prune.runs.opening import OpenRun
from fbn_prune.runs.probe import bases_of, describe, text_blocks
from fbn_prune.runs.study import Studied, open_study, with_networks

POOLINGS: tuple[Pooling, ...] = ("rms", "mean")


def raw_networks(on: Studied, tokens: int) -> FunctionalNetworks:
    """Return as many networks, found in activations that are centred but not standardised."""
    sample = on.data.calibrating.subset(tokens).batches(on.prepared.batch_tokens)
    stream = LayerwiseForward(on.adapter, sample)
    layers: list[torch.Tensor] = []
    for _ in on.networks.widths:
        rows: list[torch.Tensor] = []
        stream.advance(lambda index, x, rows=rows: rows.append(x.float().cpu()))  # type: ignore[misc]
        layers.append(torch.cat(rows)[:tokens])
    means = [layer.mean(0) for layer in layers]
    centred = [layer - mean for layer, mean in zip(layers, means, strict=True)]
    found = ica.spatial_ica(lambda: centred, len(on.networks.maps), seed=0)
    return replace(
        on.networks,
        maps=found.maps,
        mean=torch.cat(means),
        std=torch.ones(found.maps.shape[1]),
        engagement=found.time_courses.double().square().mean(0),
    )


def measure(
    on: Studied, files: list[Path], splits: int, pooling: Pooling, sizes: list[int | None]
) -> dict[int | None, dict[str, Any]]:
    """Return texts of a label to train on -> description -> k -> label set -> accuracies over splits."""
    found: dict[int | None, dict[str, Any]] = {size: {} for size in sizes}
    bases = bases_of(on, 0, StageClock())
    for file in files:
        given = read_labels(file)
        blocks, kept = text_blocks(given, on.tokenizer, on.prepared.context)
        labels = np.array([given.labels[i] for i in kept])
        features = describe(on, blocks, bases, seed=0, clock=StageClock(), pooling=pooling)
        for size in sizes:
            probed = probe_all(features, labels, range(splits), each=size)
            for name, count in itertools.product(probed, COUNTS):
                accuracies = [result[count].accuracy for result in probed[name]]
                found[size].setdefault(name, {}).setdefault(count, {})[file.stem] = accuracies
    return found


def summary(of_sets: dict[str, list[float]]) -> tuple[float, float]:
    """Return mean and standard deviation over splits of the mean over label sets."""
    by_split = [statistics.fmean(each) for each in zip(*of_sets.values(), strict=True)]
    return statistics.fmean(by_split), statistics.stdev(by_split)


def main(
    labels: Annotated[Path, typer.Argument(help="Folder of label_sets.py.")],
    model: Annotated[str, typer.Option(help="Checkpoint, or builtin.")] = "builtin",
    calibrate: Annotated[list[str] | None, typer.Option(help="Text to find networks on.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to find networks on.")] = 8192,
    networks: int = 64,
    context: int = 128,
    splits: int = 5,
    dtype: Annotated[str, typer.Option(help="Type that the model computes in.")] = "float32",
    few: Annotated[
        list[int] | None, typer.Option(help="Also train on so many texts of each label; repeat.")
    ] = None,
    scope: Annotated[str, typer.Option(help="global or layer.")] = "global",
    raw: Annotated[bool, typer.Option(help="Also without standardising.")] = False,
    pooling: Annotated[list[str] | None, typer.Option(help="rms, mean, or both.")] = None,
    output: protocol.Output = None,
) -> None:
    recipe = build_recipe(
        {"model": model, "calibration": calibrate or ["builtin"], "tokens": tokens, "seed": 0}
        | {
            "network_tokens": tokens,
            "networks": networks,
            "context": context,
            "dtype": dtype,
            "scope": scope,
        }
    )
    run: OpenRun = open_study(recipe, StageClock())
    on = with_networks(run)
    forms = {"": on} | ({"raw ": replace(on, networks=raw_networks(on, tokens))} if raw else {})
    files = sorted(labels.glob("*.jsonl"))
    facts: dict[str, Any] = {
        "model": Path(model).name,
        "tokens": tokens,
        "networks": networks,
        "dtype": dtype,
        "sets": [f.stem for f in files],
    }
    for form, study in forms.items():
        for how in POOLINGS:
            if pooling and how not in pooling:
                continue
            sizes = [None, *(few or ())]
            for size, found in measure(study, files, splits, how, sizes).items():
                key = f"{form}{how}" if size is None else f"{form}{how}, {size} of each label"
                facts[key] = found
                show(f"{Path(model).name}, {key}", found, [file.stem for file in files])
    protocol.save_json(output, facts)


def show(title: str, found: dict[str, Any], sets: list[str]) -> None:
    table = Table("features", *[f"k = {count}" for count in COUNTS], *sets,
                  title=f"{title}; sets at k = {COUNTS[-1]}")  # fmt: skip
    for name, by_count in found.items():
        cells = ["{:.3f} ± {:.3f}".format(*summary(by_count[count])) for count in COUNTS]
        cells += [f"{statistics.fmean(by_count[COUNTS[-1]][one]):.3f}" for one in sets]
        table.add_row(name, *cells)
    Console(width=180).print(table)


if __name__ == "__main__":
    torch.set_num_threads(1)
    typer.run(main)
