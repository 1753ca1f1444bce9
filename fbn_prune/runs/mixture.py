"""The main job on a mixture of experts: calibrate, cut the experts, measure, write.

A mixture is pruned in memory, in one process. What the main job can do with other models and not with these is refused
by name before any work.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass

from fbn_prune import distributed
from fbn_prune.data.calibration import Batch, CalibrationData, calibration_data
from fbn_prune.errors import FbnPruneError, InvalidInput
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.mixture_adapter import MixtureAdapter
from fbn_prune.model.mixture_checkpoint import load_mixture, open_mixture
from fbn_prune.model.mixture_family import MixtureFamily
from fbn_prune.model.perplexity import NonFiniteLogits, perplexity
from fbn_prune.progress import StageClock
from fbn_prune.pruning.criteria import CRITERIA, NEED_NETWORKS
from fbn_prune.pruning.evidence import CutOptions
from fbn_prune.pruning.mixture_cutting import CutExperts, MixturePlan, cut_experts
from fbn_prune.recipe import Recipe
from fbn_prune.runs.early_checks import check_places
from fbn_prune.runs.mixture_output import publish_mixture
from fbn_prune.runs.result import PruneResult, peak_memory_bytes
from fbn_prune.runs.second_run import output_locked
from fbn_prune.runs.setup import MAX_CONTEXT, check_context, chosen_device, chosen_dtype
from fbn_prune.runs.stages import no_better_than_guessing

BATCH_TOKENS = 8192
"""Tokens of a forward batch."""

WIDE = 512
"""Experts of this width and more are cut to multiples of 64, which fast kernels want; narrower ones of 8."""

ALIGNED = 8
"""All widths are multiples of this: transformers' kernels for experts want rows of 16 bytes, 8 numbers in bfloat16."""

_REFUSED = (
    "keep_networks",
    "networks_from",
    "report_networks",
    "head_sparsity",
    "task",
    "forget",
    "target_params",
    "target_size",
    "layout",
    "structures",
    "widths",
    "keep_layers",
    "loss_aware",
    "recover",
    "vocabulary",
    "memory_budget",
    "keep_unused_tensors",
)
"""Keys of what is not done on mixtures."""

_OF_NETWORKS = ("keep_networks", "networks_from")
"""Those that `discover`, `rank` and `ablate` read all the same."""


@dataclass(frozen=True)
class OpenMixture:
    """A mixture's open checkpoint, its calibration data and its model in memory."""

    recipe: Recipe
    checkpoint: Checkpoint
    family: MixtureFamily
    data: CalibrationData
    adapter: MixtureAdapter
    clock: StageClock

    @property
    def options(self) -> CutOptions:
        """Settings of the cuts."""
        recipe = self.recipe
        return CutOptions(
            sequential=recipe.sequential,
            damping=recipe.damping,
            refit_damping=recipe.refit_damping,
            seed=recipe.seed,
            round_to=self.checkpoint.storage_dtype,
        )

    @property
    def calibrating(self) -> list[Batch]:
        """Batches of the calibration text."""
        return self.data.calibrating.batches(BATCH_TOKENS)

    def cuts(self, plans: dict[str, MixturePlan]) -> tuple[dict[str, CutExperts], float]:
        """Make the cuts of several plans, and note what the user should know of them."""
        made, seconds = cut_experts(
            self.adapter, self.calibrating, plans, self.options, clock=self.clock
        )
        for line in dict.fromkeys(line for cuts in made.values() for line in cuts.lines()):
            self.clock.note(f"warning: {line}")
        return made, seconds

    def perplexity(self, stage: str) -> float:
        """Return the held-out perplexity of the model as it is now.

        Raises
        ------
        NonFiniteLogits
            The model outputs NaN or Inf.
        """
        held_out = self.data.held_out
        with self.clock.stage(stage, held_out.tokens, "tokens") as advance:
            return perplexity(self.adapter, held_out.batches(BATCH_TOKENS), advance)

    def dense_perplexity(self) -> float:
        """Measure the uncut model, and refuse one that is no better than guessing.

        Raises
        ------
        InvalidInput
            It is not, or its logits are not finite.
        """
        try:
            found = self.perplexity("dense perplexity")
        except NonFiniteLogits:
            raise InvalidInput(
                f"{self.recipe.model}: the unpruned model outputs NaN or Inf: the checkpoint is damaged, or the "
                "compute type overflows (try --dtype float32)"
            ) from None
        vocabulary = self.family.vocab_size(self.checkpoint.config)
        if no_better_than_guessing(found, vocabulary) and not self.recipe.allow_untrained:
            raise InvalidInput(
                f"{self.recipe.model}: the unpruned model's perplexity is {found:,.0f} with a vocabulary of "
                f"{vocabulary:,} tokens, no better than guessing: allow_untrained (--allow-untrained) goes on all "
                "the same"
            )
        return found


