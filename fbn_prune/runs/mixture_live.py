"""Prune a live mixture of experts in place; the stages are those of a checkpoint's run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from fbn_prune.data.calibration import calibration_data
from fbn_prune.data.forms import Reading
from fbn_prune.data.given import Dataset, as_source
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.families import refusal
from fbn_prune.model.mixture_adapter import MixtureAdapter
from fbn_prune.model.mixture_family import MixtureFamily, mixture_family
from fbn_prune.model.mixture_identities import failed_mixture_step
from fbn_prune.model.shards import TensorInfo
from fbn_prune.progress import StageClock
from fbn_prune.recipe import PruningConfig, build_recipe
from fbn_prune.runs.mixture import OpenMixture, plan_of, prune_open, refuse_for_mixtures
from fbn_prune.runs.result import PruneResult
from fbn_prune.runs.setup import MAX_CONTEXT, check_context


def prune_live_mixture(
    model: PreTrainedModel,
    tokenizer: Any,
    dataset: Dataset,
    config: PruningConfig,
    clock: StageClock,
) -> PruneResult:
    """Prune a mixture of experts in evaluation mode in place; see :func:`fbn_prune.prune`.

    Raises
    ------
    InvalidInput
        The model, the data or a setting cannot be used; the model is unchanged.
    """
    fields = {**model.config.to_dict(), "model_type": model.config.model_type}
    family = mixture_family(fields)
    if (reason := failed_mixture_step(model.config)) is not None:
        raise refusal(family.name, reason)
    name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    recipe = build_recipe({**config.model_dump(), "model": name}, where="config")
    refuse_for_mixtures(recipe)
    plan = plan_of(recipe, family)
    longest = family.context_length(fields)
    check_context(recipe, longest)
    context = recipe.context or min(longest, MAX_CONTEXT)
    # The held-out share is read in addition, and the blocks at its start may be skipped.
    tokens = int(recipe.tokens / (1 - recipe.held_out)) + 2 * context
    source = as_source(dataset, tokens=tokens, reading=Reading(tokenizer, clock.note))
    with clock.stage("calibration"):
        data = calibration_data(
            [source],
            tokenizer,
            tokens=recipe.tokens,
            context=context,
            held_out=recipe.held_out,
            seed=recipe.seed,
            vocabulary=family.vocab_size(fields),
            note=clock.note,
        )
    adapter = MixtureAdapter(model, family)
    headers = _headers(model, fields, family)
    result = prune_open(OpenMixture(recipe, headers, family, data, adapter, clock), plan)
    after = _headers(model, fields, family)
    result.model = model
    result.parameters_after, result.bytes_after = after.total_parameters, after.total_bytes
    return result


def _headers(model: PreTrainedModel, fields: dict[str, Any], family: MixtureFamily) -> Checkpoint:
    """Return the headers that a checkpoint of the model would have; its tensors cannot be read."""
    tensors = {
        name: TensorInfo("", tuple(parameter.shape), parameter.dtype)
        for name, parameter in model.named_parameters()  # tied embeddings once
    }
    return Checkpoint(Path(model.name_or_path or type(model).__name__), fields, family, tensors)
