"""What the refit's damping should be where calibration tokens are few for a layer's neurons.

Cuts a model to half its neurons on so many tokens a neuron, refits at several dampings and at the adapted one, and
prints the perplexity on 8192 held-out tokens:

    python eval/quality/few_tokens.py MODEL TEXT [TEXT ...] --json eval/results/few_tokens_MODEL.json
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path

import torch

from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.perplexity import perplexity
from fbn_prune.model.surgery import MlpCut
from fbn_prune.progress import StageClock
from fbn_prune.pruning.damping import DampingWarning, refit_share
from fbn_prune.pruning.evidence import CutOptions, EvidencePass
from fbn_prune.pruning.second_order import choose_neurons, refit
from fbn_prune.recipe import build_recipe
from fbn_prune.runs.opening import read_texts
from fbn_prune.runs.setup import prepare

TOKENS_PER_NEURON = (0.5, 1, 4, 16)
DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", DampingWarning)
    known = {"model": arguments.model, "calibration": arguments.texts, "networks": 1}
    recipe = build_recipe({**known, "tokens": 65536, "context": 256})
    prepared = prepare(recipe)
    adapter = ModelAdapter(prepared.checkpoint.load_model("cpu", torch.float32))
    data = read_texts(prepared, prepared.checkpoint.load_tokenizer())[0]
    held_out = data.held_out.subset(8192).batches(4096)
    width = prepared.width
    table: dict[str, dict[str, float]] = {}
    for ratio in TOKENS_PER_NEURON:
        blocks = data.calibrating.subset(round(ratio * width))
        evidence = EvidencePass(
            adapter,
            blocks.batches(4096),
            CutOptions(False, recipe.damping, recipe.refit_damping, 0, torch.float32),
            clock=StageClock(),
        )
        adapted = refit_share(recipe.refit_damping, blocks.tokens, width)
        tried = {f"{damping:g}": damping for damping in DAMPINGS} | {"adapted": adapted}
        cuts: dict[str, list[MlpCut]] = {name: [] for name in tried}
        for layer in evidence:
            kept = choose_neurons(layer.weight, layer.gram, width // 2, damping=recipe.damping)
            for name, damping in tried.items():
                cuts[name].append(
                    MlpCut(kept, refit(layer.weight, layer.gram, kept, damping=damping))
                )
        row = {"tokens_per_neuron": blocks.tokens / width, "adapted_damping": adapted}
        for name, parts in cuts.items():
            with adapter.trying(parts):
                row[name] = perplexity(adapter, held_out)
        table[f"{ratio:g}"] = row
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
