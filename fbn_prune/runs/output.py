"""Write the output folder: the pruned checkpoint, networks, kept neurons, recipe, task record, card and report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fbn_prune.data.examples import RECORD_NAME, record
from fbn_prune.export.card import CardFacts, model_card, source_license
from fbn_prune.export.directory import atomic_directory
from fbn_prune.export.published import public_name
from fbn_prune.export.report.facts import RESULT_NAME, read_facts
from fbn_prune.export.report.page import REPORT_NAME, write_report
from fbn_prune.export.shards import write_json
from fbn_prune.export.writer import verify_export, write_checkpoint
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.depth import Depth
from fbn_prune.model.head_groups import has_own_head_groups, head_groups
from fbn_prune.model.kept_neurons import KEPT_FILE, KeptNeurons
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.progress import StageClock
from fbn_prune.pruning.cutting import CutModel
from fbn_prune.recipe import parse_size
from fbn_prune.runs.prepared import Prepared
from fbn_prune.runs.result import PruneResult, tool_version
from fbn_prune.store import Store

NETWORKS_NAME = "networks.safetensors"


def publish(
    prepared: Prepared,
    cut: CutModel,
    networks: FunctionalNetworks | None,
    result: PruneResult,
    clock: StageClock,
    *,
    depth: Depth | None = None,
    store: Store | None = None,
) -> None:
    """Write all files of the output; the folder appears at its path when it is complete.

    Parameters
    ----------
    cut
        Kept neurons and new weights of every layer.
    depth
        The layers that stay; all by default.
    result
        Figures of the run; its sizes after pruning are filled in here.
    store
        Keeps finished shards, so that a repeated run does not write them again.

    Raises
    ------
    FbnPruneError
        If the disk cannot be written to, or the checkpoint does not fit its config.
    """
    recipe = prepared.recipe
    assert recipe.output is not None
    with (
        clock.stage("export", prepared.checkpoint.total_bytes, "bytes") as advance,
        atomic_directory(recipe.output, recipe.overwrite) as folder,
    ):
        write_checkpoint(
            prepared.checkpoint,
            cut.cuts,
            folder,
            trained=cut.trained,
            vocabulary=prepared.vocabulary_cut,
            depth=depth,
            keep_unused=recipe.keep_unused_tensors,
            max_shard_size=parse_size(recipe.max_shard_size, "max_shard_size"),
            progress=advance,
            store=store,
        )
        verify_export(folder)
        written = Checkpoint.open(folder)
        result.parameters_after = written.total_parameters
        result.bytes_after = written.total_bytes
        if networks is not None:
            networks.save(folder / NETWORKS_NAME)
        full = prepared.widths
        staying = range(prepared.layers) if depth is None else depth.staying
        KeptNeurons(
            tuple(full[layer] for layer in staying),
            tuple(cut.cuts[layer].kept.cpu() for layer in staying),
        ).save(folder / KEPT_FILE)
        (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        write_task_record(prepared, result, folder)
        (folder / "README.md").write_text(
            _card(prepared, networks, result.kept_networks, result, written), encoding="utf-8"
        )
        write_json(folder / RESULT_NAME, result.lasting())
        write_report(read_facts(folder), folder / REPORT_NAME)


def write_task_record(prepared: Prepared, result: PruneResult, folder: Path) -> None:
    """Write which examples a model was made from, if it was made for a task."""
    if prepared.task is not None and result.task is not None:
        seen = record(
            prepared.task.examples,
            source=public_name(prepared.task.source),
            tokens=result.task["tokens"],
            networks=result.task["matched_networks"],
        )
        (folder / RECORD_NAME).write_text(seen, encoding="utf-8")


def task_words(result: PruneResult) -> str:
    """How the calibration text was weighted for a task, for the model card; empty without one."""
    if result.task is None:
        return ""
    return (
        f", weighted to match {result.task['examples']} examples of {public_name(result.task['file'])} "
        f"(included) on {len(result.task['matched_networks'])} functional networks"
    )


_CRITERION_WORDS = {
    "second-order": "second-order cost, each layer's remaining output weights refitted",
    "flap": "FLAP (output variance, mean moved into a bias)",
    "wanda": "Wanda (weight times activation norm)",
    "membership": "membership in the kept networks, without a refit",
    "membership-bias": "membership in the kept networks, the removed neurons' mean output moved into a bias",
    "magnitude": "weight norm",
    "random": "chance",
}


def _tokens(result: PruneResult) -> tuple[int, int] | None:
    found = result.vocabulary
    return None if found is None else (found.tokens_before, found.tokens_after)


def _criterion(result: PruneResult) -> str:
    """How the neurons were chosen, in words."""
    if (found := result.forgotten) is not None:
        return (
            f"the {found['examples']} examples of a skill to remove in {public_name(found['file'])}: "
            f"{found['how']}"
        )
    return _CRITERION_WORDS.get(result.criterion, f"the criterion {result.criterion}")


def _card(
    prepared: Prepared,
    networks: FunctionalNetworks | None,
    kept: Sequence[int],
    result: PruneResult,
    written: Checkpoint,
) -> str:
    recipe = prepared.recipe
    own = has_own_head_groups(written.family, written.config)
    sources = ", ".join(map(public_name, recipe.calibration))
    for_task = task_words(result)
    facts = CardFacts(
        base_name=recipe.model,
        base_hub_id=prepared.checkpoint.hub_id,
        criterion=_criterion(result),
        widths=tuple(result.widths),
        widths_before=tuple(prepared.widths),
        heads_before=result.heads_total,
        heads_after=result.heads_kept,
        own_head_groups=tuple(head_groups(written.family, written.config)) if own else None,
        tokens=_tokens(result),
        parameters_before=result.parameters_before,
        parameters_after=result.parameters_after,
        bytes_before=result.bytes_before,
        bytes_after=result.bytes_after,
        calibration=f"{result.calibration_tokens:,} tokens of {sources}{for_task}",
        held_out=f"{result.held_out_tokens:,} tokens of {sources} that were kept out of calibration",
        command="fbn-prune run recipe.yaml --output NEW_FOLDER",
        version=tool_version(),
        kept_networks=len(kept) if kept and recipe.stated_budget is None else None,
        total_networks=None if networks is None else len(networks.maps),
        perplexity_before=result.perplexity_before,
        perplexity_after=result.perplexity_after,
        perplexity_cut=result.recovery.perplexity_cut
        if result.recovery is not None and result.recovery.kept
        else None,
        trained_on=", ".join(map(public_name, recipe.recover_text)) or "the calibration text",
        mlps_alone=recipe.recover_steps_in_order == ("match",),
        warning=result.warning,
        license=source_license(prepared.checkpoint.folder / "README.md"),
    )
    return model_card(facts)
