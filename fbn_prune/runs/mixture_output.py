"""Write the output folder of a cut mixture of experts: checkpoint, kept experts, recipe, card and figures."""

from __future__ import annotations

from collections.abc import Sequence

from fbn_prune.export.card import CardFacts, model_card, source_license
from fbn_prune.export.directory import atomic_directory
from fbn_prune.export.mixture_writer import write_mixture
from fbn_prune.export.published import public_name
from fbn_prune.export.report.facts import RESULT_NAME, read_facts
from fbn_prune.export.report.page import REPORT_NAME, write_report
from fbn_prune.export.shards import write_json
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.kept_experts import KEPT_EXPERTS, save_kept_experts
from fbn_prune.model.mixture_adapter import MixtureAdapter
from fbn_prune.model.mixture_checkpoint import open_mixture
from fbn_prune.model.mixture_family import MixtureFamily
from fbn_prune.model.routed import ExpertsCut
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.progress import StageClock
from fbn_prune.recipe import Recipe, parse_size
from fbn_prune.runs.output import NETWORKS_NAME, task_words, write_task_record
from fbn_prune.runs.prepared import Prepared
from fbn_prune.runs.result import PruneResult, tool_version
from fbn_prune.store import Store


def publish_mixture(
    prepared: Prepared,
    adapter: MixtureAdapter,
    cuts: Sequence[ExpertsCut],
    networks: FunctionalNetworks | None,
    result: PruneResult,
    clock: StageClock,
    *,
    store: Store | None = None,
) -> None:
    """Write all files of the output; the folder appears at its path when it is complete.

    Parameters
    ----------
    prepared, adapter, cuts
        The run, with an output; the cut model, and the cut of each layer.
    networks
        The networks of the dense model; None without them.
    result
        Figures of the run; its sizes after pruning are filled in here.
    clock
        Shows the stage.
    store
        Keeps finished shards, so that a repeated run does not write them again.

    Raises
    ------
    FbnPruneError
        The disk cannot be written to, or the checkpoint does not fit its config.
    """
    recipe, checkpoint, family = prepared.recipe, prepared.checkpoint, prepared.family
    assert recipe.output is not None
    assert result.experts is not None
    assert isinstance(family, MixtureFamily)
    with (
        clock.stage("export", checkpoint.total_bytes, "bytes") as advance,
        atomic_directory(recipe.output, recipe.overwrite) as folder,
    ):
        write_mixture(
            checkpoint,
            adapter,
            (result.experts[1], result.widths[0]),
            folder,
            max_shard_size=parse_size(recipe.max_shard_size, "max_shard_size"),
            progress=advance,
            store=store,
        )
        written = open_mixture(folder)
        result.parameters_after = written.total_parameters
        result.bytes_after = written.total_bytes
        if networks is not None:
            networks.save(folder / NETWORKS_NAME)
        save_kept_experts(family, cuts, folder / KEPT_EXPERTS)
        (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        write_task_record(prepared, result, folder)
        (folder / "README.md").write_text(
            _card(recipe, checkpoint, family, result), encoding="utf-8"
        )
        write_json(folder / RESULT_NAME, result.lasting())
        write_report(read_facts(folder), folder / REPORT_NAME)


def _chosen_by(recipe: Recipe) -> str:
    words = []
    if recipe.experts is not None:
        words.append(f"{recipe.expert_criterion} (experts)")
    if recipe.sparsity is not None or recipe.experts is None:
        words.append(f"{recipe.criterion} (neurons)")
    return " and ".join(words)


def _card(
    recipe: Recipe, checkpoint: Checkpoint, family: MixtureFamily, result: PruneResult
) -> str:
    assert result.experts is not None
    sources = ", ".join(map(public_name, recipe.calibration))
    for_task = task_words(result)
    width, layers = result.widths[0], len(result.widths)
    facts = CardFacts(
        base_name=recipe.model,
        base_hub_id=checkpoint.hub_id,
        criterion=_chosen_by(recipe),
        widths=(width * result.experts[1],) * layers,
        widths_before=(family.expert_width * family.count,) * layers,
        parameters_before=result.parameters_before,
        parameters_after=result.parameters_after,
        bytes_before=result.bytes_before,
        bytes_after=result.bytes_after,
        calibration=f"{result.calibration_tokens:,} tokens of {sources}{for_task}",
        held_out=f"{result.held_out_tokens:,} tokens of {sources} that were kept out of calibration",
        command="fbn-prune run recipe.yaml --output NEW_FOLDER",
        version=tool_version(),
        perplexity_before=result.perplexity_before,
        perplexity_after=result.perplexity_after,
        experts=(*result.experts, family.expert_width, width),
        warning=result.warning,
        license=source_license(checkpoint.folder / "README.md"),
    )
    return model_card(facts)
