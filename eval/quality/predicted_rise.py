"""Compare the loss rise of pruned models with the sum of their layers' relative errors, to calibrate the prediction.

The script cuts each model by five criteria to five widths, and its attention to every number of heads, on 8192
calibration tokens, and measures the loss on 2048 held-out ones:

    python eval/quality/predicted_rise.py builtin=builtin MODEL=TEXT[,TEXT] ... --json eval/results/predicted_rise.json
"""

from __future__ import annotations

import argparse
import copy
import statistics
from pathlib import Path
from typing import Any

import protocol
import torch

from fbn_prune.model.perplexity import mean_loss
from fbn_prune.model.surgery import MlpCut
from fbn_prune.progress import StageClock
from fbn_prune.pruning.criteria import CRITERIA, head_cut
from fbn_prune.pruning.evidence import EvidencePass
from fbn_prune.pruning.fitting import DampingNotes
from fbn_prune.pruning.prediction import (
    HEAD_WEIGHT,
    predicted_rise,
    relative_error,
    relative_head_error,
)

TOKENS, HELD_OUT_TOKENS = 8192, 2048
CRITERIA_TRIED = ("second-order", "flap", "wanda", "magnitude", "random")
HEADS = "heads"
SHARES = (0.9, 0.7, 0.5, 0.3, 0.1)


def measure(name: str, texts: list[str]) -> list[dict[str, Any]]:
    """Return for each criterion and width the summed relative error and the loss rise in nats."""
    run = protocol.open_texts(name, texts, TOKENS)
    adapter, width = run.adapter, run.prepared.widths[0]
    held_out = run.data.held_out.subset(HELD_OUT_TOKENS).batches(4096)
    family, config = run.prepared.family, run.prepared.checkpoint.config
    groups = family.head_shape(config).groups if family.attention is not None else 1
    options = protocol.cut_options(0, head_groups=None if groups == 1 else 1)
    batches = run.data.calibrating.batches(4096)
    evidence = EvidencePass(adapter, batches, options, clock=StageClock())
    cuts: dict[tuple[str, float], list[MlpCut]] = {}
    errors: dict[tuple[str, float], list[float]] = {}
    for layer in evidence:
        for criterion in CRITERIA_TRIED:
            for share in SHARES:
                with DampingNotes().heard(layer.layer):
                    cut = CRITERIA[criterion](layer, round(width * share))
                cuts.setdefault((criterion, share), []).append(cut)
                errors.setdefault((criterion, share), []).append(relative_error(layer, cut))
        for kept in range(1, groups):
            assert layer.heads is not None
            heads = head_cut(layer.heads, kept)
            whole = MlpCut(torch.arange(width), layer.weight, heads=heads)
            cuts.setdefault((HEADS, kept / groups), []).append(whole)
            error = relative_head_error(layer.heads, heads)
            errors.setdefault((HEADS, kept / groups), []).append(error)
    dense = mean_loss(adapter, held_out)
    rows = []
    for (criterion, share), parts in cuts.items():
        if criterion == HEADS:
            cut_model = copy.deepcopy(adapter)
            for number, part in enumerate(parts):
                cut_model.cut(number, part)
            rise = mean_loss(cut_model, held_out) - dense
        else:
            with adapter.trying(parts):
                rise = mean_loss(adapter, held_out) - dense
        row = {"model": Path(name).name, "criterion": criterion, "kept": share}
        rows.append({**row, "summed_error": sum(errors[criterion, share]), "rise": rise})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL=TEXT[,TEXT]")
    parser.add_argument("--json", type=Path, help="write all rows here")
    arguments = parser.parse_args()
    rows = []
    for pair in arguments.models:
        name, _, texts = pair.partition("=")
        rows += measure(name, texts.split(","))
    for row in sorted(rows, key=lambda row: row["summed_error"]):
        print(
            f"{row['model']:<14}{row['criterion']:<14}{row['kept']:.0%}  summed error {row['summed_error']:8.4f}"
            f"  rise {row['rise']:8.4f}"
        )
    outside = []
    for row in rows:
        weight = HEAD_WEIGHT if row["criterion"] == HEADS else 1.0
        predicted = predicted_rise([weight * row["summed_error"]])
        if not predicted.least <= row["rise"] <= predicted.most:
            outside.append(f"{row['model']} {row['criterion']} {row['kept']:.0%}")
    for of_heads in (False, True):
        large = [
            row
            for row in rows
            if row["summed_error"] >= 0.05 and (row["criterion"] == HEADS) == of_heads
        ]
        ratios = [row["rise"] / row["summed_error"] for row in large]
        print(
            f"rise / summed error of {'heads' if of_heads else 'MLPs'}, over {len(large)} cuts with 0.05 or more: "
            f"median {statistics.median(ratios):.2f}, highest {max(ratios):.2f}"
        )
    print(f"lowest rise of all {min(row['rise'] for row in rows):.3f}")
    print(f"outside the predicted range: {len(outside)} of {len(rows)}: {'; '.join(outside)}")
    protocol.save_json(arguments.json, rows)


if __name__ == "__main__":
    main()
