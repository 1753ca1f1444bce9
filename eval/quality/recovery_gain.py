"""Print the gain of `--recover` on held-out text, and its time.

    python eval/quality/recovery_gain.py --model DIR --calibrate a.txt --calibrate b.txt --evaluate c.txt

The model is cut by the second order to the same width in every layer. Perplexity is over all evaluation tokens in
float32. The recovery reads only the calibration blocks.
"""

from __future__ import annotations

import copy
import time
from typing import Annotated, cast, get_args

import protocol
import torch
import typer
from rich.console import Console

from fbn_prune.model.perplexity import perplexity
from fbn_prune.progress import StageClock
from fbn_prune.pruning.allocation import budget_from_sparsity, uniform_widths
from fbn_prune.pruning.cutting import CutPlan, cut_layers
from fbn_prune.pruning.recovery import Weights
from fbn_prune.pruning.recovery.healing import RecoveryOptions, heal, healed_tensors


def main(
    model: protocol.Model,
    calibrate: protocol.Calibrate,
    evaluate: protocol.Evaluate,
    kept: Annotated[float, typer.Option(help="Share of neurons kept.")] = 0.3,
    context: protocol.Context = 256,
    blocks: protocol.Blocks = 32,
    evaluation_blocks: protocol.EvaluationBlocks = 32,
    first: protocol.First = 400,
    passes: int = 2,
    rank: int = 32,
    weights: Annotated[
        str, typer.Option(help="adapters, or all weights of linear maps.")
    ] = "adapters",
    text_loss: Annotated[float, typer.Option(help="Weight of the text's own loss.")] = 0.0,
    threads: Annotated[int, typer.Option(help="Of torch.")] = 2,
    seed: int = 0,
    output: protocol.Output = None,
) -> None:
    torch.set_num_threads(threads)
    drawn = {"context": context, "blocks": blocks, "evaluation_blocks": evaluation_blocks}
    sample = protocol.load_sample(model, calibrate, evaluate, first=first, seed=seed, **drawn)
    checkpoint, dense, held_out = sample.checkpoint, sample.adapter, sample.held_out
    calibration = sample.calibration
    widths = dense.widths
    budget = budget_from_sparsity(sum(widths), 1 - kept)
    cut = copy.deepcopy(dense)
    plan = CutPlan("second-order", uniform_widths(budget, widths, 1))
    cutting = protocol.cut_options(seed, round_to=checkpoint.storage_dtype)
    cut_layers(cut, sample.batches, plan, cutting, clock=StageClock())
    facts = {"model": model.name, "kept": kept, "calibration_tokens": calibration.tokens}
    facts |= {"passes": passes, "rank": rank, "threads": threads}
    facts |= {"weights": weights, "text_loss": text_loss}
    facts |= {"dense": perplexity(dense, held_out), "cut": perplexity(cut, held_out)}
    clock, wall, cpu = StageClock(), time.perf_counter(), time.process_time()
    if weights not in get_args(Weights):
        raise typer.BadParameter(f"{weights!r} is none of {', '.join(get_args(Weights))}")
    chosen = cast(Weights, weights)
    options = RecoveryOptions(passes, rank, seed, text_loss=text_loss, weights=chosen)
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
    protocol.save_json(output, facts)


if __name__ == "__main__":
    typer.run(main)
