"""The main job, from a recipe to a smaller checkpoint: calibrate, discover, rank, prune, measure, export.

Everything that can be refused is refused in :func:`prepare`, before any work; nothing appears at the output path
until all of it is written.
"""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fbn_prune import builtin
from fbn_prune.budget import Budget, stated_budget, whole_layers
from fbn_prune.calibration import Batch, CalibrationData, TokenBlocks, calibration_data
from fbn_prune.errors import FbnPruneError, InvalidInput
from fbn_prune.export.card import CardFacts, model_card, source_license
from fbn_prune.export.ragged import write_ragged_checkpoint
from fbn_prune.export.writer import (
    atomic_directory,
    check_output,
    verify_export,
    write_checkpoint,
)
from fbn_prune.matching import (
    MatchedCalibration,
    Task,
    TaskCalibration,
    match_calibration,
    task_calibration,
)
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.families import Family
from fbn_prune.networks.discovery import DiscoveryOptions, discover
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.networks.ranking import knockout_rise, output_energy, strongest_first
from fbn_prune.perplexity import perplexity
from fbn_prune.progress import StageClock
from fbn_prune.pruning.allocation import budget_from_networks, default_multiple, member_scores
from fbn_prune.pruning.layout import UNIFORM, Layout, LayoutRequest, Subject, choose_layout
from fbn_prune.pruning.pipeline import CutModel, CutOptions, cut_layers
from fbn_prune.pruning.second_order import loss_root
from fbn_prune.recipe import Recipe
from fbn_prune.sensitivity import GRADIENT_TOKENS, output_sensitivity
from fbn_prune.task_data import RECORD_NAME, record

