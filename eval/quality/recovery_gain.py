"""Print what `--recover` brings on held-out text, and the time that it takes.

    python eval/quality/recovery_gain.py --model DIR --calibrate a.txt --calibrate b.txt --evaluate c.txt

The sample and the protocol are those of `criteria_table.py`: the same width in every layer, chosen and refitted by the
second order, perplexity over all evaluation tokens in float32. The recovery sees the calibrating blocks
and nothing else.
"""

from __future__ import annotations

import copy
import json
import random
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from criteria_table import BATCH_TOKENS, first_blocks
from rich.console import Console

from fbn_prune.data.calibration import TokenBlocks
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.perplexity import perplexity
from fbn_prune.progress import StageClock
from fbn_prune.pruning.allocation import budget_from_sparsity, uniform_widths
from fbn_prune.pruning.cutting import CutPlan, cut_layers
from fbn_prune.pruning.evidence import CutOptions
from fbn_prune.pruning.recovery.healing import RecoveryOptions, heal, healed_tensors


def main(
    model: Annotated[Path, typer.Option(help="Checkpoint folder.")],
    calibrate: Annotated[list[Path], typer.Option(help="Calibration text; repeat for several.")],
    evaluate: Annotated[list[Path], typer.Option(help="Evaluation text; repeat for several.")],
    kept: Annotated[float, typer.Option(help="Share of neurons kept.")] = 0.3,
    context: Annotated[int, typer.Option()] = 256,
    blocks: Annotated[int, typer.Option(help="Calibration blocks of each text.")] = 32,
    evaluation_blocks: Annotated[int, typer.Option(help="First blocks of each text.")] = 32,
    first: Annotated[int, typer.Option(help="Calibration blocks are drawn from these.")] = 400,
    passes: Annotated[int, typer.Option()] = 2,
    rank: Annotated[int, typer.Option()] = 32,
    threads: Annotated[int, typer.Option(help="Of torch.")] = 2,
    seed: Annotated[int, typer.Option()] = 0,
    output: Annotated[Path | None, typer.Option(help="Also write JSON here.")] = None,
) -> None:
    torch.set_num_threads(threads)
    checkpoint = Checkpoint.open(model)
    tokenizer = checkpoint.load_tokenizer()
    dense = ModelAdapter(checkpoint.load_model("cpu", torch.float32))
    draw = random.Random(seed)
    sample: list[torch.Tensor] = []
    for file in calibrate:
        found = first_blocks(file, tokenizer, context, first)
        sample += draw.sample(found, min(blocks, len(found)))
    draw.shuffle(sample)
    calibration = TokenBlocks(tuple(sample), context, tuple(map(str, calibrate)))
    held = [
        b for file in evaluate for b in first_blocks(file, tokenizer, context, evaluation_blocks)
    ]
    held_out = TokenBlocks(tuple(held), context, tuple(map(str, evaluate))).batches(BATCH_TOKENS)

    widths = dense.widths
    budget = budget_from_sparsity(sum(widths), 1 - kept)
    cut = copy.deepcopy(dense)
    cut_layers(
        cut,
        calibration.batches(BATCH_TOKENS),
        CutPlan("second-order", uniform_widths(budget, widths, 1)),
        CutOptions(False, 1e-2, 1e-3, seed, checkpoint.storage_dtype),
        clock=StageClock(),
    )
    facts = {
        "model": model.name,
        "kept": kept,
        "calibration_tokens": calibration.tokens,
        "passes": passes,
        "rank": rank,
        "threads": threads,
        "dense": perplexity(dense, held_out),
        "cut": perplexity(cut, held_out),
    }
    clock, wall, cpu = StageClock(), time.perf_counter(), time.process_time()
    options = RecoveryOptions(passes, rank, seed)
    heal(cut, dense, calibration, options, clock)
    facts |= {
        "seconds": time.perf_counter() - wall,
        "processor_seconds": time.process_time() - cpu,
        "stages": clock.seconds,
    }
    healed_tensors(cut, checkpoint)
    recovered = perplexity(cut, held_out)
    closed = (facts["cut"] - recovered) / (facts["cut"] - facts["dense"])
    facts |= {"recovered": recovered, "gap_closed": closed}
    Console().print(
        f"{model.name}, {kept:.0%} kept, {calibration.tokens} tokens: dense {facts['dense']:.2f}, "
        f"cut {facts['cut']:.2f}, recovered {recovered:.2f}: {closed:.0%} of the gap, in "
        f"{facts['seconds']:.0f} s ({facts['processor_seconds']:.0f} processor seconds, {threads} threads)"
    )
    if output is not None:
        output.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
