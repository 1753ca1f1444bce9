"""Find the refit damping that suits a layer with few calibration tokens for each neuron.

The script cuts a model to half its neurons at several numbers of tokens a neuron, refits with several dampings and the
adapted one, and prints the perplexity on 8192 held-out tokens:

    python eval/quality/few_tokens.py MODEL TEXT [TEXT ...] --json eval/results/few_tokens_MODEL.json
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import protocol

from fbn_prune.model.perplexity import perplexity
from fbn_prune.model.surgery import MlpCut
from fbn_prune.progress import StageClock
from fbn_prune.pruning.damping import DampingWarning, refit_share
from fbn_prune.pruning.evidence import EvidencePass
from fbn_prune.pruning.second_order import choose_neurons, refit

TOKENS_PER_NEURON = (0.5, 1, 4, 16)
DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", DampingWarning)
    run = protocol.open_texts(arguments.model, arguments.texts, tokens=65536)
    recipe, width = run.prepared.recipe, run.prepared.widths[0]
    held_out = run.data.held_out.subset(8192).batches(4096)
    table: dict[str, dict[str, float]] = {}
    for ratio in TOKENS_PER_NEURON:
        blocks = run.data.calibrating.subset(round(ratio * width))
        evidence = EvidencePass(
            run.adapter, blocks.batches(4096), protocol.cut_options(0), clock=StageClock()
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
            with run.adapter.trying(parts):
                row[name] = perplexity(run.adapter, held_out)
        table[f"{ratio:g}"] = row
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
    protocol.save_json(arguments.json, table)


if __name__ == "__main__":
    main()
