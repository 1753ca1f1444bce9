"""Print the perplexity of every criterion at equal budgets, and the size dial, for any model and text.

    python eval/quality/criteria_table.py --model DIR --calibrate a.txt --calibrate b.txt --evaluate c.txt

All criteria use one pass over one calibration sample (see `protocol.py`); perplexity is over all evaluation tokens in
float32. All layers have the same width except under `network widths` (`--layout ragged --widths networks`),
`+ loss-aware` (the same with loss-aware scores), `loss widths` and `auto widths` (`--widths loss` and `auto`, also
loss-aware), which keep exactly as many neurons in total; calibration text decides how far they go from even widths.
`uniform, loss-aware` shows the effect of loss-aware scores alone. `membership, global` is the published procedure: one
threshold over all layers and no refit, measured by masking neurons of the dense model.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import protocol
import torch
import typer
from rich.console import Console
from rich.table import Table

from fbn_prune.model.perplexity import perplexity
from fbn_prune.model.surgery import MlpCut
from fbn_prune.networks.interventions import masked
from fbn_prune.networks.ranking import output_energy, strongest_first
from fbn_prune.progress import StageClock
from fbn_prune.pruning.allocation import (
    budget_from_networks,
    budget_from_sparsity,
    uniform_widths,
)
from fbn_prune.pruning.criteria import CRITERIA, cuts_to_widths
from fbn_prune.pruning.cutting import CutPlan, cut_layers
from fbn_prune.pruning.evidence import EvidencePass
from fbn_prune.pruning.layout import Layout, LayoutRequest, Subject, choose_layout
from fbn_prune.pruning.second_order import loss_root
from fbn_prune.pruning.sensitivity import output_sensitivity

GRADIENT_BATCH_TOKENS = 1024
RAGGED = {
    "network widths": ("networks", False),
    "+ loss-aware": ("networks", True),
    "loss widths": ("loss", True),
    "auto widths": ("auto", True),
}
"""The value of `--widths`, and whether the scores are loss-aware."""

UNIFORM_AWARE = "uniform, loss-aware"
SCORED_BY_LOSS = {name: aware for name, (_, aware) in RAGGED.items()} | {UNIFORM_AWARE: True}


class Comparison:
    """The criteria on one model, one sample of text and one set of networks."""

    def __init__(
        self, sample: protocol.Sample, networks: int, network_tokens: int, multiple: int, seed: int
    ) -> None:
        self.sample, self.adapter = sample, sample.adapter
        self.multiple, self.seed = multiple, seed
        self.layouts: dict[tuple[str, int], Layout] = {}
        self.batches = sample.batches
        self.full = self.adapter.widths
        self.networks = protocol.find_networks(
            self.adapter, sample.calibration, sample.tokenizer, networks, network_tokens, seed
        )
        self.order = strongest_first(output_energy(self.networks, self.adapter.down_weights()))

    def membership(self, kept: list[int]) -> list[torch.Tensor]:
        strongest = self.networks.maps[kept].abs().amax(0).double()
        return [strongest[self.networks.layer_slice(i)] for i in range(len(self.full))]

    def widths(self, budget: int) -> list[int]:
        return uniform_widths(budget, self.full, self.multiple)

    def one_shot(
        self, wanted: list[tuple[str, int]], kept: list[int]
    ) -> dict[tuple[str, int], float]:
        """Return the perplexity for each (criterion, budget), from one pass over the calibration sample."""
        evidence = EvidencePass(
            self.adapter, self.batches, protocol.cut_options(self.seed), clock=StageClock()
        )
        members = self.membership(kept)
        cuts: dict[tuple[str, int], list[MlpCut]] = {key: [] for key in wanted}
        for layer in evidence:
            layer = replace(layer, membership=members[layer.layer])
            for criterion, budget in wanted:
                width = self.widths(budget)[layer.layer]
                cuts[criterion, budget].append(CRITERIA[criterion](layer, width))
        return {key: self.cut_perplexity(parts) for key, parts in cuts.items()}

    def ragged(self, budgets: list[int]) -> dict[tuple[str, int], float]:
        """Return the perplexity for each (rule for ragged widths, budget), with as many neurons as uniform widths."""
        small = self.sample.calibration.batches(GRADIENT_BATCH_TOKENS)
        sensitivity = output_sensitivity(self.adapter, small, StageClock())
        roots = [loss_root(matrix) for matrix in sensitivity]
        cuts: dict[tuple[str, int], list[MlpCut]] = {}
        for name, (rule, loss_aware) in RAGGED.items():
            subject = Subject(
                self.adapter,
                self.sample.calibration,
                protocol.BATCH_TOKENS,
                "second-order",
                protocol.cut_options(self.seed, loss_aware=loss_aware),
                self.networks,
                self.order,
                roots,
                Path(tempfile.gettempdir()),
            )
            for budget in budgets:
                request = LayoutRequest(
                    layout="ragged",
                    rule=rule,
                    budget=sum(self.widths(budget)),
                    most=False,
                    full=tuple(self.full),
                    multiple=self.multiple,
                )
                self.layouts[name, budget] = choose_layout(subject, request, StageClock())
                cuts[name, budget] = []
        options = protocol.cut_options(self.seed)
        evidence = EvidencePass(
            self.adapter, self.batches, options, loss_roots=roots, clock=StageClock()
        )
        cuts |= {(UNIFORM_AWARE, budget): [] for budget in budgets}
        for layer in evidence:
            for seen in (layer, replace(layer, loss_root=None)):
                widths = {
                    key: self.widths(key[1])
                    if key[0] == UNIFORM_AWARE
                    else self.layouts[key].widths
                    for key in cuts
                    if SCORED_BY_LOSS[key[0]] == (seen.loss_root is not None)
                }
                wanted = {by_layer[layer.layer] for by_layer in widths.values()}
                made = cuts_to_widths("second-order", seen, wanted)
                for key, by_layer in widths.items():
                    cuts[key].append(made[by_layer[layer.layer]])
        return {key: self.cut_perplexity(parts) for key, parts in cuts.items()}

    def cut_perplexity(self, cuts: list[MlpCut]) -> float:
        with self.adapter.trying(cuts):
            return perplexity(self.adapter, self.sample.held_out)

    def sequential(self, budget: int) -> float:
        adapter = copy.deepcopy(self.adapter)
        plan = CutPlan("second-order", self.widths(budget))
        options = protocol.cut_options(self.seed, sequential=True)
        cut_layers(adapter, self.batches, plan, options, clock=StageClock())
        return perplexity(adapter, self.sample.held_out)

    def membership_global(self, budget: int, kept: list[int]) -> float:
        strongest = torch.cat(self.membership(kept))
        silent = torch.ones(len(strongest), dtype=torch.bool)
        silent[torch.argsort(strongest, descending=True, stable=True)[:budget]] = False
        masks = [silent[self.networks.layer_slice(i)] for i in range(len(self.full))]
        with masked(self.adapter, masks):
            return perplexity(self.adapter, self.sample.held_out)


def main(
    model: protocol.Model,
    calibrate: protocol.Calibrate,
    evaluate: protocol.Evaluate,
    kept: Annotated[list[float], typer.Option(help="Shares of neurons kept.")] = [0.7, 0.5, 0.3],  # noqa: B006
    dial: Annotated[list[int], typer.Option(help="Networks kept.")] = [5, 10, 20, 40],  # noqa: B006
    context: protocol.Context = 256,
    blocks: protocol.Blocks = 32,
    evaluation_blocks: protocol.EvaluationBlocks = 32,
    dial_blocks: Annotated[int, typer.Option(help="Calibration blocks for the size dial.")] = 24,
    first: protocol.First = 400,
    networks: int = 64,
    network_tokens: int = 6144,
    multiple: Annotated[int, typer.Option(help="Width multiple.")] = 1,
    sequential: Annotated[bool, typer.Option(help="Add the sequential refit.")] = False,
    seed: int = 0,
    output: protocol.Output = None,
) -> None:
    drawn = {"context": context, "evaluation_blocks": evaluation_blocks, "first": first}
    search = {"networks": networks, "network_tokens": network_tokens, "multiple": multiple}

    def compared(blocks: int) -> Comparison:
        sample = protocol.load_sample(model, calibrate, evaluate, blocks=blocks, seed=seed, **drawn)
        return Comparison(sample, seed=seed, **search)

    names = ["second-order", "flap", "wanda", "membership", "magnitude", "random"]
    console = Console(width=140)
    run = compared(blocks)
    total = sum(run.full)
    dense = perplexity(run.adapter, run.sample.held_out)
    budgets = [budget_from_sparsity(total, 1 - share) for share in kept]
    cells = run.one_shot([(name, b) for name in names for b in budgets], run.order)
    cells |= run.ragged(budgets)
    names += SCORED_BY_LOSS
    headings = [*names, "membership, global", *(["sequential"] if sequential else [])]
    table = Table("kept", *headings, title=f"{model.name}: perplexity, dense {dense:.2f}")
    rows: list[dict[str, Any]] = []
    for share, budget in zip(kept, budgets, strict=True):
        row: dict[str, Any] = {"kept": share, "widths": run.widths(budget)}
        row |= {name: cells[name, budget] for name in names}
        row["chosen"] = {name: asdict(run.layouts[name, budget]) for name in RAGGED}
        row["membership, global"] = run.membership_global(budget, run.order)
        if sequential:
            row["sequential"] = run.sequential(budget)
        rows.append(row)
        table.add_row(f"{share:.0%}", *(f"{row[heading]:.2f}" for heading in headings))
    console.print(table)

    dial_rows: list[dict[str, Any]] = []
    if dial:
        run = compared(dial_blocks)
        dense = perplexity(run.adapter, run.sample.held_out)
        columns = ["K", "neurons kept", "uniform widths", *SCORED_BY_LOSS, "membership alone"]
        table = Table(*columns, title=f"size dial of {networks}")
        kept_by = {count: run.order[:count] for count in dial}
        budget_by = {k: budget_from_networks(run.networks, keep) for k, keep in kept_by.items()}
        ragged = run.ragged(list(budget_by.values()))
        for count, budget in budget_by.items():
            keep = kept_by[count]
            cells = {rule: ragged[rule, budget] for rule in SCORED_BY_LOSS}
            (cells["uniform"],) = run.one_shot([("second-order", budget)], keep).values()
            cells["membership"] = run.membership_global(budget, keep)
            dial_rows.append({"K": count, "share": budget / total, **cells})
            shown = [cells[name] for name in ("uniform", *SCORED_BY_LOSS, "membership")]
            table.add_row(str(count), f"{budget / total:.1%}", *(f"{v:.2f}" for v in shown))
        console.print(table)
    # The texts in their order: the draw goes through them one after the other.
    texts = {"calibrate": [f.name for f in calibrate], "evaluate": [f.name for f in evaluate]}
    facts = {"model": model.name, "dense": dense, **texts, **drawn, **search, "seed": seed}
    protocol.save_json(output, {**facts, "blocks": blocks, "budgets": rows, "dial": dial_rows})


if __name__ == "__main__":
    typer.run(main)