MAX_CONTEXT = 2048
KNOCKOUT_TOKENS = 8192
"""Calibration tokens on which knock-outs are measured: one pass a network must stay cheap."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Prepared:
    """What a recipe names, opened and checked, and nothing loaded yet."""

    recipe: Recipe
    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    context: int
    width_multiple: int
    networks: FunctionalNetworks | None
    budget: Budget | None
    """None where the kept networks set it."""
    whole: frozenset[int]
    """Layers that keep every neuron."""
    task: Task | None = None

    @property
    def family(self) -> Family:
        return self.checkpoint.family

    @property
    def width(self) -> int:
        return self.family.width(self.checkpoint.config)

    @property
    def layers(self) -> int:
        return self.family.num_layers(self.checkpoint.config)

    @property
    def batch_tokens(self) -> int:
        """Tokens of one forward batch: enough to fill the device, few enough to stay in its caches."""
        return 16384 if self.device.type == "cuda" else 4096


@dataclass
class PruneResult:
    """What a run did; :meth:`to_json` is the object that `--json` prints."""

    model: str
    output: str | None
    criterion: str
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    perplexity_before: float
    perplexity_after: float
    neurons_kept: int
    neurons_total: int
    widths: list[int]
    width_rule: str
    layout_trials: dict[str, float]
    kept_networks: list[int]
    calibration_tokens: int
    held_out_tokens: int
    calibration_fingerprint: str
    task: dict[str, Any] | None
    forward_seconds: float
    peak_memory_bytes: int
    stages: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def prepare(recipe: Recipe) -> Prepared:
    """Open and check everything that a recipe names.

    Raises
    ------
    InvalidInput
        The checkpoint, the output place, the device, the context or the networks cannot be used.
    """
    source = str(builtin.model_path()) if recipe.model == "builtin" else recipe.model
    checkpoint = Checkpoint.open(source, trust_remote_code=recipe.trust_remote_code)
    if recipe.output is not None:
        check_output(
            recipe.output, recipe.overwrite, checkpoint.path, needed_bytes=checkpoint.total_bytes
        )
    family = checkpoint.family
    longest = family.context_length(checkpoint.config)
    if recipe.context is not None and recipe.context > longest:
        raise InvalidInput(f"context = {recipe.context}: the model was made for {longest} at most")
    width = family.width(checkpoint.config)
    layers = family.num_layers(checkpoint.config)
    multiple = recipe.width_multiple or min(default_multiple(width), width)
    if multiple > width:
        raise InvalidInput(f"width_multiple = {multiple}: a layer has only {width} neurons")
    if recipe.networks > width * layers - 1:
        raise InvalidInput(f"networks = {recipe.networks}: the model has {width * layers} neurons")
    networks = None
    if recipe.networks_from is not None:
        networks = FunctionalNetworks.load(recipe.networks_from)
        if list(networks.widths) != [width] * layers:
            raise InvalidInput(
                f"{recipe.networks_from} was found on layers of {networks.widths}, "
                f"the model has {layers} of {width}"
            )
        if recipe.kept_networks_or_default > len(networks.maps):
            raise InvalidInput(
                f"keep_networks = {recipe.kept_networks_or_default}: {recipe.networks_from} holds "
                f"{len(networks.maps)} networks"
            )
    device = _device(recipe.device)
    dtype = _dtype(recipe.dtype, device, checkpoint)
    context = recipe.context or min(longest, MAX_CONTEXT)
    whole = whole_layers(recipe, layers)
    least = len(whole) * width + (layers - len(whole)) * multiple
    budget = stated_budget(recipe, checkpoint, least)
    task = None if recipe.task is None else Task.read(recipe.task, recipe.task_test)
    return Prepared(
        recipe, checkpoint, device, dtype, context, multiple, networks, budget, whole, task
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InvalidInput(f"device = {name!r}: write auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise InvalidInput(f"device = {name!r}: write auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidInput(f"device = {name!r}: {torch.cuda.device_count()} CUDA devices are here")
    return device


def _dtype(name: str, device: torch.device, checkpoint: Checkpoint) -> torch.dtype:
    if name != "auto":
        return _DTYPES[name]
    return torch.float32 if device.type == "cpu" else checkpoint.storage_dtype


def load_calibration(prepared: Prepared, tokenizer: Any) -> CalibrationData:
    """The calibrating and the held-out blocks of a prepared run."""
    recipe = prepared.recipe
    return calibration_data(
        recipe.calibration,
        tokenizer,
        tokens=recipe.tokens,
        context=prepared.context,
        held_out=recipe.held_out,
        seed=recipe.seed,
        vocabulary=prepared.family.vocab_size(prepared.checkpoint.config),
    )


def find_networks(
    prepared: Prepared,
    model: PreTrainedModel,
    tokenizer: Any,
    data: CalibrationData,
    clock: StageClock,
    *,
    recurrence: bool = False,
) -> FunctionalNetworks:
    """Discover the networks of a loaded model, with their output energy filled in."""
    recipe, family = prepared.recipe, prepared.family
    header = {
        "tool": f"fbn-prune {tool_version()}",
        "torch": torch.__version__,
        "model": recipe.model,
        "model_type": prepared.checkpoint.config.get("model_type"),
        "calibration": list(recipe.calibration),
        "calibration_fingerprint": data.calibrating.fingerprint,
        "dtype": str(prepared.dtype).removeprefix("torch."),
    }
    options = DiscoveryOptions(
        recipe.networks, recipe.network_tokens, recipe.scope, recipe.seed, recurrence
    )
    networks = discover(
        model,
        family,
        data.calibrating,
        options,
        tokenizer=tokenizer,
        batch_tokens=prepared.batch_tokens,
        keep_bytes=memory_for_activations(),
        header=header,
        clock=clock,
    )
    weights = [family.down_weight(model, layer) for layer in range(prepared.layers)]
    return replace(networks, energy=output_energy(networks, weights))


def run_discovery(recipe: Recipe, clock: StageClock) -> tuple[FunctionalNetworks, Path]:
    """The `discover` command: find the networks, with their recurrence, and write the artifact into `output`."""
    prepared = prepare(recipe)
    tokenizer = prepared.checkpoint.load_tokenizer()
    with clock.stage("calibration"):
        data = load_calibration(prepared, tokenizer)
    with clock.stage("load"):
        model = prepared.checkpoint.load_model(prepared.device, prepared.dtype)
    networks = find_networks(prepared, model, tokenizer, data, clock, recurrence=True)
    assert recipe.output is not None
    with atomic_directory(recipe.output, recipe.overwrite) as folder:
        networks.save(folder / "networks.safetensors")
        (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    return networks, recipe.output / "networks.safetensors"


def run_prune(recipe: Recipe, clock: StageClock) -> PruneResult:
    """The main job.

    Parameters
    ----------
    recipe
        With `output` None everything but the export is done.

    Raises
    ------
    InvalidInput
        See :func:`prepare` and :func:`fbn_prune.calibration.calibration_data`.
    FbnPruneError
        The pruned model does not work, or its checkpoint does not fit its config.
    """
    prepared = prepare(recipe)
    family = prepared.family
    tokenizer = prepared.checkpoint.load_tokenizer()
    with clock.stage("calibration"):
        data = load_calibration(prepared, tokenizer)
        task = load_task(prepared, tokenizer, data)
        data = data if task is None else task.data
        held_out = data.held_out.batches(prepared.batch_tokens)
    with clock.stage("load"):
        model = prepared.checkpoint.load_model(prepared.device, prepared.dtype)
    before = _perplexity(model, held_out, clock, "dense perplexity")
    on_task = _test_perplexity(prepared, model, task, clock)
    networks = prepared.networks
    if networks is None and recipe.needs_networks:
        networks = find_networks(prepared, model, tokenizer, data, clock)
    matched = None if task is None else match_to_task(prepared, model, networks, task, clock)
    blocks = data.calibrating if matched is None else matched.blocks
    calibrating = blocks.batches(prepared.batch_tokens)
    order = rank_networks(prepared, model, networks, data, matched, clock)
    kept = _kept_networks(recipe, order)
    options = CutOptions(
        criterion=recipe.criterion,
        sequential=recipe.sequential,
        damping=recipe.damping,
        refit_damping=recipe.refit_damping,
        seed=recipe.seed,
        round_to=prepared.checkpoint.storage_dtype,
        loss_aware=recipe.loss_aware,
    )
    loss_roots = _loss_roots(prepared, model, blocks, clock)
    subject = Subject(
        model,
        family,
        blocks,
        prepared.batch_tokens,
        options,
        networks,
        kept,
        loss_roots,
    )
    layout = choose_layout(subject, _layout_request(prepared, networks, kept), clock)
    if recipe.layout == "auto":
        clock.note(_verdict(layout))
    widths = layout.widths
    cut = cut_layers(
        model,
        family,
        calibrating,
        widths,
        options,
        membership=None if networks is None else member_scores(networks, kept),
        loss_roots=loss_roots if recipe.loss_aware else None,
        clock=clock,
    )
    after = _perplexity(model, held_out, clock, "pruned perplexity")
    if not math.isfinite(after):
        raise FbnPruneError(
            f"the pruned model's perplexity is {after}: nothing was written; keep more neurons, "
            "raise --tokens, or compute in --dtype float32"
        )
    result = PruneResult(
        model=recipe.model,
        output=None if recipe.output is None else str(recipe.output),
        criterion=recipe.criterion,
        parameters_before=prepared.checkpoint.total_parameters,
        parameters_after=prepared.checkpoint.total_parameters,
        bytes_before=prepared.checkpoint.total_bytes,
        bytes_after=prepared.checkpoint.total_bytes,
        perplexity_before=before,
        perplexity_after=after,
        neurons_kept=sum(widths),
        neurons_total=prepared.width * prepared.layers,
        widths=widths,
        width_rule=layout.rule,
        layout_trials=layout.trials,
        kept_networks=kept,
        calibration_tokens=blocks.tokens,
        held_out_tokens=data.held_out.tokens,
        calibration_fingerprint=blocks.fingerprint,
        task=None if task is None or matched is None else _task_facts(task, matched),
        forward_seconds=cut.forward_seconds,
        peak_memory_bytes=0,
    )
    if result.task is not None and on_task is not None:
        result.task |= {
            "test_perplexity_before": on_task,
            "test_perplexity_after": _test_perplexity(prepared, model, task, clock),
        }
    if recipe.output is not None:
        _export(prepared, cut, networks, result, clock)
    result.stages = dict(clock.seconds)
    result.peak_memory_bytes = peak_memory_bytes()
    return result


def _perplexity(
    model: PreTrainedModel, batches: Sequence[Batch], clock: StageClock, stage: str
) -> float:
    with clock.stage(stage, sum(batch.tokens for batch in batches), "tokens") as advance:
        return perplexity(model, batches, advance)


def load_task(prepared: Prepared, tokenizer: Any, data: CalibrationData) -> TaskCalibration | None:
    """The task's blocks beside the generic data, without its test questions; None without a task."""
    if prepared.task is None:
        return None
    return task_calibration(
        prepared.task,
        data,
        tokenizer,
        context=prepared.context,
        vocabulary=prepared.family.vocab_size(prepared.checkpoint.config),
    )


