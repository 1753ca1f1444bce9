"""Compare all criteria at several budgets on one calibration sample, in one pass over the model.

Each measurement (cell) is written at once, and the same command continues from the file. A file with results of
another model, calibration text or seed is refused.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fbn_prune.data.calibration import Batch
from fbn_prune.errors import InvalidInput, counted
from fbn_prune.export.directory import check_room
from fbn_prune.model.perplexity import perplexity
from fbn_prune.model.surgery import MlpCut
from fbn_prune.progress import Advance, StageClock
from fbn_prune.pruning.allocation import (
    budget_from_networks,
    budget_from_sparsity,
    even_scores,
    member_scores,
    ranked_widths,
    uniform_widths,
)
from fbn_prune.pruning.criteria import CRITERIA
from fbn_prune.pruning.cutting import CutPlan, try_cuts
from fbn_prune.pruning.evidence import CutOptions
from fbn_prune.recipe import CRITERION_NAMES, Recipe
from fbn_prune.runs.early_checks import check_results
from fbn_prune.runs.opening import OpenRun
from fbn_prune.runs.stages import measuring_dense, rank_networks, refuse_guessing
from fbn_prune.runs.study import Studied, network_count, open_study, with_networks

Cell = tuple[str, float]
"""A criterion and the share of neurons that it keeps."""


@dataclass
class Comparison:
    """Perplexities on the held-out text.

    Attributes
    ----------
    facts
        What identifies the calibration: fingerprints, seed and settings.
    dense, cells
        Perplexity of the dense model, and by criterion and share of neurons kept.
    widths
        Width of each layer, by share.
    networks
        Number of networks that set a share, for shares that were given that way.
    """

    model: str
    facts: dict[str, Any]
    dense: float
    widths: dict[float, list[int]]
    cells: dict[Cell, float] = field(default_factory=dict)
    networks: dict[float, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as JSON values, budgets in falling order."""
        shares = sorted(self.widths, reverse=True)
        return {
            "model": self.model,
            "facts": self.facts,
            "dense": self.dense,
            "budgets": [
                {
                    "kept": share,
                    "networks": self.networks.get(share),
                    "widths": self.widths[share],
                    "perplexity": {
                        name: value for (name, of), value in self.cells.items() if of == share
                    },
                }
                for share in shares
            ],
        }

    def save(self, path: Path) -> None:
        """Write the JSON file atomically."""
        replace_file(path, json.dumps(self.to_json(), indent=1) + "\n")


def plot_path(path: Path) -> Path:
    """Return the path of the plot that belongs to a results file."""
    return path.with_suffix(".svg")


def replace_file(path: Path, text: str) -> None:
    """Write a text file atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
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
    """Run a comparison; the parameters are those of :func:`fbn_prune.api.compare`.

    Raises
    ------
    InvalidInput
        If a criterion is unknown, a budget is impossible, or the file holds another comparison.
    """
    names = list(criteria) or list(CRITERION_NAMES)
    for name in names:
        if name not in CRITERIA:
            raise InvalidInput(f"criterion {name!r}: choose from {', '.join(CRITERION_NAMES)}")
    for share in kept:
        if not 0 < share < 1 and not (share >= 1 and share == int(share)):
            raise InvalidInput(
                f"kept = {share}: give a share of neurons between 0 and 1, or a whole number of networks"
            )
    check_results(path)
    if path is not None and path == plot_path(path):
        raise InvalidInput(
            f"{path}: the plot is written under this name; give a .json file for the results"
        )
    before = None if path is None or not path.exists() else _read(path)
    run = open_study(recipe, clock)
    most = network_count(run.prepared)
    if before is not None:
        _require_same(before, path, recipe.model, _facts(run, most))
    for share in kept:
        if share >= 1 and share > most:
            raise InvalidInput(f"kept = {int(share)} networks: there are {most}, give at most that")
    on = with_networks(run)
    order = rank_networks(on, on.networks, on.matched)
    budgets = {share: _budget(on, share, order) for share in kept}
    comparison = _begin(on, budgets, before, path, clock)
    shares = [_share(on, share, budgets[share]) for share in kept]
    missing = [(n, s) for s in shares for n in names if (n, s) not in comparison.cells]
    if missing:
        scratch = on.prepared.memory.scratch if path is None else path.resolve().parent
        cuts = _cuts(on, missing, comparison, order, scratch, clock)
        held_out = on.data.held_out.batches(on.prepared.batch_tokens)
        total = len(missing) * on.data.held_out.tokens
        with clock.stage("comparison", total, "tokens") as advance:
            for measured, cell in enumerate(missing, 1):
                start = time.perf_counter()
                comparison.cells[cell] = _perplexity(on, cuts.pop(cell), held_out, advance)
                if measured == 1:
                    took = time.perf_counter() - start
                    clock.note_time("comparison", _words(cell), took, len(missing) - 1)
                if path is not None:
                    comparison.save(path)
    if path is not None:
        from fbn_prune.export.report.facts import Comparison as Compared
        from fbn_prune.export.report.figures import comparison_svg

        replace_file(plot_path(path), comparison_svg(Compared.model_validate(comparison.to_json())))
    wanted = {(name, share) for name in names for share in shares}
    comparison.cells = {cell: comparison.cells[cell] for cell in sorted(wanted)}
    return comparison


def _budget(on: Studied, kept: float, order: Sequence[int]) -> int:
    """Return the number of neurons to keep: a share of all, or the members of the strongest networks."""
    prepared = on.prepared
    if kept < 1:
        return budget_from_sparsity(prepared.neurons, 1 - kept)
    return budget_from_networks(on.networks, order[: int(kept)])


def _share(on: Studied, kept: float, budget: int) -> float:
    return kept if kept < 1 else budget / on.prepared.neurons


def _widths(on: Studied, budget: int) -> list[int]:
    """Return equal widths, or the same share of every layer where the model's layers differ in width."""
    full, multiple = on.prepared.widths, on.prepared.width_multiple
    if len(set(full)) == 1:
        return uniform_widths(budget, full, multiple)
    return ranked_widths(even_scores(full), budget, multiple)


