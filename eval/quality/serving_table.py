"""Print the memory and the perplexity of each choice of refit for a served task.

    python eval/quality/serving_table.py --model builtin --task code=PRUNED,TEXT --task prose=PRUNED,TEXT
        [--rank 8 --rank 32 --rank 128] [--tokens 4096] [--output table.json]

For each task, on its own text: the whole model; the task's neurons with the whole model's output weights (`none`), a
low-rank correction or their own output weights (`full`); and the exported checkpoint, which `full` must equal.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import protocol
import torch

from fbn_prune.data import builtin
from fbn_prune.data.calibration import Batch, calibration_data
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.perplexity import perplexity
from fbn_prune.serving import attach
from fbn_prune.serving.tasks import Refit, task_of_pruned

CONTEXT = 256
BATCH_TOKENS = 2048


def text_batches(base: Checkpoint, source: str, tokens: int) -> list[Batch]:
    """Return about `tokens` tokens of a text, in blocks of `CONTEXT`."""
    data = calibration_data(
        [source],
        base.load_tokenizer(),
        tokens=tokens,
        context=CONTEXT,
        held_out=0.1,
        seed=0,
        vocabulary=base.family.vocab_size(base.config),
    )
    return list(data.calibrating.batches(BATCH_TOKENS))


def rows_of_task(
    base: Checkpoint, name: str, pruned: Checkpoint, text: str, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Measure every choice for one task; return one row for each."""
    batches = text_batches(base, text, options.tokens)
    adapter = ModelAdapter(base.load_model("cpu", torch.float32))
    found: list[dict[str, Any]] = []

    def add(choice: str, cost: int, value: float) -> None:
        found.append({"task": name, "choice": choice, "bytes": cost, "perplexity": value})
        print(f"{name:8} {choice:16} {cost:12,} bytes  perplexity {value:9.4f}", flush=True)

    add("whole model", 0, perplexity(adapter, batches))
    choices: list[tuple[str, Refit, int]] = [("none", "none", 1)]
    choices += [(f"rank {rank}", "low-rank", rank) for rank in options.rank or (8, 32, 128)]
    choices.append(("full", "full", 1))
    for label, refit, rank in choices:
        task = task_of_pruned(base, pruned, refit, rank)
        with attach(adapter.model, {name: task}) as served, served.networks(name):
            value = perplexity(adapter, batches)
        stored = task.correction_parameters * base.storage_dtype.itemsize
        add(label, task.neurons.nbytes + stored, value)
    exported = ModelAdapter(pruned.load_model("cpu", torch.float32))
    add("exported", pruned.total_bytes, perplexity(exported, batches))
    return found


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--task", action="append", required=True, metavar="NAME=PRUNED,TEXT")
    parser.add_argument("--rank", action="append", type=int)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    base = Checkpoint.open(builtin.model_path() if options.model == "builtin" else options.model)
    rows: list[dict[str, Any]] = []
    for text in options.task:
        name, _, places = text.partition("=")
        folder, _, source = places.partition(",")
        pruned = Checkpoint.open(Path(folder))
        rows += rows_of_task(base, name, pruned, source, options)
    facts = {"model": options.model, "tokens": options.tokens, "torch": torch.__version__}
    protocol.save_json(options.output, {**facts, "context": CONTEXT, "rows": rows})


if __name__ == "__main__":
    main()