def refuse_for_mixtures(recipe: Recipe, *, networks: bool = False) -> None:
    """Refuse what is not done on mixtures of experts.

    Parameters
    ----------
    networks
        Whether functional networks are studied, and not the model pruned.

    Raises
    ------
    InvalidInput
        The recipe asks for it.
    """
    if distributed.world() > 1:
        raise InvalidInput(
            "mixtures of experts are pruned in one process: start it without torchrun"
        )
    refused = [key for key in _REFUSED if not (networks and key in _OF_NETWORKS)]
    for key in refused:
        value = getattr(recipe, key)
        if value != type(recipe).model_fields[key].default:
            raise InvalidInput(
                f"{key} = {value}: not done on mixtures of experts: leave it out (docs/mixtures.md says what is)"
            )
    if recipe.criterion not in CRITERIA or recipe.criterion in NEED_NETWORKS:
        raise InvalidInput(
            f"criterion = {recipe.criterion}: not done on mixtures of experts: choose another"
        )


def checked_mixture(recipe: Recipe, *, networks: bool = False) -> Checkpoint:
    """Check everything that a recipe names but its text, and return the open checkpoint.

    Parameters
    ----------
    networks
        Whether functional networks are studied, and not the model pruned.

    Raises
    ------
    InvalidInput
        Something cannot be used, or is not done on mixtures of experts.
    """
    refuse_for_mixtures(recipe, networks=networks)
    checkpoint = open_mixture(recipe.model, trust_remote_code=recipe.trust_remote_code)
    family = checkpoint.family
    assert isinstance(family, MixtureFamily)
    check_places(recipe, checkpoint.path, checkpoint.total_bytes)
    chosen_device(recipe.device)
    check_context(recipe, family.context_length(checkpoint.config))
    if recipe.experts is not None:
        family.check_count(recipe.experts)
    return checkpoint


def open_mixture_run(recipe: Recipe, checkpoint: Checkpoint, clock: StageClock) -> OpenMixture:
    """Read the text of a checked recipe and load its model.

    Raises
    ------
    InvalidInput
        The text cannot be used, or the model cannot run.
    """
    family = checkpoint.family
    assert isinstance(family, MixtureFamily)
    device = chosen_device(recipe.device)
    dtype = chosen_dtype(recipe.dtype, device, checkpoint.storage_dtype)
    longest = family.context_length(checkpoint.config)
    with clock.stage("calibration"):
        data = calibration_data(
            recipe.calibration,
            checkpoint.load_tokenizer(),
            tokens=recipe.tokens,
            context=recipe.context or min(longest, MAX_CONTEXT),
            held_out=recipe.held_out,
            seed=recipe.seed,
            vocabulary=family.vocab_size(checkpoint.config),
            note=clock.note,
        )
    with clock.stage("load"):
        adapter = load_mixture(checkpoint, device, dtype)
    return OpenMixture(recipe, checkpoint, family, data, adapter, clock)


def width_for(family: MixtureFamily, kept: float, multiple: int | None) -> int:
    """Return the width of the experts that keeps about this share of their neurons.

    Parameters
    ----------
    multiple
        Widths are multiples of this. Default: 64, or 8 for narrower experts than :data:`WIDE`.

    Raises
    ------
    InvalidInput
        An expert is narrower than the multiple, or the config can state no width but the present one.
    """
    full = family.expert_width
    multiple = multiple or min(64 if full >= WIDE else 8, full)
    widths = [
        width
        for width in range(multiple, full, multiple)
        if width % ALIGNED == 0 and family.states_width(width)
    ]
    if not widths:
        raise InvalidInput(
            f"width_multiple = {multiple}: no multiple of it and of {ALIGNED} is a width for experts of {full} "
            "neurons: give another"
        )
    return min(widths, key=lambda width: (abs(width - kept * full), width))


