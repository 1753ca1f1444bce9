"""Print what removing a skill costs the rest, by how its neurons are chosen, and whether training brings it back.

    python eval/quality/forget_table.py
    python eval/quality/forget_table.py --model DIR --skill code=c.jsonl,h.jsonl --skill prose=p.txt,q.txt

Each skill has a text to choose neurons by and a text to measure on. It is removed in turn, and the others are the
rest: the neurons that stay are refitted on the rest alone. A way to choose neurons ranks all of them. The first 32,
64, ... are cut, and the loss is measured on text of the rest that was set aside and on the skill's measured text.
The figure of a way is the rise of the skill's loss where the rest has lost `--cost` nats a token, interpolated on the
curve. `ratio` is the ratio of mean abs activations (selective pruning, arXiv 2403.01267); `gradient` that of abs
gradient times activation.
"""

from __future__ import annotations

import copy
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import protocol
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fbn_prune.data import builtin
from fbn_prune.data.calibration import Batch, TokenBlocks, first_blocks
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.perplexity import mean_loss
from fbn_prune.model.surgery import MlpCut
from fbn_prune.networks.activity import time_courses
from fbn_prune.networks.controls import NETWORKS, basis_maps, control_bases
from fbn_prune.networks.forgetting import activity_ratio, key_neurons, marked, selectivity
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.progress import StageClock
from fbn_prune.pruning import second_order
from fbn_prune.pruning.criteria import LayerEvidence
from fbn_prune.pruning.evidence import EvidencePass

RATIO, GRADIENT, RANDOM, BOTH = "neurons, ratio", "neurons, gradient", "random", "networks x ratio"
TUNE_STEPS, TUNE_ROWS, LEARNING_RATE = 50, 8, 1e-4
REFIT_DAMPING = 1e-3
SIZES = tuple(32 * 2**n for n in range(6))

Blocks = TokenBlocks
Scores = dict[str, list[Tensor]]
"""Way to choose neurons -> a score of each neuron, [N], the highest first; several for random ones."""


class Text:
    """One skill: blocks to choose and refit by, blocks set aside, and blocks to measure on."""

    def __init__(self, own: str, measured: str, tokenizer: Any, context: int, tokens: int) -> None:
        blocks = first_blocks(own, tokenizer, context, tokens=tokens)
        rest, aside = blocks.split(4)
        self.fitted, self.aside = rest.batches(4096), aside.batches(4096)
        self.blocks = rest
        self.measured = first_blocks(measured, tokenizer, context, tokens=1024).batches(4096)


class Seen:
    """Engagement of every basis, and mean abs activation and gradient of every neuron, on one text."""

    def __init__(
        self, adapter: ModelAdapter, networks: FunctionalNetworks, batches: Sequence[Batch]
    ) -> None:
        activity = torch.zeros(sum(networks.widths))
        gradient = torch.zeros(sum(networks.widths))

        def watch(layer: int, index: int, z: Tensor) -> None:
            span = networks.layer_slice(layer)
            activity[span] += (z * networks.std[span] + networks.mean[span]).abs().sum(0)

        self.courses = torch.cat(time_courses(adapter, networks, batches, StageClock(), watch))
        self.activity = activity / len(self.courses)
        for batch in batches:
            kept: list[Tensor] = []

            def keep(module: Any, args: tuple[Tensor], kept: list[Tensor] = kept) -> None:
                args[0].retain_grad()
                kept.append(args[0])

            handles = [
                adapter.output_module(layer).register_forward_pre_hook(keep)
                for layer in range(adapter.num_layers)
            ]
            targets = batch.input_ids.masked_fill(~batch.valid, -100)
            adapter.model(input_ids=batch.input_ids, labels=targets).loss.backward()
            for handle in handles:
                handle.remove()
            parts = [(x * x.grad).detach().abs()[batch.valid].sum(0) for x in kept]
            gradient += torch.cat(parts) * batch.tokens  # the loss is a mean over tokens
            adapter.model.zero_grad()
        self.gradient = gradient / len(self.courses)