def match_to_task(
    prepared: Prepared,
    model: PreTrainedModel,
    networks: FunctionalNetworks | None,
    task: TaskCalibration,
    clock: StageClock,
) -> MatchedCalibration:
    """Weigh the generic data by the networks that the recipe keeps."""
    assert networks is not None
    return match_calibration(
        model,
        prepared.family,
        networks,
        task.data.calibrating,
        task.examples,
        matched_on=prepared.recipe.kept_networks_or_default,
        batch_tokens=prepared.batch_tokens,
        clock=clock,
    )


def rank_scores(
    prepared: Prepared,
    model: PreTrainedModel,
    networks: FunctionalNetworks,
    data: CalibrationData,
    matched: MatchedCalibration | None,
    clock: StageClock,
) -> Tensor:
    """What the recipe's `rank` orders networks by, float64 [networks]: energy, nats, or standard deviations."""
    rank = prepared.recipe.rank_or_default
    if rank == "task":
        assert matched is not None
        return matched.match.vector.abs()
    if rank == "energy":
        weights = [prepared.family.down_weight(model, i) for i in range(prepared.layers)]
        return output_energy(networks, weights)
    few: list[Batch] = []
    for batch in data.calibrating.batches(prepared.batch_tokens):
        if sum(other.tokens for other in few) < KNOCKOUT_TOKENS:
            few.append(batch)
    return knockout_rise(model, prepared.family, networks, few, clock)


