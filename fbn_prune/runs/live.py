"""Prune a transformers model in memory, find its networks, or mask them; the stages are those of a checkpoint's run."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fbn_prune.data.calibration import first_blocks
from fbn_prune.data.forms import Reading
from fbn_prune.data.given import Dataset, as_source
from fbn_prune.data.text_files import GENERATED
from fbn_prune.errors import InvalidInput
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.depth import Depth, put_back
from fbn_prune.model.head_groups import has_own_head_groups
from fbn_prune.model.mixture_checkpoint import headers_of
from fbn_prune.model.mixture_family import MixtureFamily
from fbn_prune.model.opening import adapter_of, live_adapter
from fbn_prune.networks.activity import time_courses
from fbn_prune.networks.functional_networks import HUB_Z, FunctionalNetworks
from fbn_prune.networks.interventions import amplified, masked, retained
from fbn_prune.progress import StageClock
from fbn_prune.recipe import PruningConfig, build_recipe
from fbn_prune.runs.machine import MAX_CONTEXT, chosen_context
from fbn_prune.runs.memory import possible_plans
from fbn_prune.runs.mixture import MixtureRun
from fbn_prune.runs.mixture_memory import MixtureSizes
from fbn_prune.runs.mixture_setup import prepared_mixture_for, refuse_for_mixtures, require_size
from fbn_prune.runs.opening import (
    OpenRun,
    Texts,
    read_texts,
    read_training_text,
    written_texts,
)
from fbn_prune.runs.prune import PruneRun
from fbn_prune.runs.result import PruneResult
from fbn_prune.runs.setup import prepared_for, require_layout
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
    """Prune a model in place; see :func:`fbn_prune.prune`."""
    with _opened(model, tokenizer, dataset, config, clock) as run:
        of_experts = isinstance(run.prepared.family, MixtureFamily)
        (require_size if of_experts else require_layout)(run.prepared)
        for line in run.prepared.recipe.notes:
            clock.note(line)
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        if model.config.tie_word_embeddings and head.weight is not embedding.weight:
            clock.note("the head is not tied to the embedding: the config now says so")
            model.config.tie_word_embeddings = False  # or loaders of what is saved would drop it
        result = (MixtureRun if of_experts else PruneRun)(run, Store()).run()
        if result.layers_left_out:
            put_back(run.adapter, result.layers_left_out)
            depth = Depth(run.prepared.layers, frozenset(result.layers_left_out))
            depth.apply(model, run.adapter.family)
    after = headers_of(model)
    warning = result.warning
    different = ["width"] if len(set(result.widths)) > 1 else []
    if has_own_head_groups(after.family, after.config):
        different.append("attention heads")
    if different:
        line = f"the layers differ in {' and '.join(different)}: only prune_checkpoint writes a folder that loads again"
        clock.note(f"warning: {line}")
        warning = line if warning is None else f"{warning}; {line}"
    return replace(
        result,
        model=model,
        warning=warning,
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
    """Find the functional networks of a model; see :func:`fbn_prune.discover`."""
    with _opened(model, tokenizer, dataset, config, clock) as run:
        return find_networks(run, recurrence=recurrence)


def time_courses_live(
    model: PreTrainedModel, tokenizer: Any, dataset: Dataset, networks: FunctionalNetworks
) -> Tensor:
    """Return the networks' time courses on a whole text, float64 [tokens, networks], in the order of the text.

    Raises
    ------
    InvalidInput
        If the text is too short for one block, or the model's widths differ from those of the networks.
    """
    adapter = adapter_of(model)
    if adapter.widths != list(networks.widths):
        raise InvalidInput(
            f"the networks were found in layers of widths {networks.widths}; the model has {adapter.widths}: "
            "give the model that they were found in"
        )
    context = min(adapter.family.context_length(adapter.config), MAX_CONTEXT)
    source = as_source(dataset, tokens=sys.maxsize, reading=Reading(tokenizer))
    blocks = first_blocks(source, tokenizer, context)
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
    """Put the model into evaluation mode, and restore the mode of every module afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _opened(
    model: PreTrainedModel,
    tokenizer: Any,
    dataset: Dataset,
    config: PruningConfig,
    clock: StageClock,
) -> Iterator[OpenRun]:
    """Yield a run that works on this model object; the model is in evaluation mode inside the context."""
    headers = headers_of(model)
    name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    recipe = build_recipe({**config.model_dump(), "model": name}, where="config")
    longest = headers.family.context_length(headers.config)
    context = chosen_context(recipe, longest)
    of_experts = isinstance(headers.family, MixtureFamily)
    if of_experts:
        refuse_for_mixtures(recipe)
    sizes = MixtureSizes if of_experts else None
    memory = next(possible_plans(recipe, headers, model.device, model.dtype, context, sizes))
    check = prepared_mixture_for if of_experts else prepared_for
    prepared = check(recipe, headers, model.device, model.dtype, memory)
    # The held-out share is read in addition, and the blocks at its start may be skipped.
    tokens = int(recipe.tokens / (1 - recipe.held_out)) + 2 * prepared.context
    source = as_source(dataset, tokens=tokens, reading=Reading(tokenizer, clock.note))
    texts: Texts = ([source], recipe.recover_text)
    with _evaluating(model):
        adapter = live_adapter(model, headers.family)
        if GENERATED in (source, *recipe.recover_text):
            texts = written_texts(prepared, adapter, tokenizer, texts, clock, Store())
        with clock.stage("calibration"):
            data, task = read_texts(prepared, tokenizer, texts[0], clock.note)
            training = read_training_text(prepared, tokenizer, data, texts[1], clock.note)
        dense = ModelAdapter(copy.deepcopy(model)) if recipe.recover else None
        yield OpenRun(prepared, tokenizer, data, task, adapter, clock, dense, training)