def plan_of(recipe: Recipe, family: MixtureFamily) -> MixturePlan:
    """Return how a recipe cuts a mixture.

    Raises
    ------
    InvalidInput
        It does not say, or says what the model does not allow.
    """
    if recipe.stated_budget is None:
        raise InvalidInput(
            f"{recipe.model} is a mixture of experts: give --sparsity (neurons of each expert), --experts (whole "
            "experts to keep in each layer), or both"
        )
    count, width = family.count, family.expert_width
    if recipe.experts is not None:
        family.check_count(recipe.experts)
        count = recipe.experts
    if recipe.sparsity is not None:
        width = width_for(family, 1 - recipe.sparsity, recipe.width_multiple)
    return MixturePlan(count, width, recipe.expert_criterion, recipe.criterion)


def run_mixture(recipe: Recipe, clock: StageClock) -> PruneResult:
    """Run the main job on a mixture of experts; without an `output`, nothing is written.

    Raises
    ------
    InvalidInput
        The recipe cannot be used.
    FbnPruneError
        The pruned model does not work, or the output cannot be written.
    """
    checkpoint = checked_mixture(recipe)
    assert isinstance(checkpoint.family, MixtureFamily)
    plan = plan_of(recipe, checkpoint.family)
    with nullcontext() if recipe.output is None else output_locked(recipe.output):
        return prune_open(open_mixture_run(recipe, checkpoint, clock), plan)


def prune_open(on: OpenMixture, plan: MixturePlan) -> PruneResult:
    """Cut an open mixture by a plan, measure it, and write it if its recipe has an output.

    Raises
    ------
    FbnPruneError
        The pruned model does not work, or the output cannot be written.
    """
    family, adapter, clock, recipe = on.family, on.adapter, on.clock, on.recipe
    for line in _notes(recipe, family, plan):
        clock.note(line)
    before = on.dense_perplexity()
    made, seconds = on.cuts({"": plan})
    adapter.cut_experts(made[""].cuts, round_to=on.options.round_to)
    try:
        after = on.perplexity("pruned perplexity")
    except NonFiniteLogits:
        after = math.inf
    if not math.isfinite(after):
        raise FbnPruneError(
            "the pruned model outputs NaN or Inf: nothing was written; keep more, raise --tokens, or use --dtype "
            "float32"
        )
    result = _result(on, plan, before, after, seconds, made[""])
    if recipe.output is not None:
        publish_mixture(recipe, on.checkpoint, adapter, made[""].cuts, result, clock)
    result.stages = dict(clock.seconds)
    result.peak_memory_bytes = peak_memory_bytes()
    return result


def _notes(recipe: Recipe, family: MixtureFamily, plan: MixturePlan) -> list[str]:
    lines = []
    if recipe.sparsity is not None:
        wanted = (1 - recipe.sparsity) * family.expert_width
        if abs(plan.width - wanted) >= 1:
            lines.append(
                f"each expert keeps {plan.width} of {family.expert_width} neurons, the nearest width to {wanted:.0f} "
                "that the config and --width-multiple allow"
            )
    if family.top_k_of(plan.experts) < family.top_k:
        lines.append(
            f"a token is sent to {family.top_k_of(plan.experts)} experts instead of {family.top_k}: no more are left"
        )
    return lines


def _result(
    on: OpenMixture,
    plan: MixturePlan,
    before: float,
    after: float,
    seconds: float,
    made: CutExperts,
) -> PruneResult:
    family, recipe, checkpoint = on.family, on.recipe, on.checkpoint
    layers = len(family.mlp_layers)
    return PruneResult(
        model_name=recipe.model,
        output=None if recipe.output is None else str(recipe.output),
        criterion=recipe.criterion,
        parameters_before=checkpoint.total_parameters,
        parameters_after=checkpoint.total_parameters,
        bytes_before=checkpoint.total_bytes,
        bytes_after=checkpoint.total_bytes,
        perplexity_before=before,
        perplexity_after=after,
        perplexity_expected=None,
        warning="; ".join(made.lines()) or None,
        neurons_kept=plan.experts * plan.width * layers,
        neurons_total=family.count * family.expert_width * layers,
        heads_kept=0,
        heads_total=0,
        widths=[plan.width] * layers,
        width_rule="uniform",
        layout_trials={},
        layers_left_out=[],
        search=None,
        kept_networks=[],
        ranked_networks=[],
        calibration_tokens=on.data.calibrating.tokens,
        held_out_tokens=on.data.held_out.tokens,
        calibration_fingerprint=on.data.calibrating.fingerprint,
        task=None,
        forward_seconds=seconds,
        peak_memory_bytes=0,
        experts=(family.count, plan.experts),
    )