def ways(networks: FunctionalNetworks, skill: Seen, rest: Sequence[Seen], seed: int) -> Scores:
    """Return every way to choose neurons for a skill."""
    others = torch.cat([one.courses for one in rest])
    bases = control_bases(torch.cat([skill.courses, others]), seed=seed)
    activity = activity_ratio(skill.activity, torch.stack([one.activity for one in rest]).mean(0))
    gradient = activity_ratio(skill.gradient, torch.stack([one.gradient for one in rest]).mean(0))
    found: Scores = {}
    for name, drawn in bases.items():
        found[name] = [
            key_neurons(
                basis_maps(networks.maps, basis),
                selectivity(
                    (skill.courses @ basis).square().mean(0), (others @ basis).square().mean(0)
                ),
            )
            for basis in drawn
        ]
    found[BOTH] = [found[NETWORKS][0] * activity.clamp_min(1).log()]
    found[RATIO], found[GRADIENT] = [activity], [gradient]
    generator = torch.Generator().manual_seed(seed)
    found[RANDOM] = [torch.rand(len(activity), generator=generator) for _ in range(5)]
    return found


def cuts_of(evidence: Sequence[LayerEvidence], worth: Sequence[Tensor]) -> list[MlpCut]:
    """Cut the neurons of a worth below 0 and refit the others."""
    cuts = []
    for layer, part in zip(evidence, worth, strict=True):
        kept = torch.nonzero(part >= 0)[:, 0]
        weight = layer.weight[:, kept]
        if 0 < len(kept) < len(part):
            weight = second_order.refit(layer.weight, layer.gram, kept, damping=REFIT_DAMPING)
        cuts.append(MlpCut(kept, weight))
    return cuts


def at_cost(curve: Sequence[tuple[float, float]], cost: float) -> float:
    """Return the skill's rise where the rest's first reaches `cost`, on the line between two measured points."""
    before = (0.0, 0.0)
    for rest, skill in curve:
        if rest > cost:
            share = (cost - before[0]) / (rest - before[0])
            return before[1] + share * (skill - before[1])
        before = max(before, (rest, skill))
    return before[1]


