"""The stages of the main job on an open mixture of experts; those that differ from other models' are here."""

from __future__ import annotations

from fbn_prune.distributed import is_first
from fbn_prune.errors import FbnPruneError
from fbn_prune.model.mixture_adapter import MixtureAdapter
from fbn_prune.model.mixture_family import MixtureFamily
from fbn_prune.pruning.allocation import budget_from_networks
from fbn_prune.pruning.block_cutting import MixturePlan
from fbn_prune.pruning.evidence import CutOptions
from fbn_prune.pruning.mixture_cutting import CutExperts, cut_experts
from fbn_prune.runs.mixture_output import publish_mixture
from fbn_prune.runs.mixture_setup import notes_of, plan_of
from fbn_prune.runs.opening import OpenRun
from fbn_prune.runs.prune import PruneRun
from fbn_prune.runs.result import PruneResult, peak_memory_bytes


def options_of(on: OpenRun) -> CutOptions:
    """Return the settings of the cuts of a run."""
    recipe = on.prepared.recipe
    return CutOptions(
        sequential=recipe.sequential,
        damping=recipe.damping,
        refit_damping=recipe.refit_damping,
        seed=recipe.seed,
        round_to=on.prepared.checkpoint.storage_dtype,
    )


def experts_of(on: OpenRun) -> tuple[MixtureAdapter, MixtureFamily]:
    """Return the adapter and the family of a run on a mixture of experts."""
    adapter, family = on.adapter, on.prepared.family
    assert isinstance(adapter, MixtureAdapter)
    assert isinstance(family, MixtureFamily)
    return adapter, family


class MixtureRun(PruneRun):
    """The main job on an open mixture of experts."""

    plan: MixturePlan
    made: CutExperts

    def lay_out(self) -> None:
        """Decide how many experts stay and how wide they are; the kept networks set the width if nothing else does."""
        _, family = experts_of(self.on)
        covered = None
        if self.networks is not None and self.recipe.stated_budget is None:
            covered = budget_from_networks(self.networks, self.kept) / self.prepared.neurons
        self.plan = plan_of(self.recipe, family, covered)
        for line in notes_of(self.recipe, family, self.plan):
            self.clock.note(line)

    def cut(self) -> None:
        adapter, _ = experts_of(self.on)
        made, self.seconds = cut_experts(
            adapter,
            self.blocks.batches(self.prepared.batch_tokens),
            {"": self.plan},
            options_of(self.on),
            clock=self.clock,
            store=self.store,
        )
        self.made = made[""]
        adapter.cut_experts(self.made.cuts, round_to=options_of(self.on).round_to)

    def measure(self) -> None:
        self.warnings = self.made.lines()
        for line in self.warnings:
            self.clock.note(f"warning: {line}")
        after = self._pruned_perplexity("pruned")
        if after is None:
            raise FbnPruneError(
                "the pruned model outputs NaN or Inf: nothing was written; keep more, raise --tokens, or use --dtype "
                "float32"
            )
        self.after = after

    @property
    def _removed(self) -> float:
        _, family = experts_of(self.on)
        return 1 - self.plan.experts * self.plan.width / (family.count * family.expert_width)

    def publish(self) -> PruneResult:
        result = self._result()
        if self.recipe.output is not None and is_first():
            adapter, _ = experts_of(self.on)
            publish_mixture(
                self.prepared,
                adapter,
                self.made.cuts,
                self.networks,
                result,
                self.clock,
                store=self.store,
            )
        result.stages = dict(self.clock.seconds)
        result.peak_memory_bytes = peak_memory_bytes()
        return result

    def _result(self) -> PruneResult:
        _, family = experts_of(self.on)
        plan = self.plan
        layers = len(family.mlp_layers)
        return PruneResult(
            **self._known(),
            criterion=self.recipe.criterion,
            perplexity_expected=None,
            neurons_kept=plan.experts * plan.width * layers,
            neurons_total=family.count * family.expert_width * layers,
            heads_kept=0,
            heads_total=0,
            widths=[plan.width] * layers,
            width_rule="uniform",
            layout_trials={},
            layers_left_out=[],
            search=None,
            forward_seconds=self.seconds,
            experts=(family.count, plan.experts),
        )
