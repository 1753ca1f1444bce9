"""The stages of the main job on an open model: discover, rank, prune, measure, recover, export.

:func:`fbn_prune.runs.main_job.run_prune` opens the model; the output appears when it is complete.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from fbn_prune.data.calibration import TokenBlocks
from fbn_prune.distributed import is_first
from fbn_prune.errors import FbnPruneError
from fbn_prune.model.depth import Depth
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.networks.task_matching import MatchedCalibration
from fbn_prune.pruning.allocation import member_scores
from fbn_prune.pruning.cutting import (
    CutModel,
    CutPlan,
    cut_as_tried,
    cut_layers,
)
from fbn_prune.pruning.evidence import CutOptions
from fbn_prune.pruning.finished import keep_finished
from fbn_prune.pruning.layout import Layout, Subject
from fbn_prune.pruning.prediction import advice, check_rise, predicted_rise
from fbn_prune.pruning.recovery.gain import Recovery
from fbn_prune.pruning.search import Searched
from fbn_prune.runs.choices import chosen_layout, kept_networks, layout_request, verdict
from fbn_prune.runs.forget import Forgetting, choose_cut, plan_forgetting, without_like
from fbn_prune.runs.kept import artifact, numbers
from fbn_prune.runs.opening import OpenRun
from fbn_prune.runs.output import publish
from fbn_prune.runs.perplexities import dense_perplexity, perplexity_on_task, pruned_perplexity
from fbn_prune.runs.progressive import cut_in_steps
from fbn_prune.runs.result import PruneResult, peak_memory_bytes
from fbn_prune.runs.stages import (
    find_networks,
    loss_roots_of,
    match_to_task,
    rank_networks,
    recover_model,
    recovery_text,
    refuse_guessing,
)
from fbn_prune.store import Store


class PruneRun:
    """The main job on an open model, one method per stage; stages that the store holds are not computed again."""

    networks: FunctionalNetworks | None
    matched: MatchedCalibration | None
    blocks: TokenBlocks
    """Text of the statistics: the calibration blocks, or those of `matched`."""
    ranked: list[int]
    kept: list[int]
    subject: Subject
    widths: Layout
    searched: Searched | None = None
    """A search of widths whose cuts are the final ones; None if the layers are cut anew, or were by an earlier run."""
    pruned: CutModel
    recovery: Recovery | None = None
    forgetting: Forgetting | None
    forgotten: dict[str, Any] | None
    cut_plan: CutPlan

    def __init__(self, on: OpenRun, store: Store) -> None:
        self.on, self.store, self.clock = on, store, on.clock
        self.prepared, self.recipe, self.adapter = on.prepared, on.prepared.recipe, on.adapter
        self.held_out = on.data.held_out.batches(on.prepared.batch_tokens)

    def run(self) -> PruneResult:
        """Run all stages in order and return the result."""
        self.resume()
        self.measure_dense()
        self.find()
        self.forget()
        self.match()
        self.rank()
        self.lay_out()
        self.cut()
        self.measure()
        self.recover()
        self.advise()
        return self.publish()

    def resume(self) -> None:
        """Drop stored stages that were made from another text, and tell the user what is left."""
        if self.store.bind(self.on.texts):
            self.clock.note("the calibration text has changed: all stages run again")
        if self.store.started:
            self.clock.note(f"continuing from {self.store.words}")

    def measure_dense(self) -> None:
        self.before = numbers(self.store, "dense", lambda: dense_perplexity(self.on, self.held_out))
        refuse_guessing(self.on, self.before)
        self.before_on_task = numbers(self.store, "dense-task", lambda: perplexity_on_task(self.on))

    def find(self) -> None:
        """Load the networks of the recipe's file, or discover them if they are needed."""
        self.networks = self.prepared.networks
        if self.networks is None and self.recipe.needs_networks:
            self.networks = artifact(self.store, lambda: find_networks(self.on))

    def forget(self) -> None:
        """Leave out the text that is like the skill to forget; perplexities are then those of the other text."""
        self.forgetting = self.forgotten = None
        if self.recipe.forget is None:
            return
        assert self.networks is not None
        self.forgetting = what = plan_forgetting(self.on, self.networks, self.store)
        self.on = without_like(self.on, what)
        self.held_out = self.on.data.held_out.batches(self.prepared.batch_tokens)
        self.measured = what.measured.batches(self.prepared.batch_tokens)
        self.shown = what.examples.batches(self.prepared.batch_tokens)
        self.before, self.skill_before = numbers(
            self.store,
            "dense-rest",
            lambda: [dense_perplexity(self.on, part) for part in (self.held_out, self.measured)],
        )

    def match(self) -> None:
        self.matched = match_to_task(self.on, self.networks, self.store)
        self.blocks = self.on.data.calibrating if self.matched is None else self.matched.blocks
        if self.recipe.recover:
            recovery_text(self.on, self.blocks)  # refused before the model is cut

    def rank(self) -> None:
        if self.forgetting is not None:  # what is cut depends on the examples
            self.ranked, self.kept = [], []
            return
        self.ranked = numbers(
            self.store, "ranking", lambda: rank_networks(self.on, self.networks, self.matched)
        )
        self.kept = kept_networks(self.recipe, self.ranked)

    def lay_out(self) -> None:
        """Decide how many neurons each layer keeps."""
        prepared, recipe = self.prepared, self.recipe
        options = CutOptions(
            sequential=recipe.fits_in_sequence,
            damping=recipe.damping,
            refit_damping=recipe.refit_damping,
            seed=recipe.seed,
            round_to=prepared.checkpoint.storage_dtype,
            loss_aware=recipe.loss_aware,
            head_groups=prepared.head_groups,
        )
        self.subject = Subject(
            self.adapter,
            self.blocks,
            prepared.batch_tokens,
            recipe.criterion,
            options,
            self.networks,
            self.kept,
            loss_roots_of(self.on, self.blocks, self.store),
            prepared.memory.scratch,
        )
        if self.forgetting is not None:
            self.cut_plan, self.forgotten = choose_cut(
                self.on, self.subject, self.forgetting, self.store
            )
            self.widths = Layout(list(self.cut_plan.widths), "forget")
            self.subject = replace(self.subject, criterion=self.cut_plan.criterion)
            return
        members = None if self.networks is None else member_scores(self.networks, self.kept)
        request = layout_request(prepared, self.networks, self.kept)

        def choose() -> dict[str, Any]:
            layout, self.searched = chosen_layout(prepared, self.subject, request, self.clock)
            if self.searched is not None:  # before the widths, which stand for them as well
                keep_finished(self.store, self.searched.finished())
            return asdict(layout)

        self.widths = Layout(**numbers(self.store, "layout", choose))
        self.cut_plan = CutPlan(
            recipe.criterion,
            self.widths.widths,
            members,
            self.widths.left_out,
            head_groups=self.widths.head_groups,
        )
        if recipe.layout == "auto":
            self.clock.note(verdict(self.widths))

    def cut(self) -> None:
        subject = self.subject
        if self.searched is not None and self.recipe.recover_cuts == 1:
            self.pruned = cut_as_tried(
                self.adapter,
                self.searched.finished(),
                subject.options,
                forward_seconds=self.searched.forward_seconds,
                clock=self.clock,
            )
            return
        if self.recipe.recover_cuts > 1:
            self.pruned = cut_in_steps(self.on, subject, self.cut_plan, self.store)
            return
        self.pruned = cut_layers(
            self.adapter,
            self.blocks.batches(self.prepared.batch_tokens),
            self.cut_plan,
            subject.options,
            loss_roots=subject.loss_roots if self.recipe.loss_aware else None,
            skill=() if self.cut_plan.erase is None else self.shown,
            clock=self.clock,
            store=self.store,
        )

    @property
    def _removed(self) -> float:
        """Share of the neurons that the cut removes."""
        return 1 - sum(self.widths.widths) / self.prepared.neurons

    def measure(self) -> None:
        """Measure the cut model's perplexity, and compare it with the one that the errors of the cuts predict."""
        checkpoint = self.prepared.checkpoint
        after = self._pruned_perplexity("pruned")
        if after is None:
            raise FbnPruneError(
                "the pruned model outputs NaN or Inf: nothing was written; keep more neurons, raise --tokens, or use "
                "--dtype float32"
            )
        self.after = after
        self.expected = predicted_rise(self.pruned.relative_errors)
        vocabulary = self.prepared.family.vocab_size(checkpoint.config)
        warning = check_rise(self.before, self.after, self.expected, vocabulary)
        if warning is not None:
            self.clock.note(f"warning: {warning}")
        if self.forgotten is not None:
            self.forgotten |= {
                "perplexity_before": self.skill_before,
                "perplexity_after": numbers(
                    self.store,
                    "pruned-skill",
                    lambda: pruned_perplexity(self.adapter, self.measured, self.clock),
                ),
            }
        # The oddities were shown when the checkpoint was opened; the result repeats them.
        self.warnings = [line for line in (checkpoint.oddities(), warning) if line is not None]

    def recover(self) -> None:
        """Train the cut model; keep what has the lower perplexity."""
        if not self.recipe.recover:
            return
        last = self.recipe.recover_cuts - 1
        ended = recover_model(self.on, self.blocks, self.store, last)
        recovered = None if ended.trained is None else self._pruned_perplexity("recovered")
        self.recovery = Recovery.measured(
            self.before, self.after, recovered, ended.passes, ended.tokens, ended.curve
        )
        warnings = [*ended.warnings]
        if recovered is not None and self.recovery.kept:
            self.pruned, self.after = replace(self.pruned, trained=ended.trained), recovered
        else:
            ended.restore()
            warnings.append(_not_kept(self.recovery))
        for warning in warnings:
            self.clock.note(f"warning: {warning}")
        self.warnings += warnings

    def advise(self) -> None:
        """Warn of a model that few people would use as it is."""
        multiple = self.after / self.before
        if (todo := advice(multiple, self._removed, recovered=self.recipe.recover)) is not None:
            warning = f"the perplexity is {multiple:.2g} times the dense model's: {todo}"
            self.clock.note(f"warning: {warning}")
            self.warnings.append(warning)

    def publish(self) -> PruneResult:
        """Write the output if the recipe has one, and return the result."""
        result = self._result()
        if self.recipe.output is not None and is_first():
            publish(
                self.prepared,
                self.pruned,
                self.networks,
                result,
                self.clock,
                depth=self._depth,
                store=self.store,
            )
        result.stages = dict(self.clock.seconds)
        result.peak_memory_bytes = peak_memory_bytes()
        return result

    @property
    def _depth(self) -> Depth | None:
        """The layers that stay; None if all do."""
        left_out = self.widths.left_out
        return Depth(self.prepared.layers, left_out) if left_out else None

    @property
    def _head_groups(self) -> list[int] | None:
        """The groups of attention heads of each layer that stays; None if they were not searched."""
        found = self.widths.head_groups
        if found is None:
            return None
        return [groups for layer, groups in enumerate(found) if layer not in self.widths.left_out]

    def _pruned_perplexity(self, name: str) -> float | None:
        found: float | None = numbers(
            self.store, name, lambda: pruned_perplexity(self.adapter, self.held_out, self.clock)
        )
        return found

    def _result(self) -> PruneResult:
        """Return the result; sizes after the cut are filled in when the output is written."""
        prepared = self.prepared
        return PruneResult(
            **self._known(),
            criterion=self.subject.criterion,
            perplexity_expected=self.expected.perplexity(self.before),
            neurons_kept=sum(self.widths.widths),
            neurons_total=prepared.neurons,
            heads_kept=prepared.heads_kept(self.widths),
            heads_total=prepared.heads_total,
            widths=[width for width in self.widths.widths if width],
            layers_left_out=sorted(self.widths.left_out),
            head_groups=self._head_groups,
            width_rule=self.widths.rule,
            layout_trials=self.widths.trials,
            search=self.widths.search,
            forward_seconds=self.pruned.forward_seconds,
            recovery=self.recovery,
            vocabulary=prepared.vocabulary_figures,
            forgotten=self.forgotten,
        )

    def _known(self) -> dict[str, Any]:
        """The fields of the result that are the same for models of every kind."""
        recipe, checkpoint = self.recipe, self.prepared.checkpoint
        return {
            "model_name": recipe.model,
            "output": None if recipe.output is None else str(recipe.output),
            "parameters_before": checkpoint.total_parameters,
            "parameters_after": checkpoint.total_parameters,
            "bytes_before": checkpoint.total_bytes,
            "bytes_after": checkpoint.total_bytes,
            "perplexity_before": self.before,
            "perplexity_after": self.after,
            "warning": "; ".join(self.warnings) or None,
            "kept_networks": self.kept,
            "ranked_networks": self.ranked,
            "calibration_tokens": self.blocks.tokens,
            "held_out_tokens": self.on.data.held_out.tokens,
            "calibration_fingerprint": self.blocks.fingerprint,
            "task": self._task_facts(),
            "peak_memory_bytes": 0,
        }

    def _task_facts(self) -> dict[str, Any] | None:
        task, matched = self.on.task, self.matched
        if task is None or matched is None:
            return None
        facts = {
            "file": task.task.source,
            "examples": len(task.task.examples),
            "tokens": task.examples.tokens,
            "matched_networks": matched.match.networks,
            "effective_documents": matched.effective_documents,
            "documents": len(matched.match.weights),
            "left_out": task.left_out,
            "passed_over": task.task.passed_over,
            "test_questions": len(task.task.test),
        }
        if self.before_on_task is not None:
            after = numbers(self.store, "pruned-task", lambda: perplexity_on_task(self.on))
            facts |= {
                "test_perplexity_before": self.before_on_task,
                "test_perplexity_after": after,
            }
        return facts


def _not_kept(recovery: Recovery) -> str:
    """Return one line on why a recovery is not kept, and what may help."""
    cut, recovered = recovery.perplexity_cut, recovery.perplexity_recovered
    if recovered is None:
        return (
            "the recovery ended in NaN or Inf, so the model is left as it was cut: compute in --dtype float32, or "
            "recover on other text"
        )
    return (
        f"the recovery raised the perplexity from {cut:.4g} to {recovered:.4g}, so the model is left as it was cut: "
        "recover on more text (--tokens), or on text more like the held-out share"
    )
