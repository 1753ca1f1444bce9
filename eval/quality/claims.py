"""Print what holds of the papers' claims on functional networks for one model, in one table and one JSON.

    python eval/quality/claims.py --model builtin
    python eval/quality/claims.py --model DIR --text prose=a.txt --text code=b.txt

The claims (arXiv 2502.20408 and 2508.05239): masking one network costs far more than masking random neurons; masking
the top networks destroys the model; retaining them alone preserves it; networks recur over texts, token samples and
seeds, and in a fine-tuned model. Every figure stands beside those of other bases of the same space and of random sets
that are as large in every layer. `refitted` means that the remaining output weights are refitted on that text.
`recurrence_table.py` prints more on the last claim.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import protocol
import torch
import typer
from claims_page import claims_page
from forget_ways import Refit
from recurrence_table import Subject
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fbn_prune.data import builtin
from fbn_prune.data.calibration import Batch, TokenBlocks
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.perplexity import exp_or_infinite, mean_loss
from fbn_prune.networks.activity import time_courses
from fbn_prune.networks.controls import NETWORKS, ROTATIONS, basis_maps, control_bases
from fbn_prune.networks.functional_networks import HUB_Z, FunctionalNetworks
from fbn_prune.networks.intervention_effects import largest, random_like
from fbn_prune.networks.interventions import masked
from fbn_prune.networks.recurrence import STARTS, recurrence, recurrence_between_starts
from fbn_prune.progress import StageClock
from fbn_prune.pruning.damping import outliers

RANDOM_SETS = 20
STRONGEST, GROWN, RECURRENCE, SEEDS, TUNED = (
    "strongest",
    "grown",
    "recurrence",
    "seeds",
    "fine-tuned",
)
PARTS = (STRONGEST, GROWN, RECURRENCE, SEEDS, TUNED)


class Bench:
    """A model with its networks, its statistics, and text to measure on."""

    def __init__(
        self,
        on: Subject,
        model: Any,
        networks: FunctionalNetworks,
        half: TokenBlocks,
        held: list[Batch],
        *,
        refitted: bool,
    ):
        self.adapter, self.networks, self.held = ModelAdapter(model), networks, held
        batches = half.batches(protocol.BATCH_TOKENS)
        self.batches = batches
        grams = [torch.zeros(width, width) for width in networks.widths]

        def watch(layer: int, index: int, z: Tensor) -> None:
            span = networks.layer_slice(layer)
            x = z * networks.std[span] + networks.mean[span]
            grams[layer].addmm_(x.T, x)

        self.courses = torch.cat(time_courses(self.adapter, networks, batches, StageClock(), watch))
        count = len(self.courses)
        self.massive = torch.cat([outliers(gram) for gram in grams])
        """Neurons with massive activations, bool [N]."""
        self.refit = None
        if refitted:
            self.refit = Refit(self.adapter, [gram / count for gram in grams], count)
        self.dense = mean_loss(self.adapter, held)

    def bare(self, silent: Tensor) -> float:
        """Return the rise of the loss with these neurons silent, bool [N]; in nats a token."""
        with masked(self.adapter, self.networks.by_layer(silent)):
            return mean_loss(self.adapter, self.held) - self.dense

    def refitted(self, silent: Tensor) -> float:
        """Return the same with the output weights of the other neurons refitted."""
        assert self.refit is not None
        with self.adapter.trying(self.refit.cuts(self.networks.by_layer(silent))):
            return mean_loss(self.adapter, self.held) - self.dense


def strongest_first(bench: Bench, maps: Tensor, moment: Tensor) -> list[int]:
    """Return the order of maps by the output energy that they carry."""
    energy = torch.zeros(len(maps), dtype=torch.float64)
    networks = bench.networks
    for layer, weight in enumerate(bench.adapter.down_weights()):
        span = networks.layer_slice(layer)
        energy += (weight.float() @ (maps[:, span] * networks.std[span]).T).double().square().sum(0)
    return torch.argsort(energy * moment, descending=True).tolist()


def spread(values: Sequence[float]) -> dict[str, float]:
    many = len(values) > 1
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if many else 0.0}


Orders = dict[str, list[tuple[Tensor, list[int]]]]
"""Basis -> for each draw its maps and their order, strongest first."""


def orders_of(bench: Bench, draws: int) -> Orders:
    networks = bench.networks
    bases = control_bases(bench.courses)
    bases[ROTATIONS] = bases[ROTATIONS][:draws]
    orders: Orders = {}
    for name, drawn in bases.items():
        turned = [
            (basis_maps(networks.maps, b), (bench.courses @ b).square().mean(0)) for b in drawn
        ]
        orders[name] = [(maps, strongest_first(bench, maps, moment)) for maps, moment in turned]
    return orders


def strongest_network(
    bench: Bench, orders: Orders, draws: int, generator: torch.Generator
) -> dict[str, Any]:
    """Return the rise of the loss without the strongest network, beside random sets and its massive neurons alone."""
    networks = bench.networks
    rises = {n: bench.bare(networks.hubs(n)) for n in orders[NETWORKS][0][1][:16]}
    strongest = max(rises, key=rises.__getitem__)
    hubs = networks.hubs(strongest)
    massive = hubs & bench.massive
    sets = [torch.cat(random_like(networks.by_layer(hubs), generator)) for _ in range(RANDOM_SETS)]
    found = {
        "network": strongest,
        "neurons": int(hubs.sum()),
        "rise": rises[strongest],
        "random": spread([bench.bare(one) for one in sets]),
        "massive": {
            "neurons": int(massive.sum()),
            "alone": bench.bare(massive),
            "without": bench.bare(hubs & ~massive),
        },
        "first 16, without massive": {
            str(n): bench.bare(networks.hubs(n) & ~bench.massive) for n in rises
        },
    }
    if bench.refit is not None:
        found["refitted"] = bench.refitted(hubs)
        found["refitted without massive"] = bench.refitted(hubs & ~massive)
        found["random refitted"] = spread([bench.refitted(one) for one in sets[:draws]])
    return found


def grown_sets(
    bench: Bench, orders: Orders, sizes: Sequence[int], draws: int, generator: torch.Generator
) -> dict[str, Any]:
    """Return the rise of the loss for growing sets of the strongest maps, masked and retained."""
    networks, found = bench.networks, dict[str, Any]()
    _, order = orders[NETWORKS][0]
    ways = {"bare": bench.bare, "refitted": bench.refitted}
    if bench.refit is None:
        del ways["refitted"]
    for size in sizes:
        union = networks.union(order[:size], HUB_Z)
        count = int(union.sum())
        chosen = {
            name: [largest(maps[order[:size]].abs().amax(0), count) for maps, order in each]
            for name, each in orders.items()
        }
        chosen[NETWORKS] = [union]
        chosen["random sets"] = [
            torch.cat(random_like(networks.by_layer(union), generator)) for _ in range(draws)
        ]
        found[str(size)] = {
            "neurons": count,
            **{
                f"{act}, {how}": {
                    name: spread([measure(one if act == "masked" else ~one) for one in sets])
                    for name, sets in chosen.items()
                }
                for act in ("masked", "retained")
                for how, measure in ways.items()
            },
        }
        print(f"top {size}: {found[str(size)]}", flush=True)
    return found


def main(
    model: Annotated[str, typer.Option(help="Checkpoint folder, or builtin.")] = "builtin",
    text: Annotated[list[str] | None, typer.Option(help="NAME=FILE; repeat for several.")] = None,
    finetune_on: Annotated[
        str | None, typer.Option(help="Name of a text. Default: the first.")
    ] = None,
    steps: int = 24,
    context: protocol.Context = 128,
    tokens: Annotated[int, typer.Option(help="Tokens that networks are found on.")] = 8192,
    networks: int = 64,
    grow: Annotated[str, typer.Option(help="Sizes of growing sets.")] = "1,4,16,32",
    measured: Annotated[int | None, typer.Option(help="Tokens to measure on.")] = None,
    draws: Annotated[int, typer.Option(help="Random rotations and sets of growing size.")] = 5,
    part: Annotated[
        list[str] | None, typer.Option(help=f"Only these of {', '.join(PARTS)}; repeat.")
    ] = None,
    bare: Annotated[bool, typer.Option("--bare", help="Without refits.")] = False,
    dtype: Annotated[str, typer.Option(help="Type that the model computes in.")] = "float32",
    html: Annotated[Path | None, typer.Option(help="Also write a page with figures here.")] = None,
    output: protocol.Output = None,
) -> None:
    texts = {n: Path(p) for n, _, p in (entry.partition("=") for entry in text or ())}
    texts = texts or dict(builtin.calibration_files())
    names = list(texts)
    path = builtin.path_or_id(model)
    on = Subject(Path(path), texts, context=context, tokens=tokens, networks=networks)
    trained = on.checkpoint.load_model(torch.device("cpu"), getattr(torch, dtype))
    parts = part or list(PARTS)
    first, second = on.sample(names, 0), on.sample(names, 1)
    base = on.found(trained, first)
    facts: dict[str, Any] = {"model": Path(model).name, "tokens": tokens, "networks": networks}
    if {STRONGEST, GROWN} & set(parts):
        held = second.subset(measured or tokens // 2).batches(protocol.BATCH_TOKENS)
        bench = Bench(on, trained, base, first, held, refitted=not bare)
        facts["perplexity"] = exp_or_infinite(bench.dense)
        orders = orders_of(bench, draws)
        generator = torch.Generator().manual_seed(0)
        if STRONGEST in parts:
            facts[STRONGEST] = strongest_network(bench, orders, draws, generator)
            print(f"{facts[STRONGEST]}", flush=True)
            protocol.save_json(output, facts)
        if GROWN in parts:
            sizes = [int(n) for n in grow.split(",")]
            facts[GROWN] = grown_sets(bench, orders, sizes, draws, generator)
            protocol.save_json(output, facts)
        del bench
    rows = {}
    if RECURRENCE in parts:
        rows = {"another sample of tokens": on.found(trained, second)}
        rows |= {f"{name} alone": on.found(trained, on.sample([name], 0)) for name in names}
    if TUNED in parts:
        tuned = on.finetuned(trained, finetune_on or names[0], steps)
        rows[f"fine-tuned on {finetune_on or names[0]}"] = on.found(tuned, first)
    facts[RECURRENCE] = {name: _row(base, other) for name, other in rows.items()}
    if SEEDS in parts:
        starts = recurrence_between_starts(
            base.maps, [slice(0, base.maps.shape[1])], range(1, 1 + STARTS)
        )
        facts[SEEDS] = {
            "starts": STARTS,
            "in all": sum(share == 1 for share in starts["shared_seeds"]),
            "correlation": statistics.fmean(starts["correlation_seeds"]),
        }
    protocol.save_json(output, facts)
    if html is not None:
        html.write_text(claims_page(facts), encoding="utf-8")
    show(facts)


def _row(a: FunctionalNetworks, b: FunctionalNetworks) -> dict[str, Any]:
    facts = recurrence(a, b).to_json()
    del facts["networks"]
    return facts


def show(facts: dict[str, Any]) -> None:
    console = Console(width=150)
    if one := facts.get(STRONGEST):
        massive = one["massive"]
        console.print(
            f"{facts['model']}, perplexity {facts['perplexity']:.2f}. Strongest network ({one['neurons']} neurons) "
            f"masked: +{one['rise']:.3f} nats, {RANDOM_SETS} random sets +{one['random']['mean']:.3f} "
            f"± {one['random']['std']:.3f}; its {massive['neurons']} neurons with massive activations alone "
            f"+{massive['alone']:.3f}, without these +{massive['without']:.3f}"
        )
        if "refitted" in one:
            console.print(
                f"refitted +{one['refitted']:.3f}, without massive +{one['refitted without massive']:.3f}, "
                f"random +{one['random refitted']['mean']:.3f}"
            )
    if found := facts.get(GROWN):
        step = next(iter(found.values()))
        kinds = list(step["masked, bare"])
        table = Table("rise of the loss, nats a token", "neurons", *kinds)
        for act in (name for name in step if name != "neurons"):
            for size, step in found.items():
                cells = [f"{step[act][k]['mean']:.3f} ± {step[act][k]['std']:.3f}" for k in kinds]
                table.add_row(f"top {size} {act}", str(step["neurons"]), *cells)
        console.print(table)
    table = Table("networks compared with", "mean IoU", "by chance", "above chance", "same map")
    for name, row in facts[RECURRENCE].items():
        table.add_row(name, f"{row['mean_iou']:.2f}", f"{row['chance_iou']:.2f}",
                      f"{row['recurring']} of {facts['networks']}", str(row["same"]))  # fmt: skip
    console.print(table)
    if seeds := facts.get(SEEDS):
        console.print(
            f"{seeds['starts']} other seeds: {seeds['in all']} of {facts['networks']} maps in all of them, "
            f"mean correlation {seeds['correlation']:.4f}"
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    typer.run(main)
