"""Compare the neurons that `recipes/paper-layerwise.yaml` keeps with a straightforward implementation of the paper.

    python eval/quality/paper_masks.py --model DIR --calibrate a.txt

The other implementation shares only the text with ours: forward hooks on a transformers model collect the activations,
scikit-learn's FastICA decomposes those of each layer, maps are z-scored over neurons, and a neuron stays if abs z is
above the threshold in any map (arXiv 2508.05239). FastICA starts at random and with many components has several fixed
points, so a second scikit-learn run from another seed shows how much agreement is possible.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import protocol
import torch
import typer
from rich.console import Console
from rich.table import Table
from sklearn.decomposition import FastICA
from transformers import AutoModelForCausalLM

from fbn_prune.data.calibration import TokenBlocks
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.progress import StageClock
from fbn_prune.recipe import load_recipe
from fbn_prune.runs.main_job import run_prune
from fbn_prune.runs.opening import read_texts
from fbn_prune.runs.setup import prepare

RECIPE = Path(__file__).parents[2] / "recipes" / "paper-layerwise.yaml"


def layer_activations(model: Any, blocks: TokenBlocks) -> list[np.ndarray]:
    """Return the inputs of the `down` projections of a Llama, [tokens, neurons] for each layer."""
    seen: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda module, args, kept=kept: kept.append(args[0][0].float())
        )
        for layer, kept in zip(model.model.layers, seen, strict=True)
    ]
    with torch.no_grad():
        for block in blocks.blocks:
            model(block[None])
    for handle in handles:
        handle.remove()
    return [torch.cat(rows).numpy() for rows in seen]


def strongest_z(activations: np.ndarray, networks: int, seed: int) -> np.ndarray:
    """Return the largest abs z of each neuron over one layer's networks, [neurons]."""
    deviation = activations.std(0)
    z = (activations - activations.mean(0)) / np.where(deviation > 0, deviation, 1)
    ica = FastICA(
        networks, fun="cube", whiten="unit-variance", max_iter=1000, tol=1e-5, random_state=seed
    )
    with warnings.catch_warnings():
        # The agreement of two seeds shows how much a run that did not converge is worth.
        warnings.simplefilter("ignore")
        maps = ica.fit_transform(z.T).T
    maps = (maps - maps.mean(1, keepdims=True)) / maps.std(1, keepdims=True)
    return np.abs(maps).max(0)


def kept_by_threshold(strongest: list[np.ndarray], budget: int) -> list[np.ndarray]:
    """Return for each layer bool [neurons]: the neurons above one threshold, which `budget` neurons of all reach."""
    threshold = np.sort(np.concatenate(strongest))[::-1][budget - 1]
    return [layer >= threshold for layer in strongest]


def kept_in_checkpoint(before: Checkpoint, after: Checkpoint, layer: int) -> np.ndarray:
    """Return which rows of the source's gate are still there, bool [neurons]."""
    name = f"model.layers.{layer}.mlp.gate_proj.weight"
    old, new = before.tensor(name).float().numpy(), after.tensor(name).float().numpy()
    left = {row.tobytes() for row in new}
    return np.array([row.tobytes() in left for row in old])


def overlap(first: list[np.ndarray], second: list[np.ndarray]) -> float:
    """Return the neurons kept by both over those kept by either."""
    a, b = np.concatenate(first), np.concatenate(second)
    return float((a & b).sum() / (a | b).sum())


def main(
    model: Annotated[Path, typer.Option(help="A Llama's folder.")],
    calibrate: Annotated[list[str], typer.Option(help="Calibration text; repeat for several.")],
    tokens: Annotated[int, typer.Option(help="Calibration tokens, all used by the ICA.")] = 8192,
    context: protocol.Context = 256,
    networks: Annotated[int, typer.Option(help="Components of a layer.")] = 128,
    sparsity: Annotated[float, typer.Option(help="Over all layers.")] = 0.1,
    keep_layers: Annotated[str, typer.Option(help="Layers left whole.")] = "0,1,2,-2,-1",
    output: protocol.Output = None,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        given = {
            "model": str(model),
            "calibration": calibrate,
            "output": Path(folder) / "pruned",
            "tokens": tokens,
            "network_tokens": 2 * tokens,  # more than there are, so that all are used
            "context": context,
            "networks": networks,
            "sparsity": sparsity,
            "keep_layers": keep_layers,
            "dtype": "float32",
        }
        recipe = load_recipe(RECIPE, given)
        prepared = prepare(recipe)
        result = run_prune(recipe, StageClock())
        before = Checkpoint.open(model)
        after = Checkpoint.open(Path(folder) / "pruned")
        cut = [layer for layer in range(prepared.layers) if layer not in prepared.whole]
        ours = [kept_in_checkpoint(before, after, layer) for layer in cut]
    blocks = read_texts(prepared, before.load_tokenizer(), calibrate)[0].calibrating
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    activations = layer_activations(plain, blocks)
    budget = sum(result.widths[layer] for layer in cut)
    theirs = [
        kept_by_threshold([strongest_z(activations[i], networks, seed) for i in cut], budget)
        for seed in (0, 1)
    ]
    total = sum(len(layer) for layer in ours)
    chance = budget / (2 * total - budget)
    facts: dict[str, Any] = {
        "model": model.name,
        "tokens": blocks.tokens,
        "networks": networks,
        "layers_cut": cut,
        "kept": budget / total,
        "overlap_ours_sklearn": [overlap(ours, other) for other in theirs],
        "overlap_sklearn_seeds": overlap(*theirs),
        "overlap_by_chance": chance,
        "widths_ours": [int(layer.sum()) for layer in ours],
        "widths_sklearn": [[int(layer.sum()) for layer in other] for other in theirs],
    }
    table = Table("kept neurons of", "overlap (IoU)", title=f"{model.name}, layers {cut} cut")
    for seed, value in enumerate(facts["overlap_ours_sklearn"]):
        table.add_row(f"the recipe and scikit-learn, seed {seed}", f"{value:.3f}")
    table.add_row("scikit-learn's two seeds", f"{facts['overlap_sklearn_seeds']:.3f}")
    table.add_row("two random choices of that size", f"{chance:.3f}")
    Console().print(table)
    protocol.save_json(output, facts)


if __name__ == "__main__":
    typer.run(main)
