"""Print what the settings of discovery change: how many networks, from how many tokens, over all layers or each alone.

    python eval/quality/label_sets.py LABELS
    python eval/quality/settings_table.py LABELS

For every setting: the balanced accuracy with which 1 and 5 networks tell the labels (`probe_table.py`), the overlap
with the networks of another sample of the text, and the rise of the loss when the strongest of the first networks is
masked.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import protocol
import torch
import typer
from probe_table import measure, summary
from rich.console import Console
from rich.table import Table

from fbn_prune.model.perplexity import mean_loss
from fbn_prune.networks.controls import NETWORKS, TEMPORAL
from fbn_prune.networks.interventions import masked
from fbn_prune.networks.recurrence import recurrence
from fbn_prune.progress import StageClock
from fbn_prune.recipe import build_recipe
from fbn_prune.runs.study import Studied, open_study, with_networks

SETTINGS: dict[str, dict[str, Any]] = {
    "64 networks, 8192 tokens": {},
    "32 networks": {"networks": 32},
    "128 networks": {"networks": 128},
    "2048 tokens": {"tokens": 2048},
    "16384 tokens": {"tokens": 16384},
    "128 networks, 16384 tokens": {"networks": 128, "tokens": 16384},
    "layer by layer, 11 each": {"scope": "layer", "networks": 11},
    "layer by layer, 32 each": {"scope": "layer", "networks": 32},
}
MASKED, MEASURED = 16, 1024


def study(
    model: str, calibrate: list[str], changes: dict[str, Any], seed: int, context: int
) -> Studied:
    given = {"networks": 64, "tokens": 8192, "scope": "global", **changes}
    tokens = given.pop("tokens")
    recipe = build_recipe(
        {
            "model": model,
            "calibration": calibrate,
            "context": context,
            "dtype": "float32",
            "seed": seed,
        }
        | {"tokens": tokens, "network_tokens": tokens, **given}
    )
    return with_networks(open_study(recipe, StageClock()))  # fmt: skip


def main(
    labels: Annotated[Path, typer.Argument(help="Folder of label_sets.py.")],
    model: Annotated[str, typer.Option(help="Checkpoint, or builtin.")] = "builtin",
    calibrate: Annotated[list[str] | None, typer.Option(help="Text to find networks on.")] = None,
    context: int = 128,
    splits: int = 5,
    output: protocol.Output = None,
) -> None:
    files = sorted(labels.glob("*.jsonl"))
    facts: dict[str, Any] = {"model": Path(model).name, "settings": {}}
    table = Table("setting", "networks", "k = 1", "k = 5", "temporal ICA, k = 5", "IoU, other sample",
                  "by chance", "strongest masked, nats", "seconds")  # fmt: skip
    for name, changes in SETTINGS.items():
        start = time.monotonic()
        on = study(model, calibrate or ["builtin"], changes, 0, context)
        seconds = time.monotonic() - start
        other = study(model, calibrate or ["builtin"], changes, 1, context)
        found = measure(on, files, splits, "rms", [None])[None]
        held = on.data.held_out.subset(MEASURED).batches(protocol.BATCH_TOKENS)
        dense = mean_loss(on.adapter, held)
        rises = []
        for network in range(min(MASKED, len(on.networks.maps))):
            with masked(on.adapter, on.networks.by_layer(on.networks.hubs(network))):
                rises.append(mean_loss(on.adapter, held) - dense)
        again = recurrence(on.networks, replace(other.networks, header=on.networks.header))
        facts["settings"][name] = {
            "networks": len(on.networks.maps),
            "accuracy": {k: summary(found[NETWORKS][k]) for k in (1, 5)},
            "temporal": summary(found[TEMPORAL][5]),
            "iou": again.to_json()["mean_iou"],
            "chance": again.to_json()["chance_iou"],
            "strongest": max(rises),
            "seconds": seconds,
        }
        row = facts["settings"][name]
        cells = [
            "{:.3f} ± {:.3f}".format(*each) for each in (*row["accuracy"].values(), row["temporal"])
        ]
        table.add_row(name, str(row["networks"]), *cells, f"{row['iou']:.2f}", f"{row['chance']:.2f}",
                      f"{row['strongest']:.2f}", f"{row['seconds']:.0f}")  # fmt: skip
        print(name, row, flush=True)
        protocol.save_json(output, facts)
    Console(width=150).print(table)


if __name__ == "__main__":
    torch.set_num_threads(1)
    typer.run(main)