def mask_networks(
    model: PreTrainedModel, networks: FunctionalNetworks, ids: Sequence[int], *, z: float = HUB_Z
) -> AbstractContextManager[PreTrainedModel]:
    """Return a context in which the neurons of some networks output zero (the causal test of arXiv 2502.20408).

    Parameters
    ----------
    model
        The model that the networks were found in; the context yields it.
    networks
        The model's functional networks.
    ids
        Indices of the networks to mask, from 0.
    z
        Smallest absolute z-score of a neuron that belongs to a network: 3 for its hubs, 2 for all members.

    Raises
    ------
    InvalidInput
        If a network does not exist, or the model's widths differ from those of the networks.

    Examples
    --------
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> from fbn_prune import PruningConfig, discover
    >>> from fbn_prune.data.builtin import model_path
    >>> model = AutoModelForCausalLM.from_pretrained(model_path(), dtype="float32")
    >>> tokenizer = AutoTokenizer.from_pretrained(model_path())
    >>> config = PruningConfig(networks=4, keep_networks=1, network_tokens=512, tokens=1024)
    >>> networks = discover(model, tokenizer, "builtin", config)
    >>> inputs = tokenizer("17+25=", return_tensors="pt")
    >>> with mask_networks(model, networks, [0, 2]):
    ...     silenced = model(input_ids=inputs["input_ids"]).logits
    >>> bool((silenced == model(input_ids=inputs["input_ids"]).logits).all())
    False
    """
    return _intervened(model, masked(adapter_of(model), _neurons(networks, ids, z)))


def retain_networks(
    model: PreTrainedModel, networks: FunctionalNetworks, ids: Sequence[int], *, z: float = HUB_Z
) -> AbstractContextManager[PreTrainedModel]:
    """Return a context in which all neurons outside some networks output zero; see :func:`mask_networks`."""
    return _intervened(model, retained(adapter_of(model), _neurons(networks, ids, z)))


def amplify_networks(
    model: PreTrainedModel,
    networks: FunctionalNetworks,
    ids: Sequence[int],
    *,
    factor: float = 2.0,
    z: float = HUB_Z,
) -> AbstractContextManager[PreTrainedModel]:
    """Return a context that multiplies the activations of some networks by `factor`; see :func:`mask_networks`."""
    return _intervened(model, amplified(adapter_of(model), _neurons(networks, ids, z), factor))


def _neurons(networks: FunctionalNetworks, ids: Sequence[int], z: float) -> list[Tensor]:
    return networks.by_layer(networks.union(ids, z))


@contextmanager
def _intervened(
    model: PreTrainedModel, intervention: AbstractContextManager[None]
) -> Iterator[PreTrainedModel]:
    with intervention:
        yield model
