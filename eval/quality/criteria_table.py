"""Print perplexity of every criterion at equal budgets, and the size dial, for any model and text.

    python eval/quality/criteria_table.py --model DIR --calibrate a.txt --calibrate b.txt --evaluate c.txt

All criteria see one pass over one calibration sample. Blocks for calibration are drawn from the first blocks of each
text, those for evaluation are its first ones; perplexity is over all evaluation tokens together, in float32.
Widths are the same in every layer, except under `network widths` (`--layout ragged --widths networks`), `+ loss-aware`
(the same, errors scored as the loss feels them), `loss widths` and `auto widths` (`--widths loss` and `auto`, scored
so too), which keep exactly as many neurons in all; how far each goes from an even split is tried on calibration text.
`uniform, loss-aware` is what their scoring alone does. `membership, global` is the published procedure instead: one
threshold over all layers, no refit, shown by silencing the neurons of the dense model.
"""

from __future__ import annotations

import copy
import json
import random
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from fbn_prune.data.calibration import TokenBlocks, tokenize_document
from fbn_prune.data.documents import read_documents
from fbn_prune.errors import InvalidInput
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.perplexity import perplexity
from fbn_prune.model.surgery import MlpCut
from fbn_prune.networks.discovery import DiscoveryOptions, discover
from fbn_prune.networks.functional_networks import FunctionalNetworks
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
from fbn_prune.pruning.evidence import CutOptions, EvidencePass
from fbn_prune.pruning.layout import Layout, LayoutRequest, Subject, choose_layout
from fbn_prune.pruning.second_order import loss_root
from fbn_prune.pruning.sensitivity import output_sensitivity

BATCH_TOKENS = 4096
GRADIENT_BATCH_TOKENS = 1024
RAGGED = {
    "network widths": ("networks", False),
    "+ loss-aware": ("networks", True),
    "loss widths": ("loss", True),
    "auto widths": ("auto", True),
}
"""What `--widths` says, and whether errors are scored as the loss feels them."""

UNIFORM_AWARE = "uniform, loss-aware"
SCORED_BY_LOSS = {name: aware for name, (_, aware) in RAGGED.items()} | {UNIFORM_AWARE: True}


