"""The dry run: predict the size, memory and time of a run from the checkpoint's headers.

Counts are exact if the recipe fixes them. Estimates are marked as such: the number of neurons that K networks cover
before the networks are known, peak memory, and a rough range of the time, from timing one decoder layer with random
weights for less than a second.
"""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from fbn_prune.distributed import processes
from fbn_prune.errors import InvalidInput
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.family import as_config
from fbn_prune.pruning.allocation import (
    at_most,
    budget_from_networks,
    even_scores,
    narrowed,
    ranked_widths,
    uniform_widths,
)
from fbn_prune.pruning.layout import MOST_TRIED_EVERY, STRENGTHS, TRIAL_TOKENS
from fbn_prune.pruning.library import GAP_TOKENS
from fbn_prune.pruning.search import PLACES, REGIONS, SCALES, TRIED_TOKENS
from fbn_prune.pruning.sensitivity import GRADIENT_TOKENS
from fbn_prune.runs.budget import Budget, by_structure
from fbn_prune.runs.memory import free_memory
from fbn_prune.runs.opening import check_texts
from fbn_prune.runs.prepared import Prepared
from fbn_prune.runs.setup import require_layout
from fbn_prune.runs.stages import KNOCKOUT_TOKENS
from fbn_prune.runs.vocabulary import VocabularyFigures

MEMBERS_PER_NETWORK = 0.041
"""Share of the neurons that are members of one of 64 networks, measured on trained models. The members of K networks
overlap as if drawn independently, to within two points (17 % of all neurons for 5, 35 % for 10, 55 % for 20, 84 % for
40)."""

RECOVERY_PASSES = 8
"""Cost of one pass of the recovery in forward passes: the dense and the cut model forward, layer by layer and as a
whole, and the cut model backward."""

WRITING_PASSES = 4
"""Cost of writing a token in forward passes: one at a time, the weights are read for few tokens at once."""

HIGH_MULTIPLE, START_SECONDS = 3, 10
"""The upper bound of the time: three times the cost of forward passes, cuts and ICA, plus ten seconds to start the
process. In tokens through a layer of N neurons, selecting and refitting its neurons costs 2 N, and its share of an ICA
on t tokens costs t² / 2 N. `eval/speed/bench_memory.py` compares the bounds with measured times."""

MEASURED_TOKENS = {"cpu": 512, "cuda": 4096}
MEASURED_OPERATIONS = {"cpu": 1e10, "cuda": 1e13}
MEASURED_SECONDS = 0.2
"""Limits on the tokens and operations of a timed pass, and the total time of the repeated passes."""


