"""Print what removing a skill costs the rest, by how its neurons are chosen, and whether training brings it back.

    python eval/quality/forget_table.py
    python eval/quality/forget_table.py --model DIR --skill python=c.txt,h.txt --skill prose=p.txt,q.txt --forget python

Each skill has a text to choose neurons and refit by and a text to measure on. It is removed in turn, and the others are
the rest. A way to choose neurons (`forget_ways.py`) ranks all of them. A growing share of them is cut, the others are
refitted, and the loss is measured on both. The figure of a way is the rise of the skill's loss where the rest has lost
`--cost` nats a token, interpolated on the curve. `erased by the refit` cuts nothing: the refit itself makes the output
on the skill small, and the dial is how much that weighs.
"""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import protocol
import torch
import typer
from forget_ways import RATIO, Refit, Seen, ways
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fbn_prune.data import builtin
from fbn_prune.data.calibration import Batch, TokenBlocks
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.perplexity import mean_loss
from fbn_prune.model.surgery import MlpCut
from fbn_prune.networks.forgetting import marked
from fbn_prune.networks.functional_networks import FunctionalNetworks

BATCH_TOKENS = 1024
SMALLEST, STEPS = 1 / 512, 9
"""The shares of neurons to cut are SMALLEST * 2**n, up to a half."""
ERASED, ERASED_SHARE = "erased by the refit", 1 / 64
FIRST_WEIGHT, WEIGHT_STEPS = 0.01, 4
"""Weights to erase with are FIRST_WEIGHT * 10 ** (n / 2), with n below WEIGHT_STEPS."""


