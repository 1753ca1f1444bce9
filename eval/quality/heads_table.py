"""Print the perplexity with fewer attention heads, by how the heads are chosen, and with fewer neurons instead.

    python eval/quality/heads_table.py --model DIR --calibrate a.txt --calibrate b.txt --evaluate c.txt

The MLPs stay whole. Columns: the second order with its refit (`--head-sparsity`), one-shot and `--sequential`; the same
heads without a refit; heads by FLAP's score (the variance of their outputs times the squared weights that read them)
without a refit; random heads, the mean of several draws; and `neurons instead`, which keeps the attention whole and
removes as many parameters from the MLPs by `--criterion second-order`. A live model can have any number of heads; a
star marks the counts that the architecture's stock config accepts, which can be exported. Samples as in `protocol.py`.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import protocol
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fbn_prune.errors import InvalidInput
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.heads import HeadCut
from fbn_prune.model.perplexity import perplexity
from fbn_prune.model.surgery import MlpCut
from fbn_prune.progress import StageClock
from fbn_prune.pruning.criteria import CRITERIA, HeadEvidence, head_cut
from fbn_prune.pruning.cutting import CutPlan, cut_layers
from fbn_prune.pruning.damping import centred
from fbn_prune.pruning.evidence import EvidencePass

DRAWS = 5
Chosen = Callable[[HeadEvidence, int], HeadCut]


def as_they_are(evidence: HeadEvidence, kept: Tensor) -> HeadCut:
    """Return the groups `kept` with their original output weights."""
    channels = (kept[:, None] * evidence.group + torch.arange(evidence.group)).flatten()
    return HeadCut(kept, evidence.weight[:, channels], evidence.bias)


def without_refit(evidence: HeadEvidence, groups: int) -> HeadCut:
    """Choose heads by the second order, without its refit."""
    return as_they_are(evidence, head_cut(evidence, groups).kept)


def by_variance(evidence: HeadEvidence, groups: int) -> HeadCut:
    """Choose heads by FLAP's score, summed over the channels of a group."""
    variance = centred(evidence.gram, evidence.mean).diagonal()
    score = (variance * evidence.weight.square().sum(0)).view(-1, evidence.group).sum(1)
    return as_they_are(evidence, score.argsort(descending=True)[:groups].sort().values)


def by_chance(seed: int) -> Chosen:
    """Return a choice that draws heads uniformly in each layer."""
    draw = torch.Generator().manual_seed(seed)

    def choose(evidence: HeadEvidence, groups: int) -> HeadCut:
        count = evidence.weight.shape[1] // evidence.group
        order = torch.randperm(count, generator=draw)
        return as_they_are(evidence, order[:groups].sort().values)

    return choose


def main(
    model: protocol.Model,
    calibrate: protocol.Calibrate,
    evaluate: protocol.Evaluate,
    context: protocol.Context = 256,
    blocks: protocol.Blocks = 32,
    evaluation_blocks: protocol.EvaluationBlocks = 32,
    first: protocol.First = 400,
    seed: int = 0,
    output: protocol.Output = None,
) -> None:
    drawn = {"context": context, "blocks": blocks, "evaluation_blocks": evaluation_blocks}
    sample = protocol.load_sample(model, calibrate, evaluate, first=first, seed=seed, **drawn)
    checkpoint, dense = sample.checkpoint, sample.adapter
    batches, held_out = sample.batches, sample.held_out
    shape, hidden = checkpoint.family.head_shape(checkpoint.config), dense.hidden_size
    width = dense.widths[0]
    counts = list(range(shape.groups - 1, 0, -1))
    options = {groups: protocol.cut_options(seed, head_groups=groups) for groups in counts}
    ways: dict[str, list[Chosen]] = {
        "second order": [head_cut],
        "no refit": [without_refit],
        "variance": [by_variance],
        "chance": [by_chance(number) for number in range(DRAWS)],
    }

    def fewer_neurons(groups: int) -> int:
        """Return the width at which the MLPs lose as many parameters as the attention would."""
        gone = (shape.groups - groups) * 2 * hidden * shape.size * (shape.queries + 1)
        return max(1, round(width - gone / (3 * hidden)))

    cuts: dict[tuple[str, int, int], list[MlpCut]] = {}
    for layer in EvidencePass(dense, batches, options[counts[0]], clock=StageClock()):
        assert layer.heads is not None
        whole = MlpCut(torch.arange(width), layer.weight)
        for groups in counts:
            for name, draws in ways.items():
                for number, choose in enumerate(draws):
                    cut = replace(whole, heads=choose(layer.heads, groups))
                    cuts.setdefault((name, groups, number), []).append(cut)
            instead = fewer_neurons(groups)
            if instead < width:
                cuts.setdefault(("neurons instead", groups, 0), []).append(
                    CRITERIA["second-order"](layer, instead)
                )

    def measured(parts: list[MlpCut]) -> float:
        cut = copy.deepcopy(dense)
        for number, part in enumerate(parts):
            cut.cut(number, part)
        return perplexity(cut, held_out)

    def sequential(groups: int) -> float:
        cut = copy.deepcopy(dense)
        chosen = replace(options[groups], sequential=True)
        cut_layers(cut, batches, CutPlan("second-order", cut.widths), chosen, clock=StageClock())
        return perplexity(cut, held_out)

    headings = ["second order", "sequential", "no refit", "variance", "chance", "neurons instead"]
    before = perplexity(dense, held_out)
    table = Table("heads kept", *headings, title=f"{model.name}: perplexity, dense {before:.2f}")
    rows: list[dict[str, Any]] = []
    for groups in counts:
        values_by_way: dict[str, list[float]] = {"sequential": [sequential(groups)]}
        for (name, kept, _), parts in cuts.items():
            if kept == groups:
                values_by_way.setdefault(name, []).append(measured(parts))
        row: dict[str, Any] = {
            name: statistics.mean(values) for name, values in values_by_way.items()
        }
        row |= {"groups": groups, "exports": accepted(checkpoint, groups)}
        row["neurons_instead_width"] = fewer_neurons(groups)
        rows.append(row)
        star = "*" if row["exports"] else ""
        shown = [f"{row[name]:.2f}" if name in row else "" for name in headings]
        table.add_row(f"{groups} of {shape.groups}{star}", *shown)
    Console(width=120).print(table)
    facts = {"model": model.name, "dense": before, "context": context, "blocks": blocks}
    protocol.save_json(output, {**facts, "seed": seed, "rows": rows})


def accepted(checkpoint: Checkpoint, groups: int) -> bool:
    """Return whether the architecture's stock config accepts this number of key-value groups."""
    try:
        checkpoint.family.with_head_groups(checkpoint.config, groups)
    except InvalidInput:
        return False
    return True


if __name__ == "__main__":
    typer.run(main)