@dataclass(frozen=True)
class Plan:
    """Prediction for a run.

    Attributes
    ----------
    same_budget
        The same budget as `sparsity`, `target_params` and `target_size`.
    memory
        Where weights and hidden states are kept.
    seconds_low, seconds_high
        Range of the time; None if no layer could be timed.
    estimated
        Names of the fields that are estimates.
    vocabulary
        What trimming the vocabulary saves, and does to held-out text; None if it is not trimmed.
    structures
        The parameters of the whole model by structure; empty for a mixture of experts.
    """

    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    neurons_total: int
    neurons_kept: int
    heads_total: int
    heads_kept: int
    widths: list[int]
    same_budget: dict[str, float]
    peak_memory_bytes: int
    memory: str
    seconds_low: float | None
    seconds_high: float | None
    estimated: list[str]
    vocabulary: VocabularyFigures | None = None
    structures: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def plan(prepared: Prepared) -> Plan:
    """Predict the size, memory and time of a prepared run without reading weights; the text is read as the run does."""
    require_layout(prepared)
    if prepared.recipe.forget is not None:
        raise InvalidInput(
            f"forget = {prepared.recipe.forget}: how much goes is measured in the run, so there is no --dry-run of it"
        )
    check_texts(prepared)
    recipe, checkpoint = prepared.recipe, prepared.checkpoint
    total = prepared.neurons
    estimated = ["peak_memory_bytes", "seconds_low", "seconds_high"]
    sizes = ["parameters_after", "bytes_after", "neurons_kept", "widths", "same_budget"]
    if prepared.budget is not None:
        budget = prepared.budget
    elif prepared.networks is not None:
        # Ranking needs the weights; any K networks have about the same number of members.
        count = min(recipe.kept_networks_or_default, len(prepared.networks.maps))
        kept = list(range(count))
        budget = Budget(budget_from_networks(prepared.networks, kept), most=False)
        estimated += sizes
    else:
        # The share holds for 64 networks; fewer networks are larger.
        share = 1 - (1 - MEMBERS_PER_NETWORK) ** recipe.kept_networks_or_default
        budget = Budget(round(total * share), most=False)
        estimated += sizes
    widths = _widths(prepared, budget)
    if recipe.layout != "uniform":
        estimated.append("widths")
    size = prepared.size
    neurons = sum(widths)
    if prepared.rest:  # the budget counts what left-out layers save beside their neurons as neurons
        neurons = min(budget.neurons, total)
        estimated += [name for name in sizes if name not in estimated]
        estimated += ["heads_kept"] if prepared.heads is not None else []
    low, high = seconds_range(prepared) or (None, None)
    return Plan(
        parameters_before=checkpoint.total_parameters,
        parameters_after=size.parameters_with(neurons),
        bytes_before=checkpoint.total_bytes,
        bytes_after=size.bytes_with(neurons),
        neurons_total=total,
        neurons_kept=max(neurons, 0),
        heads_total=prepared.heads_total,
        heads_kept=prepared.heads_kept(),
        widths=widths,
        same_budget={
            "sparsity": round(1 - neurons / total, 4),
            "target_params": size.parameters_with(neurons),
            "target_size": size.bytes_with(neurons) + size.header_bytes,
        },
        peak_memory_bytes=prepared.memory.peak_bytes,
        memory=prepared.memory.words,
        seconds_low=low,
        seconds_high=high,
        estimated=estimated,
        vocabulary=prepared.vocabulary_figures,
        structures=by_structure(checkpoint),
    )


def _widths(prepared: Prepared, budget: Budget) -> list[int]:
    """Return the widths of a uniform layout, or an even split with the same sum as the ragged widths."""
    recipe, multiple = prepared.recipe, prepared.width_multiple
    full = prepared.widths
    neurons = budget.neurons
    if recipe.layout == "ragged":
        widths = ranked_widths(even_scores(full), neurons, multiple, prepared.whole)
        return narrowed(widths, neurons, multiple, prepared.whole) if budget.most else widths
    if budget.most:
        neurons = at_most(neurons, prepared.layers, multiple)
    return uniform_widths(neurons, full, multiple)


def seconds_range(prepared: Prepared) -> tuple[float, float] | None:
    """Return rough bounds of a run's seconds, from timing one decoder layer on the device.

    The lower bound counts the forward passes; see :data:`HIGH_MULTIPLE` for the upper. Neither includes reading a
    streamed model from a slow disk.

    Returns
    -------
    tuple or None
        Lower and upper bound; None if a layer cannot be built, run or held in memory.
    """
    each = _layer_token_seconds(prepared)
    if each is None:
        return None
    passed, more = (each * prepared.layers * tokens for tokens in token_passes(prepared))
    low = passed / processes()
    return low, HIGH_MULTIPLE * (low + more) + START_SECONDS