def _facts(run: OpenRun, networks: int) -> dict[str, Any]:
    """Return what identifies the calibration, but for the text's fingerprint where a task changes that."""
    recipe = run.prepared.recipe
    facts: dict[str, Any] = {
        "held_out_fingerprint": run.data.held_out.fingerprint,
        "seed": recipe.seed,
        "networks": networks,
        "keep_networks": recipe.keep_networks,
        "width_multiple": run.prepared.width_multiple,
    }
    if run.task is None:
        facts["calibration_fingerprint"] = run.data.calibrating.fingerprint
    return facts


def _require_same(before: Comparison, path: Path | None, model: str, facts: dict[str, Any]) -> None:
    same = all(before.facts.get(key) == value for key, value in facts.items())
    if before.model != model or not same:
        raise InvalidInput(
            f"{path} holds a comparison of another model, calibration or seed; give another file"
        )


def _begin(
    on: Studied,
    budgets: dict[float, int],
    before: Comparison | None,
    path: Path | None,
    clock: StageClock,
) -> Comparison:
    """Return the comparison so far: the one before, or with the dense perplexity alone."""
    prepared = on.prepared
    blocks = on.data.calibrating if on.matched is None else on.matched.blocks
    facts = _facts(on, len(on.networks.maps)) | {"calibration_fingerprint": blocks.fingerprint}
    widths = {_share(on, kept, budget): _widths(on, budget) for kept, budget in budgets.items()}
    networks = {_share(on, k, budget): int(k) for k, budget in budgets.items() if k >= 1}
    if before is not None:
        _require_same(before, path, prepared.recipe.model, facts)
        before.widths |= widths
        before.networks |= networks
        return before
    held_out = on.data.held_out.batches(prepared.batch_tokens)
    with (
        measuring_dense(on, held_out),
        clock.stage("dense perplexity", on.data.held_out.tokens, "tokens") as advance,
    ):
        dense = perplexity(on.adapter, held_out, advance)
    refuse_guessing(on, dense)
    return Comparison(prepared.recipe.model, facts, dense, widths, networks=networks)


def _read(path: Path) -> Comparison:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        budgets = content["budgets"]
        return Comparison(
            content["model"],
            dict(content["facts"]),
            content["dense"],
            {entry["kept"]: entry["widths"] for entry in budgets},
            {(n, e["kept"]): v for e in budgets for n, v in e["perplexity"].items()},
            {e["kept"]: e["networks"] for e in budgets if e["networks"] is not None},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InvalidInput(
            f"{path} exists and does not hold a comparison; give another file"
        ) from None


def _cuts(
    on: Studied,
    cells: Sequence[Cell],
    comparison: Comparison,
    order: Sequence[int],
    scratch: Path,
    clock: StageClock,
) -> dict[Cell, Sequence[MlpCut]]:
    """Return the cuts of all layers for each cell, from one pass over the calibration text.

    The cuts of many cells are larger than the model, so they are stored in an unnamed file in `scratch`. The membership
    criteria use the networks that set the budget, or else those that the recipe keeps.

    Raises
    ------
    InvalidInput
        If the disk has too little space.
    FbnPruneError
        If a new output weight overflows the dtype of the checkpoint.
    """
    prepared, recipe = on.prepared, on.prepared.recipe
    stored = prepared.checkpoint.storage_dtype
    column = prepared.family.hidden_size(prepared.checkpoint.config) * stored.itemsize
    room = sum(sum(comparison.widths[share]) for _, share in cells) * column
    check_room(scratch, room, "folder of temporary files")
    clock.note(f"comparison of {counted(len(cells), 'model')}: {', '.join(map(_words, cells))}")
    counts = {share: comparison.networks.get(share, recipe.keep_networks) for _, share in cells}
    members = {
        count: member_scores(on.networks, order[: count or len(order)])
        for count in set(counts.values())
    }
    blocks = on.data.calibrating if on.matched is None else on.matched.blocks
    tried = try_cuts(
        on.adapter,
        blocks.batches(prepared.batch_tokens),
        {
            (name, share): CutPlan(name, comparison.widths[share], members[counts[share]])
            for name, share in cells
        },
        CutOptions(
            sequential=False,
            damping=recipe.damping,
            refit_damping=recipe.refit_damping,
            seed=recipe.seed,
            round_to=stored,
        ),
        scratch=scratch,
        clock=clock,
    )
    for line in tried.notes:
        clock.note(line)
    return dict(tried.cuts)


def _perplexity(
    on: Studied, cuts: Sequence[MlpCut], held_out: Sequence[Batch], advance: Advance
) -> float:
    """Return the held-out perplexity with the cuts applied to the one model in memory for the measurement."""
    with on.adapter.trying(cuts, round_to=on.prepared.checkpoint.storage_dtype):
        return perplexity(on.adapter, held_out, advance)


def _words(cell: Cell) -> str:
    criterion, share = cell
    return f"{criterion} at {share:.0%}"
