"""Write the output folder of a cut mixture of experts: checkpoint, kept experts, recipe, card and figures."""

from __future__ import annotations

from collections.abc import Sequence

from fbn_prune.export.card import CardFacts, model_card, source_license
from fbn_prune.export.directory import atomic_directory
from fbn_prune.export.mixture_writer import KEPT_EXPERTS, save_kept_experts, write_mixture
from fbn_prune.export.published import public_name
from fbn_prune.export.report.facts import RESULT_NAME
from fbn_prune.export.shards import write_json
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.expert_block import ExpertsCut
from fbn_prune.model.mixture_adapter import MixtureAdapter
from fbn_prune.model.mixture_checkpoint import open_mixture
from fbn_prune.model.mixture_family import MixtureFamily
from fbn_prune.progress import StageClock
from fbn_prune.recipe import Recipe, parse_size
from fbn_prune.runs.result import PruneResult, tool_version


def publish_mixture(
    recipe: Recipe,
    checkpoint: Checkpoint,
    adapter: MixtureAdapter,
    cuts: Sequence[ExpertsCut],
    result: PruneResult,
    clock: StageClock,
) -> None:
    """Write all files of the output; the folder appears at its path when it is complete.

    Parameters
    ----------
    recipe
        The recipe, with an output.
    checkpoint, adapter, cuts
        The source, the cut model, and the cut of each layer.
    result
        Figures of the run; its sizes after pruning are filled in here.
    clock
        Shows the stage.

    Raises
    ------
    FbnPruneError
        The disk cannot be written to, or the checkpoint does not fit its config.
    """
    family = checkpoint.family
    assert recipe.output is not None
    assert isinstance(family, MixtureFamily)
    with (
        clock.stage("export", checkpoint.total_bytes, "bytes") as advance,
        atomic_directory(recipe.output, recipe.overwrite) as folder,
    ):
        write_mixture(
            checkpoint,
            adapter,
            folder,
            max_shard_size=parse_size(recipe.max_shard_size, "max_shard_size"),
            progress=advance,
        )
        written = open_mixture(folder)
        result.parameters_after = written.total_parameters
        result.bytes_after = written.total_bytes
        save_kept_experts(family, cuts, folder / KEPT_EXPERTS)
        (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        write_json(folder / RESULT_NAME, result.lasting())
        (folder / "README.md").write_text(
            _card(recipe, checkpoint, family, result), encoding="utf-8"
        )


def _chosen_by(recipe: Recipe) -> str:
    words = []
    if recipe.experts is not None:
        words.append(f"{recipe.expert_criterion} (experts)")
    if recipe.sparsity is not None:
        words.append(f"{recipe.criterion} (neurons)")
    return " and ".join(words)


def _card(
    recipe: Recipe, checkpoint: Checkpoint, family: MixtureFamily, result: PruneResult
) -> str:
    assert result.experts is not None
    sources = ", ".join(map(public_name, recipe.calibration))
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
        calibration=f"{result.calibration_tokens:,} tokens of {sources}",
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