def rank_networks(
    prepared: Prepared,
    model: PreTrainedModel,
    networks: FunctionalNetworks | None,
    data: CalibrationData,
    matched: MatchedCalibration | None,
    clock: StageClock,
) -> list[int]:
    """Networks, strongest first; empty without networks."""
    if networks is None:
        return []
    return strongest_first(rank_scores(prepared, model, networks, data, matched, clock))


def _test_perplexity(
    prepared: Prepared, model: PreTrainedModel, task: TaskCalibration | None, clock: StageClock
) -> float | None:
    if task is None or task.test is None:
        return None
    return _perplexity(model, task.test.batches(prepared.batch_tokens), clock, "task perplexity")


def _task_facts(task: TaskCalibration, matched: MatchedCalibration) -> dict[str, Any]:
    return {
        "file": str(task.task.path),
        "examples": len(task.task.examples),
        "tokens": task.examples.tokens,
        "matched_networks": matched.match.networks,
        "effective_documents": matched.effective_documents,
        "documents": len(matched.match.weights),
        "left_out": task.left_out,
        "test_questions": len(task.task.test),
    }


def _kept_networks(recipe: Recipe, order: list[int]) -> list[int]:
    """The networks to keep: as many as named; where the budget is stated without a number of them, all."""
    if recipe.stated_budget is not None and recipe.keep_networks is None:
        return order
    if order and recipe.kept_networks_or_default > len(order):
        raise InvalidInput(
            f"keep_networks = {recipe.kept_networks_or_default}: only {len(order)} networks found"
        )
    return order[: recipe.kept_networks_or_default]


