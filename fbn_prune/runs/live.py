"""Runs on a model that is already in memory: the stages of the checkpoint's runs, without files."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fbn_prune.data.calibration import all_blocks
from fbn_prune.data.given import Dataset, as_source
from fbn_prune.errors import InvalidInput
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.networks.activity import time_courses
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.progress import StageClock
from fbn_prune.recipe import PruningConfig, build_recipe
from fbn_prune.runs.memory import possible_plans
from fbn_prune.runs.opening import OpenRun, read_texts
from fbn_prune.runs.prune import PruneRun
from fbn_prune.runs.result import PruneResult
from fbn_prune.runs.setup import MAX_CONTEXT, prepared_for
from fbn_prune.runs.stages import find_networks
from fbn_prune.store import Store

BATCH_TOKENS = 4096


def prune_live(
    model: PreTrainedModel,
    tokenizer: Any,
    dataset: Dataset,
    config: PruningConfig,
    clock: StageClock,
) -> PruneResult:
    """Prune a model in place, see :func:`fbn_prune.prune`."""
    with _opened(model, tokenizer, dataset, config, clock) as run:
        for line in run.prepared.recipe.notes:
            clock.note(line)
        result = PruneRun(run, Store()).run()
    after = Checkpoint.of_model(model)
    return replace(
        result,
        model=model,
        parameters_after=after.total_parameters,
        bytes_after=after.total_bytes,
    )


def discover_live(
    model: PreTrainedModel,
    tokenizer: Any,
    dataset: Dataset,
    config: PruningConfig,
    clock: StageClock,
    *,
    recurrence: bool = False,
) -> FunctionalNetworks:
    """Find the functional networks of a model, see :func:`fbn_prune.discover`."""
    with _opened(model, tokenizer, dataset, config, clock) as run:
        return find_networks(run, recurrence=recurrence)


def time_courses_live(
    model: PreTrainedModel, tokenizer: Any, dataset: Dataset, networks: FunctionalNetworks
) -> Tensor:
    """Time courses of known networks on all of a text, float64 [tokens, networks], in the order of the text.

    Raises
    ------
    InvalidInput
        The text gives no block, or the model has other widths than the networks.
    """
    adapter = ModelAdapter(model)
    if adapter.widths != list(networks.widths):
        raise InvalidInput(
            f"the networks are of layers of {networks.widths}, the model has {adapter.widths}"
        )
    context = min(adapter.family.context_length(adapter.config), MAX_CONTEXT)
    blocks = all_blocks(as_source(dataset, tokens=sys.maxsize), tokenizer, context)
    batches = blocks.batches(BATCH_TOKENS)
    with _evaluating(model):
        courses = time_courses(adapter, networks, batches, StageClock())
    parts: list[Tensor] = []
    for course, batch in zip(courses, batches, strict=True):
        parts.extend(course.split(batch.valid.sum(1).tolist()))
    places = torch.argsort(torch.tensor(blocks.batch_order())).tolist()
    return torch.cat([parts[place] for place in places])


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """The model is in evaluation mode inside the context, and as it was afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _opened(
    model: PreTrainedModel,
    tokenizer: Any,
    dataset: Dataset,
    config: PruningConfig,
    clock: StageClock,
) -> Iterator[OpenRun]:
    """A run on this very model, which is in evaluation mode inside the context and as it was afterwards.

    Raises
    ------
    InvalidInput
        The model's architecture, the data or the settings cannot be used.
    """
    headers = Checkpoint.of_model(model)
    name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    recipe = build_recipe({**config.model_dump(), "model": name}, where="config")
    longest = headers.family.context_length(headers.config)
    context = recipe.context or min(longest, MAX_CONTEXT)
    memory = next(possible_plans(recipe, headers, model.device, model.dtype, context))
    prepared = prepared_for(recipe, headers, model.device, model.dtype, memory)
    # A held-out share comes on top of what calibrates, and blocks that open it may be left out.
    tokens = int(recipe.tokens / (1 - recipe.held_out)) + 2 * prepared.context
    source = as_source(dataset, tokens=tokens)
    with clock.stage("calibration"):
        data, task = read_texts(prepared, tokenizer, [source])
    with _evaluating(model):
        dense = ModelAdapter(copy.deepcopy(model)) if recipe.recover else None
        yield OpenRun(prepared, tokenizer, data, task, ModelAdapter(model), clock, dense)