def tuned(adapter: ModelAdapter, blocks: TokenBlocks) -> ModelAdapter:
    """Return a copy trained on a skill's text for a few steps."""
    again = copy.deepcopy(adapter)
    optimizer = torch.optim.AdamW(again.model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    longest = [block for block in blocks.blocks if len(block) == len(blocks.blocks[0])]
    draw = random.Random(0)
    for _ in range(TUNE_STEPS):
        batch = torch.stack(draw.sample(longest, min(TUNE_ROWS, len(longest))))
        again.model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return again


def forget(
    adapter: ModelAdapter, networks: FunctionalNetworks, texts: dict[str, Text], seen: dict[str, Seen],
    name: str, cost: float, *, tune: bool, note: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """Return for each way the curve, the figure at the cost, and what training brings back there."""
    rest = [other for other in texts if other != name]
    evidence = list(
        EvidencePass(adapter, [b for one in rest for b in texts[one].fitted],
                     protocol.cut_options(0), clock=StageClock())
    )  # fmt: skip
    aside = [batch for one in rest for batch in texts[one].aside]
    dense, skill_dense = mean_loss(adapter, aside), mean_loss(adapter, texts[name].measured)
    found: dict[str, Any] = {}
    for way, drawn in ways(networks, seen[name], [seen[one] for one in rest], 0).items():
        curves, figures = [], []
        for scores in drawn:
            curve: list[tuple[float, float]] = []
            size_within = 0
            for size in SIZES:
                cuts = cuts_of(evidence, networks.by_layer(marked(scores, size)))
                with adapter.trying(cuts):
                    curve.append(
                        (
                            mean_loss(adapter, aside) - dense,
                            mean_loss(adapter, texts[name].measured) - skill_dense,
                        )
                    )
                size_within = size if curve[-1][0] <= cost else size_within
                if curve[-1][0] > 2 * cost:
                    break
            curves.append(curve)
            figures.append(at_cost(curve, cost))
        found[way] = {
            "at cost": statistics.fmean(figures),
            "std": statistics.stdev(figures) if len(figures) > 1 else 0.0,
            "curves": curves,
        }
        if tune and way in (NETWORKS, RATIO) and size_within:
            cut = copy.deepcopy(adapter)
            for layer, one in enumerate(
                cuts_of(evidence, networks.by_layer(marked(drawn[0], size_within)))
            ):
                cut.cut(layer, one)
            back = mean_loss(tuned(cut, texts[name].blocks), texts[name].measured)
            found[way]["trained"] = back - skill_dense
            found[way]["before training"] = mean_loss(cut, texts[name].measured) - skill_dense
        note(f"{name}, {way}: {found[way]['at cost']:.3f}")
    if tune:
        dense_tuned = mean_loss(tuned(adapter, texts[name].blocks), texts[name].measured)
        found["whole model, trained"] = dense_tuned - skill_dense
    return found


def main(
    model: Annotated[str, typer.Option(help="Checkpoint, or builtin.")] = "builtin",
    skill: Annotated[list[str] | None, typer.Option(help="NAME=TEXT,TEXT; repeat.")] = None,
    context: int = 128,
    tokens: Annotated[int, typer.Option(help="Tokens of each skill.")] = 4096,
    networks: int = 64,
    cost: Annotated[float, typer.Option(help="Nats a token that the rest may lose.")] = 0.02,
    tune: Annotated[bool, typer.Option(help="Also train for 50 steps.")] = True,
    output: protocol.Output = None,
) -> None:
    files = {n: tuple(p.split(",")) for n, _, p in (each.partition("=") for each in skill or ())}
    if not files:
        held = builtin.held_out_files()
        files = {n: (str(p), str(held[n])) for n, p in builtin.calibration_files().items()}
    checkpoint = Checkpoint.open(builtin.path_or_id(model))
    tokenizer = checkpoint.load_tokenizer()
    adapter = ModelAdapter(checkpoint.load_model("cpu", torch.float32))
    texts = {name: Text(*pair, tokenizer, context, tokens) for name, pair in files.items()}
    mixed = [block for text in texts.values() for block in text.blocks.blocks]
    random.Random(0).shuffle(mixed)
    sample = TokenBlocks(tuple(mixed), context, tuple(files))
    nets = protocol.find_networks(
        adapter, sample, tokenizer, networks, min(8192, sample.tokens - 1), 0
    )
    seen = {name: Seen(adapter, nets, text.fitted) for name, text in texts.items()}
    facts: dict[str, Any] = {"model": Path(model).name, "cost": cost, "networks": networks}
    for name in texts:
        facts[name] = forget(
            adapter,
            nets,
            texts,
            seen,
            name,
            cost,
            tune=tune,
            note=lambda line: print(line, flush=True),
        )
    kinds = [way for way, value in facts[next(iter(texts))].items() if isinstance(value, dict)]
    table = Table(
        "chosen by", *texts, title=f"rise of the skill's loss where the rest has lost {cost} nats"
    )
    for way in kinds:
        cells = [f"{facts[n][way]['at cost']:.2f} ± {facts[n][way]['std']:.2f}" for n in texts]
        table.add_row(way, *cells)
    if tune:
        for way in (NETWORKS, RATIO):
            cells = [
                "{:.2f} -> {:.2f}".format(facts[n][way]["before training"], facts[n][way]["trained"])
                if "trained" in facts[n][way] else "" for n in texts
            ]  # fmt: skip
            table.add_row(f"{way}, then {TUNE_STEPS} steps", *cells)
        table.add_row(
            "whole model, the same steps",
            *[f"{facts[n]['whole model, trained']:.2f}" for n in texts],
        )
    Console(width=150).print(table)
    protocol.save_json(output, facts)


if __name__ == "__main__":
    torch.set_num_threads(1)
    typer.run(main)