def token_passes(prepared: Prepared) -> tuple[float, float]:
    """Return the tokens that a run passes through the model, and the cost of its cuts and its ICA in tokens."""
    recipe = prepared.recipe
    shaped = recipe.layout != "uniform"
    by_loss = shaped and recipe.widths in ("loss", "auto")
    searched = recipe.searches_widths
    tried = not searched and (
        recipe.layout == "auto" or (recipe.layout == "ragged" and recipe.widths != "members")
    )
    anew = int(not searched or recipe.fits_in_sequence or recipe.head_sparsity is not None)
    if recipe.recover_cuts > 1:  # otherwise a search may have cut the layers already
        anew = recipe.recover_cuts
    cutting = anew * (3 if recipe.fits_in_sequence else 1)
    passed = recipe.tokens * (cutting + by_loss + tried + searched)
    passed += 2 * round(recipe.tokens * recipe.held_out)
    width = prepared.neurons / prepared.layers
    more = 2 * width * (anew + by_loss + tried + searched)
    if searched:  # each cost takes the layers above, half of them on average
        measured = PLACES * prepared.layers // 4 + 3 + REGIONS * len(SCALES)
        passed += min(recipe.tokens, TRIED_TOKENS) * measured
        again = int(recipe.leaves_out_layers)
        if (heads := prepared.heads) is not None:
            again += len(heads.groups)
            passed += min(recipe.tokens, TRIED_TOKENS) * len(heads.groups) * prepared.layers // 4
        passed += min(recipe.tokens, GAP_TOKENS) * again
    if recipe.needs_networks and prepared.networks is None:
        sampled = min(recipe.network_tokens, recipe.tokens)
        once = prepared.memory.streamed or prepared.memory.keep_activations
        passed += sampled * (1 if once else 3)
        more += sampled**2 / (2 * width)
    if recipe.rank_or_default == "knockout":
        passed += min(recipe.tokens, KNOCKOUT_TOKENS) * (recipe.networks + 1)
    if recipe.task is not None:
        passed += recipe.tokens
    if recipe.needs_gradients:
        passed += 3 * min(recipe.tokens, GRADIENT_TOKENS)  # backward is twice forward
    if tried:
        rules = 2 if recipe.widths == "auto" else 1
        apart = max(2, min(MOST_TRIED_EVERY, recipe.tokens // TRIAL_TOKENS))
        passed += recipe.tokens // apart * (2 + rules * len(STRENGTHS))
    if recipe.writes_text:
        passed += WRITING_PASSES * recipe.tokens
    if recipe.recover:
        trained = recipe.recover_tokens or recipe.recover_passes_or_default * recipe.tokens
        passed += RECOVERY_PASSES * trained
    return passed, more


def _layer_token_seconds(prepared: Prepared) -> float | None:
    """Return the seconds per token of one decoder layer, or None if it cannot run."""
    device = prepared.device
    try:
        model = _one_layer(prepared.checkpoint, prepared.dtype)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        # Twice the weights, because the activations need memory as well.
        if 2 * parameters * prepared.dtype.itemsize > free_memory(device):
            return None
        _fill(model, device)
        most = min(MEASURED_TOKENS[device.type], prepared.context)
        tokens = max(16, min(most, int(MEASURED_OPERATIONS[device.type] / (2 * parameters))))
        ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
        with torch.inference_mode():
            _timed(model, ids)  # warm-up
            took = [_timed(model, ids)]
            while sum(took) < MEASURED_SECONDS:
                took.append(_timed(model, ids))
    except Exception:  # an unusual config or a full device; the rest of the plan is still valid
        return None
    return min(took) / tokens


def _one_layer(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """Return the architecture with one decoder layer of the mean width and 8 tokens of vocabulary, without weights."""
    widths = checkpoint.family.widths(checkpoint.config)
    mean = [sum(widths) // len(widths)] * len(widths)
    config = copy.deepcopy(as_config(checkpoint.family.with_widths(checkpoint.config, mean)))
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == config.num_hidden_layers:  # one entry a layer
            setattr(config, key, value[:1])
    config.num_hidden_layers, config.vocab_size, config.use_cache = 1, 8, False
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=False
        )
    return model.eval()


def _fill(model: PreTrainedModel, device: torch.device) -> None:
    """Give the model random weights on the device."""
    generator = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = torch.empty_like(parameter, device=device).uniform_(
                -0.02, 0.02, generator=generator
            )
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    model.to(device)  # type: ignore[arg-type]


def _timed(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Return the seconds of one forward pass."""
    start = time.perf_counter()
    model(ids).logits.sum().item()  # waits for a GPU
    return time.perf_counter() - start