class Comparison:
    """One model, one calibration sample, one evaluation sample, one set of networks."""

    def __init__(
        self,
        model: Path,
        calibrate: list[Path],
        evaluate: list[Path],
        *,
        context: int,
        blocks: int,
        evaluation_blocks: int,
        first: int,
        networks: int,
        network_tokens: int,
        multiple: int,
        seed: int,
    ) -> None:
        checkpoint = Checkpoint.open(model)
        self.adapter = ModelAdapter(checkpoint.load_model("cpu", torch.float32))
        self.multiple, self.seed = multiple, seed
        self.layouts: dict[tuple[str, int], Layout] = {}
        context = min(context, checkpoint.family.context_length(checkpoint.config))
        tokenizer = checkpoint.load_tokenizer()
        draw = random.Random(seed)
        sample: list[torch.Tensor] = []
        for file in calibrate:
            found = first_blocks(file, tokenizer, context, first)
            sample += draw.sample(found, min(blocks, len(found)))
        draw.shuffle(sample)
        held = [
            b
            for file in evaluate
            for b in first_blocks(file, tokenizer, context, evaluation_blocks)
        ]
        self.calibration = TokenBlocks(tuple(sample), context, tuple(map(str, calibrate)))
        self.held_out = TokenBlocks(tuple(held), context, tuple(map(str, evaluate)))
        self.batches = self.calibration.batches(BATCH_TOKENS)
        self.held_out_batches = self.held_out.batches(BATCH_TOKENS)
        self.full = self.adapter.widths
        self.networks: FunctionalNetworks = discover(
            self.adapter,
            self.calibration,
            DiscoveryOptions(networks, network_tokens, "global", seed),
            tokenizer=tokenizer,
            batch_tokens=BATCH_TOKENS,
            keep=True,
            header={},
            clock=StageClock(),
        )
        self.order = strongest_first(output_energy(self.networks, self.adapter.down_weights()))

    def options(self, *, sequential: bool = False) -> CutOptions:
        return CutOptions(sequential, 1e-2, 1e-3, self.seed, torch.float32)

    def membership(self, kept: list[int]) -> list[torch.Tensor]:
        strongest = self.networks.maps[kept].abs().amax(0).double()
        return [strongest[self.networks.layer_slice(i)] for i in range(len(self.full))]

    def widths(self, budget: int) -> list[int]:
        return uniform_widths(budget, self.full, self.multiple)

    def one_shot(
        self, wanted: list[tuple[str, int]], kept: list[int]
    ) -> dict[tuple[str, int], float]:
        """Perplexity for each (criterion, budget), from one pass over the calibration sample."""
        evidence = EvidencePass(self.adapter, self.batches, self.options(), clock=StageClock())
        members = self.membership(kept)
        cuts: dict[tuple[str, int], list[MlpCut]] = {key: [] for key in wanted}
        for layer in evidence:
            layer = replace(layer, membership=members[layer.layer])
            for criterion, budget in wanted:
                width = self.widths(budget)[layer.layer]
                cuts[criterion, budget].append(CRITERIA[criterion](layer, width))
        return {key: self.cut_perplexity(parts) for key, parts in cuts.items()}

    def ragged(self, budgets: list[int]) -> dict[tuple[str, int], float]:
        """Perplexity for each (rule for ragged widths, budget); as many neurons as uniform widths keep."""
        small = self.calibration.batches(GRADIENT_BATCH_TOKENS)
        sensitivity = output_sensitivity(self.adapter, small, StageClock())
        roots = [loss_root(matrix) for matrix in sensitivity]
        cuts: dict[tuple[str, int], list[MlpCut]] = {}
        for name, (rule, loss_aware) in RAGGED.items():
            subject = Subject(
                self.adapter,
                self.calibration,
                BATCH_TOKENS,
                "second-order",
                replace(self.options(), loss_aware=loss_aware),
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
        evidence = EvidencePass(
            self.adapter,
            self.batches,
            self.options(),
            loss_roots=roots,
            clock=StageClock(),
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
            return perplexity(self.adapter, self.held_out_batches)

    def sequential(self, budget: int) -> float:
        adapter = copy.deepcopy(self.adapter)
        cut_layers(
            adapter,
            self.batches,
            CutPlan("second-order", self.widths(budget)),
            self.options(sequential=True),
            clock=StageClock(),
        )
        return perplexity(adapter, self.held_out_batches)

    def membership_global(self, budget: int, kept: list[int]) -> float:
        strongest = torch.cat(self.membership(kept))
        silent = torch.ones(len(strongest), dtype=torch.bool)
        silent[torch.argsort(strongest, descending=True, stable=True)[:budget]] = False
        masks = [silent[self.networks.layer_slice(i)] for i in range(len(self.full))]
        with masked(self.adapter, masks):
            return perplexity(self.adapter, self.held_out_batches)


def first_blocks(file: Path, tokenizer: Any, context: int, count: int) -> list[torch.Tensor]:
    """The first `count` whole blocks of a text."""
    blocks: list[torch.Tensor] = []
    for document in read_documents(str(file), characters=count * context * 12):
        blocks += [
            block
            for block in tokenize_document(tokenizer, document, context)
            if len(block) == context
        ]
    if not blocks:
        raise InvalidInput(f"{file} gives no block of {context} tokens")
    return blocks[:count]


def main(
    model: Annotated[Path, typer.Option(help="Checkpoint folder.")],
    calibrate: Annotated[list[Path], typer.Option(help="Calibration text; repeat for several.")],
    evaluate: Annotated[list[Path], typer.Option(help="Evaluation text; repeat for several.")],
    kept: Annotated[list[float], typer.Option(help="Shares of neurons kept.")] = [0.7, 0.5, 0.3],  # noqa: B006
    dial: Annotated[list[int], typer.Option(help="Networks kept.")] = [5, 10, 20, 40],  # noqa: B006
    context: Annotated[int, typer.Option()] = 256,
    blocks: Annotated[int, typer.Option(help="Calibration blocks of each text.")] = 32,
    evaluation_blocks: Annotated[int, typer.Option(help="First blocks of each text.")] = 32,
    dial_blocks: Annotated[int, typer.Option(help="Calibration blocks for the size dial.")] = 24,
    first: Annotated[int, typer.Option(help="Calibration blocks are drawn from these.")] = 400,
    networks: Annotated[int, typer.Option()] = 64,
    network_tokens: Annotated[int, typer.Option()] = 6144,
    multiple: Annotated[int, typer.Option(help="Width multiple.")] = 1,
    sequential: Annotated[bool, typer.Option(help="Add the sequential refit.")] = False,
    seed: Annotated[int, typer.Option()] = 0,
    output: Annotated[Path | None, typer.Option(help="Also write JSON here.")] = None,
) -> None:
    common: dict[str, Any] = {
        "context": context,
        "evaluation_blocks": evaluation_blocks,
        "first": first,
        "networks": networks,
        "network_tokens": network_tokens,
        "multiple": multiple,
        "seed": seed,
    }
    names = ["second-order", "flap", "wanda", "membership", "magnitude", "random"]
    console = Console(width=140)
    run = Comparison(model, calibrate, evaluate, blocks=blocks, **common)
    total = sum(run.full)
    dense = perplexity(run.adapter, run.held_out_batches)
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
        run = Comparison(model, calibrate, evaluate, blocks=dial_blocks, **common)
        dense = perplexity(run.adapter, run.held_out_batches)
        table = Table(
            "K",
            "neurons kept",
            "uniform widths",
            *SCORED_BY_LOSS,
            "membership alone",
            title=f"size dial of {networks}",
        )
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
    if output is not None:
        texts = {"calibrate": calibrate, "evaluate": evaluate}
        # In their order: the draw goes through them one after the other.
        named = {key: [file.name for file in files] for key, files in texts.items()}
        facts = {"model": model.name, "dense": dense, **named, **common, "blocks": blocks}
        output.write_text(
            json.dumps({**facts, "budgets": rows, "dial": dial_rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    typer.run(main)
