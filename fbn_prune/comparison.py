"""Every criterion at several budgets on one calibration sample: one pass over the model serves them all.

Each cell is written as soon as it is measured, and the same command goes on from what is written; a file that another
calibration, model or seed left behind is refused, not mixed in.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fbn_prune.errors import InvalidInput
from fbn_prune.model.surgery import MlpCut, apply_cut
from fbn_prune.perplexity import perplexity
from fbn_prune.progress import StageClock
from fbn_prune.pruning.allocation import budget_from_sparsity, uniform_widths
from fbn_prune.pruning.criteria import CRITERIA
from fbn_prune.pruning.pipeline import CutOptions, EvidencePass
from fbn_prune.recipe import CRITERION_NAMES, Recipe
from fbn_prune.stages import rank_networks
from fbn_prune.studies import Studied, study

Cell = tuple[str, float]
"""A criterion and the share of neurons it keeps."""


@dataclass
class Comparison:
    """Perplexity on the held-out share, dense and in each cell."""

    model: str
    facts: dict[str, Any]
    dense: float
    widths: dict[float, list[int]]
    cells: dict[Cell, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        shares = sorted(self.widths, reverse=True)
        return {
            "model": self.model,
            "facts": self.facts,
            "dense": self.dense,
            "budgets": [
                {
                    "kept": share,
                    "widths": self.widths[share],
                    "perplexity": {
                        name: value for (name, of), value in self.cells.items() if of == share
                    },
                }
                for share in shares
            ],
        }

    def save(self, path: Path) -> None:
        """Write the JSON whole or not at all."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def run_comparison(
    recipe: Recipe,
    criteria: Sequence[str],
    kept: Sequence[float],
    path: Path | None,
    clock: StageClock,
) -> Comparison:
    """The `compare` command.

    Parameters
    ----------
    criteria
        Names of criteria; empty for all.
    kept
        Shares of neurons to keep, each between 0 and 1.
    path
        File of the results, written after each cell and read at the start.

    Raises
    ------
    InvalidInput
        An unknown criterion, an impossible share, or a file of another comparison.
    """
    names = list(criteria) or list(CRITERION_NAMES)
    for name in names:
        if name not in CRITERIA:
            raise InvalidInput(f"criterion {name!r}: choose from {', '.join(CRITERION_NAMES)}")
    for share in kept:
        if not 0 < share < 1:
            raise InvalidInput(f"kept = {share}: the share of neurons kept lies between 0 and 1")
    if path is not None and not path.resolve().parent.is_dir():
        raise InvalidInput(f"{path}: there is no folder {path.resolve().parent}")
    on = study(recipe, clock)
    comparison = _begin(on, kept, path, clock)
    missing = [(n, s) for s in kept for n in names if (n, s) not in comparison.cells]
    if missing:
        cuts = _cuts(on, missing, comparison.widths, clock)
        held_out = on.data.held_out.batches(on.prepared.batch_tokens)
        with clock.stage("comparison", len(missing), "models") as advance:
            for cell in missing:
                comparison.cells[cell] = _perplexity(on, cuts.pop(cell), held_out)
                if path is not None:
                    comparison.save(path)
                advance(1)
    wanted = {(name, share) for name in names for share in kept}
    comparison.cells = {cell: comparison.cells[cell] for cell in sorted(wanted)}
    return comparison


def _begin(on: Studied, kept: Sequence[float], path: Path | None, clock: StageClock) -> Comparison:
    """What is known before any cut: from the file, or measured."""
    prepared = on.prepared
    blocks = on.data.calibrating if on.matched is None else on.matched.blocks
    facts: dict[str, Any] = {
        "calibration_fingerprint": blocks.fingerprint,
        "held_out_fingerprint": on.data.held_out.fingerprint,
        "seed": prepared.recipe.seed,
        "networks": len(on.networks.maps),
        "keep_networks": prepared.recipe.keep_networks,
        "width_multiple": prepared.width_multiple,
    }
    full = [prepared.width] * prepared.layers
    widths = {
        share: uniform_widths(
            budget_from_sparsity(sum(full), 1 - share), full, prepared.width_multiple
        )
        for share in kept
    }
    if path is not None and path.exists():
        before = _read(path)
        if (before.model, before.facts) != (prepared.recipe.model, facts):
            raise InvalidInput(
                f"{path} holds a comparison of another model, calibration or seed: name another file"
            )
        before.widths |= widths
        return before
    held_out = on.data.held_out.batches(prepared.batch_tokens)
    with clock.stage("dense perplexity", on.data.held_out.tokens, "tokens") as advance:
        dense = perplexity(on.model, held_out, advance)
    return Comparison(prepared.recipe.model, facts, dense, widths)


def _read(path: Path) -> Comparison:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        budgets = content["budgets"]
        return Comparison(
            content["model"],
            content["facts"],
            content["dense"],
            {entry["kept"]: entry["widths"] for entry in budgets},
            {(n, e["kept"]): v for e in budgets for n, v in e["perplexity"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InvalidInput(f"{path} exists and is no comparison: name another file") from None


def _cuts(
    on: Studied, cells: Sequence[Cell], widths: dict[float, list[int]], clock: StageClock
) -> dict[Cell, list[MlpCut]]:
    """The cuts of all layers for each cell, from one pass over the calibration data."""
    prepared, recipe = on.prepared, on.prepared.recipe
    order = rank_networks(prepared, on.model, on.networks, on.data, on.matched, clock)
    order = order[: recipe.keep_networks or len(order)]
    strongest = on.networks.maps[order].abs().amax(0).double()
    blocks = on.data.calibrating if on.matched is None else on.matched.blocks
    evidence = EvidencePass(
        on.model,
        prepared.family,
        blocks.batches(prepared.batch_tokens),
        CutOptions(
            criterion="networks",
            sequential=False,
            damping=recipe.damping,
            refit_damping=recipe.refit_damping,
            seed=recipe.seed,
            round_to=prepared.checkpoint.storage_dtype,
        ),
        membership=on.networks.by_layer(strongest),
        clock=clock,
    )
    cuts: dict[Cell, list[MlpCut]] = {cell: [] for cell in cells}
    for layer in evidence:
        for name, share in cells:
            cuts[name, share].append(CRITERIA[name](layer, widths[share][layer.layer]))
    return cuts


def _perplexity(on: Studied, cuts: Sequence[MlpCut], held_out: Any) -> float:
    model = copy.deepcopy(on.model)
    dtype = on.prepared.checkpoint.storage_dtype
    for layer, cut in enumerate(cuts):
        apply_cut(model, on.prepared.family, layer, cut, round_to=dtype)
    return perplexity(model, held_out)