def _loss_roots(
    prepared: Prepared, model: PreTrainedModel, blocks: TokenBlocks, clock: StageClock
) -> list[Tensor] | None:
    """R of each layer, where errors are to be scored as the loss feels them."""
    if not prepared.recipe.needs_gradients:
        return None
    batches = blocks.subset(GRADIENT_TOKENS).batches(prepared.batch_tokens // 4)
    return [
        loss_root(sensitivity)
        for sensitivity in output_sensitivity(model, prepared.family, batches, clock)
    ]


def _layout_request(
    prepared: Prepared, networks: FunctionalNetworks | None, kept: Sequence[int]
) -> LayoutRequest:
    recipe, budget = prepared.recipe, prepared.budget
    if budget is None:
        assert networks is not None
        budget = Budget(budget_from_networks(networks, kept), most=False)
    return LayoutRequest(
        layout=recipe.layout,
        rule=recipe.widths,
        budget=budget.neurons,
        most=budget.most,
        full=(prepared.width,) * prepared.layers,
        multiple=prepared.width_multiple,
        whole=prepared.whole,
    )


def _verdict(layout: Layout) -> str:
    """What a trial of layouts found, in a sentence: what ragged gains, and what it costs."""
    ragged = min(rise for rule, rise in layout.trials.items() if rule != UNIFORM)
    uniform = layout.trials[UNIFORM]
    gain = 1 - ragged / uniform if uniform > 0 else 0.0
    taken = "uniform" if layout.rule == UNIFORM else f"ragged (widths by {layout.rule})"
    return (
        f"layers of different widths would save {gain:.0%} of the loss rise on calibration text set aside "
        f"({uniform:.3f} nats with uniform widths, {ragged:.3f} ragged) and would load with trust_remote_code only: "
        f"taken: {taken}"
    )


def _export(
    prepared: Prepared,
    cut: CutModel,
    networks: FunctionalNetworks | None,
    result: PruneResult,
    clock: StageClock,
) -> None:
    recipe = prepared.recipe
    assert recipe.output is not None
    with (
        clock.stage("export", prepared.checkpoint.total_bytes, "bytes") as advance,
        atomic_directory(recipe.output, recipe.overwrite) as folder,
    ):
        write = write_checkpoint if len(set(result.widths)) == 1 else write_ragged_checkpoint
        write(
            prepared.checkpoint,
            prepared.family,
            cut.cuts,
            folder,
            max_shard_size=recipe.max_shard_size,
            progress=advance,
        )
        verify_export(folder)
        written = Checkpoint.open(folder, ragged=True)
        result.parameters_after = written.total_parameters
        result.bytes_after = written.total_bytes
        if networks is not None:
            networks.save(folder / "networks.safetensors")
        (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        if prepared.task is not None and result.task is not None:
            seen = record(
                prepared.task.examples,
                source=str(prepared.task.path),
                tokens=result.task["tokens"],
                networks=result.task["matched_networks"],
            )
            (folder / RECORD_NAME).write_text(seen, encoding="utf-8")
        (folder / "README.md").write_text(
            _card(prepared, networks, result.kept_networks, result), encoding="utf-8"
        )


_CRITERION_WORDS = {
    "networks": "second-order cost, each layer's remaining output weights refitted",
    "second-order": "second-order cost, each layer's remaining output weights refitted",
    "flap": "FLAP (output variance, mean moved into a bias)",
    "wanda": "Wanda (weight times activation norm)",
    "membership": "membership in the kept networks, without a refit",
    "magnitude": "weight norm",
    "random": "chance",
}


def _card(
    prepared: Prepared,
    networks: FunctionalNetworks | None,
    kept: Sequence[int],
    result: PruneResult,
) -> str:
    recipe = prepared.recipe
    sources = ", ".join(recipe.calibration)
    for_task = ""
    if result.task is not None:
        for_task = (
            f", weighed to match {result.task['examples']} examples of {result.task['file']} "
            f"(with them in) by {len(result.task['matched_networks'])} functional networks"
        )
    facts = CardFacts(
        base_name=recipe.model,
        base_hub_id=prepared.checkpoint.hub_id,
        criterion=_CRITERION_WORDS[recipe.criterion],
        widths=tuple(result.widths),
        neurons_before=prepared.width,
        parameters_before=result.parameters_before,
        parameters_after=result.parameters_after,
        bytes_before=result.bytes_before,
        bytes_after=result.bytes_after,
        calibration=f"{result.calibration_tokens:,} tokens of {sources}{for_task}",
        held_out=f"{result.held_out_tokens:,} tokens of {sources} that calibrated nothing",
        command="fbn-prune run recipe.yaml --output NEW_FOLDER",
        version=tool_version(),
        kept_networks=len(kept) if recipe.stated_budget is None else None,
        total_networks=None if networks is None else len(networks.maps),
        perplexity_before=result.perplexity_before,
        perplexity_after=result.perplexity_after,
        license=source_license(prepared.checkpoint.path / "README.md"),
    )
    return model_card(facts)


def memory_for_activations() -> int:
    """A quarter of the free memory, in bytes."""
    import psutil

    return int(psutil.virtual_memory().available // 4)


def peak_memory_bytes() -> int:
    """Highest resident memory of the process so far, plus the highest allocation on a GPU."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024
    if torch.cuda.is_available():
        peak += torch.cuda.max_memory_allocated()
    return int(peak)


def tool_version() -> str:
    """The installed version of this package."""
    try:
        return version("fbn-prune")
    except PackageNotFoundError:
        return "0+unknown"