class Text:
    """One skill: blocks to choose and refit by, and batches to measure on."""

    def __init__(
        self, own: str, measured: str, tokenizer: Any, context: int, tokens: int, held: int
    ) -> None:
        blocks = protocol.first_blocks(Path(own), tokenizer, context, tokens // context)
        self.blocks = TokenBlocks(tuple(blocks), context, (own,))
        self.batches = self.blocks.batches(BATCH_TOKENS)
        last = protocol.first_blocks(Path(measured), tokenizer, context, held // context)
        self.measured = TokenBlocks(tuple(last), context, (measured,)).batches(BATCH_TOKENS)


class Trials:
    """A model with a skill to remove, and the losses of the whole model."""

    def __init__(
        self, adapter: ModelAdapter, networks: FunctionalNetworks, texts: dict[str, Text], name: str
    ) -> None:
        self.adapter, self.networks = adapter, networks
        self.rest: list[Batch] = [b for n, t in texts.items() if n != name for b in t.measured]
        self.skill = texts[name].measured
        self.dense = (mean_loss(adapter, self.rest), mean_loss(adapter, self.skill))

    def rises(self, refit: Refit, scores: Tensor, share: float) -> tuple[float, float]:
        """Return what the loss of the rest and of the skill rises by without the first neurons."""
        gone = marked(scores, round(share * len(scores))) < 0
        with self.adapter.trying(refit.cuts(self.networks.by_layer(gone))):
            return (
                mean_loss(self.adapter, self.rest) - self.dense[0],
                mean_loss(self.adapter, self.skill) - self.dense[1],
            )

    def curve(self, refit: Refit, scores: Tensor, cost: float) -> list[list[float]]:
        """Return share, rise of the rest and of the skill, for the shares around the one that costs `cost`."""
        found: dict[int, list[float]] = {}
        step = 3
        while step not in found and 0 <= step < STEPS:
            share = SMALLEST * 2**step
            found[step] = [share, *self.rises(refit, scores, share)]
            step += 1 if found[step][1] <= cost else -1
        return [found[step] for step in sorted(found)]


def at_cost(curve: Sequence[Sequence[float]], cost: float) -> float:
    """Return the skill's rise where the rest's first reaches `cost`, on the line between two measured points."""
    before = (0.0, 0.0)
    for _, rest, skill in curve:
        if rest > cost:
            share = (cost - before[0]) / (rest - before[0])
            return before[1] + share * (skill - before[1])
        before = (rest, skill)  # the rest's loss need not rise from point to point
    return before[1]


def tuned(
    adapter: ModelAdapter, blocks: TokenBlocks, rows: int, steps: int, rate: float
) -> ModelAdapter:
    """Return a copy whose layers are trained on a skill's text for a few steps, with weights kept in float32."""
    again = copy.deepcopy(adapter)
    again.model.requires_grad_(False)
    for one in again.layers.parameters():
        one.requires_grad_(True)
    weights = protocol.ExactWeights(again.layers.parameters())
    optimizer = torch.optim.AdamW(weights.exact, lr=rate, weight_decay=0.0)
    draw = random.Random(0)
    for _ in range(steps):
        batch = torch.stack(draw.sample(blocks.blocks, min(rows, len(blocks.blocks))))
        again.model(input_ids=batch, labels=batch).loss.backward()
        weights.step(optimizer)
    return again


def forget(
    trials: Trials,
    skill: Seen,
    rest: Seen,
    refit: Refit,
    cost: float,
    only: Sequence[str],
    draws: int,
) -> dict[str, Any]:
    """Return for each way to choose neurons the curves and the figure at the cost."""
    found: dict[str, Any] = {}
    for way, drawn in ways(trials.networks, skill, rest, refit.keep_costs, draws).items():
        if not only or way in only:
            found[way] = _row([trials.curve(refit, scores, cost) for scores in drawn], cost)
            print(f"{way}: {found[way]['at cost']:.3f}", flush=True)
    return found


def erase(
    trials: Trials, skill: Seen, rest: Seen, plain: Refit, cost: float, cutting: Sequence[str]
) -> dict[str, Any]:
    """Return the same for refits that make the skill's output small, alone and with 1 in 64 neurons cut.

    The first number of a point of a curve is the weight of the skill's output.
    """
    adapter, networks = trials.adapter, trials.networks
    every = ways(networks, skill, rest, plain.keep_costs, 1)
    shares = {ERASED: (0.0, every[RATIO][0])}
    shares |= {f"{ERASED}, cut by {way}": (ERASED_SHARE, every[way][0]) for way in cutting}
    curves: dict[str, dict[float, list[float]]] = {name: {} for name in shares}
    tried: set[int] = set()
    step = 0
    while step not in tried and abs(step) < WEIGHT_STEPS:
        weight = FIRST_WEIGHT * 10 ** (step / 2)
        refit = Refit(adapter, rest.grams, rest.tokens, skill.grams, weight)
        for name, (share, scores) in shares.items():
            point = [weight, *trials.rises(refit, scores, share)]
            curves[name][weight] = point
            print(f"{name}: {point}", flush=True)
        tried.add(step)
        step += 1 if curves[ERASED][weight][1] <= cost else -1
    return {name: _row([[c[w] for w in sorted(c)]], cost) for name, c in curves.items()}


def _row(curves: list[list[list[float]]], cost: float) -> dict[str, Any]:
    figures = [at_cost(curve, cost) for curve in curves]
    spread = statistics.stdev(figures) if len(figures) > 1 else 0.0
    return {"at cost": statistics.fmean(figures), "std": spread, "curves": curves}


def cuts_within(
    trials: Trials, skill: Seen, rest: Seen, plain: Refit, found: dict[str, Any], cost: float,
    chosen: Sequence[str],
) -> dict[str, tuple[list[float], list[MlpCut]]]:  # fmt: skip
    """Return the last measured point of each row within the cost, and the cuts of the model there."""
    result: dict[str, tuple[list[float], list[MlpCut]]] = {}
    every = {n: d[0] for n, d in ways(trials.networks, skill, rest, plain.keep_costs, 1).items()}
    for name in chosen:
        within = [point for point in found[name]["curves"][0] if point[1] <= cost]
        if not within:
            print(f"{name}: no measured model is within {cost} nats", flush=True)
            continue
        dial = within[-1][0]
        erased, _, way = name.partition(", cut by ") if name.startswith(ERASED) else ("", "", name)
        refit = (
            Refit(trials.adapter, rest.grams, rest.tokens, skill.grams, dial) if erased else plain
        )
        share = (ERASED_SHARE if way else 0.0) if erased else dial
        scores = every[way or RATIO]
        gone = marked(scores, round(share * len(scores))) < 0
        result[name] = within[-1], refit.cuts(trials.networks.by_layer(gone))
    return result


def relearned(
    trials: Trials, text: Text, cuts: dict[str, tuple[list[float], list[MlpCut]]], rows: int, steps: int,
    rate: float,
) -> dict[str, Any]:  # fmt: skip
    """Return the rise of the skill's loss before and after training of the models with these cuts."""
    result: dict[str, Any] = {"steps": steps, "rate": rate}
    for name, (point, of_layers) in cuts.items():
        cut = copy.deepcopy(trials.adapter)
        for layer, one in enumerate(of_layers):
            cut.cut(layer, one)
        after = (
            mean_loss(tuned(cut, text.blocks, rows, steps, rate), trials.skill) - trials.dense[1]
        )
        result[name] = {"dial": point[0], "rest": point[1], "before": point[2], "after": after}
        print(f"{name}: {result[name]}", flush=True)
    whole = tuned(trials.adapter, text.blocks, rows, steps, rate)
    result["whole model"] = mean_loss(whole, trials.skill) - trials.dense[1]
    print(f"whole model after training: {result['whole model']:.3f}", flush=True)
    return result


def main(
    model: Annotated[str, typer.Option(help="Checkpoint, or builtin.")] = "builtin",
    skill: Annotated[list[str] | None, typer.Option(help="NAME=TEXT,TEXT; repeat.")] = None,
    forgotten: Annotated[
        list[str] | None, typer.Option("--forget", help="Only these skills; repeat.")
    ] = None,
    context: int = 128,
    tokens: Annotated[int, typer.Option(help="Tokens of each skill to fit on.")] = 3072,
    held: Annotated[int, typer.Option(help="Tokens of each skill to measure on.")] = 1024,
    networks: int = 64,
    network_tokens: Annotated[int, typer.Option(help="Tokens to find networks on.")] = 8192,
    cost: Annotated[float, typer.Option(help="Nats a token that the rest may lose.")] = 0.02,
    erase_with: Annotated[
        list[str] | None, typer.Option(help="Also cut neurons by this way when erasing; repeat.")
    ] = None,
    way: Annotated[list[str] | None, typer.Option(help="Only these ways; repeat.")] = None,
    draws: Annotated[int, typer.Option(help="Random rotations and orders.")] = 5,
    tune: Annotated[
        list[str] | None, typer.Option(help="Rows to train again for a few steps; repeat.")
    ] = None,
    tune_cost: Annotated[
        float | None, typer.Option(help="Train the last model within this cost. Default: --cost.")
    ] = None,
    tune_steps: Annotated[int, typer.Option(help="Steps of that training.")] = 50,
    tune_rate: Annotated[float, typer.Option(help="Learning rate of that training.")] = 1e-4,
    rows: Annotated[int, typer.Option(help="Blocks of a training step.")] = 8,
    dtype: Annotated[str, typer.Option(help="Type that the model computes in.")] = "float32",
    output: protocol.Output = None,
) -> None:  # fmt: skip
    start = time.monotonic()
    files: dict[str, tuple[str, str]] = {}
    for name, _, both in (each.partition("=") for each in skill or ()):
        fit, _, measured = both.partition(",")
        files[name] = (fit, measured)
    if not files:
        last = builtin.held_out_files()
        files = {n: (str(p), str(last[n])) for n, p in builtin.calibration_files().items()}
    checkpoint = Checkpoint.open(builtin.path_or_id(model))
    tokenizer = checkpoint.load_tokenizer()
    adapter = ModelAdapter(checkpoint.load_model("cpu", getattr(torch, dtype)))
    texts = {name: Text(*pair, tokenizer, context, tokens, held) for name, pair in files.items()}
    mixed = [block for text in texts.values() for block in text.blocks.blocks]
    random.Random(0).shuffle(mixed)
    sample = TokenBlocks(tuple(mixed), context, tuple(files))
    nets = protocol.find_networks(
        adapter, sample, tokenizer, networks, min(network_tokens, sample.tokens - 1), 0
    )
    print(f"networks after {time.monotonic() - start:.0f} s", flush=True)
    facts: dict[str, Any] = {"model": Path(model).name, "cost": cost, "networks": networks,
                             "tokens": tokens, "held": held, "dtype": dtype, "skills": {}}  # fmt: skip
    wanted = forgotten or list(texts)
    for name in wanted:
        own = Seen(adapter, nets, texts[name].batches)
        others = Seen(adapter, nets, [b for n, t in texts.items() if n != name for b in t.batches])
        trials = Trials(adapter, nets, texts, name)
        print(f"{name}: whole model {trials.dense}, {time.monotonic() - start:.0f} s", flush=True)
        plain = Refit(adapter, others.grams, others.tokens)
        found = erase(trials, own, others, plain, cost, erase_with or ())
        facts["skills"][name] = {"dense": trials.dense, "ways": found}
        protocol.save_json(output, facts)
        found |= forget(trials, own, others, plain, cost, way or (), draws)
        protocol.save_json(output, facts)
        if tune:
            within = cost if tune_cost is None else tune_cost
            cuts = cuts_within(trials, own, others, plain, found, within, tune)
            del own, others, plain  # training needs their memory
            facts["skills"][name]["relearned"] = relearned(
                trials, texts[name], cuts, rows, tune_steps, tune_rate
            )
        facts["seconds"] = time.monotonic() - start
        protocol.save_json(output, facts)
    show(facts, wanted)


def show(facts: dict[str, Any], names: Sequence[str]) -> None:
    title = f"rise of the skill's loss where the rest has lost {facts['cost']} nats"
    table = Table("chosen by", *names, "mean share of the best", title=title)
    skills = [facts["skills"][name]["ways"] for name in names]
    best = [max(row["at cost"] for row in one.values()) for one in skills]
    for way in skills[0]:
        values = [one[way] for one in skills]
        share = statistics.fmean(v["at cost"] / b for v, b in zip(values, best, strict=True))
        cells = [f"{v['at cost']:.2f} ± {v['std']:.2f}" for v in values]
        table.add_row(way, *cells, f"{share:.2f}")
    Console(width=150).print(table)


if __name__ == "__main__":
    torch.set_num_threads(1)
    typer.run(main)
