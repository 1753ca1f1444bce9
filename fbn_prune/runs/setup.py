"""Open and check everything that a recipe names before any work; all invalid input is refused here."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fbn_prune import distributed
from fbn_prune.data import builtin
from fbn_prune.data.examples import Example, read_examples
from fbn_prune.data.tasks import Task
from fbn_prune.errors import InvalidInput, counted
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.depth import require_depth
from fbn_prune.model.family import Family
from fbn_prune.model.placement import device_map
from fbn_prune.model.streaming import StreamedModel, check_tensors, skeleton
from fbn_prune.model.surgery import require_bias
from fbn_prune.model.vocabulary import VocabularyCut
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.progress import StageClock
from fbn_prune.pruning.allocation import at_most, default_multiple, uniform_widths
from fbn_prune.recipe import Recipe
from fbn_prune.runs.budget import (
    Budget,
    ModelSize,
    kept_head_groups,
    other_parameters,
    rounding_note,
    stated_budget,
    whole_layers,
)
from fbn_prune.runs.early_checks import check_places
from fbn_prune.runs.memory import MemoryPlan, plan_memory
from fbn_prune.runs.vocabulary import VocabularyFigures, VocabularyRule, choose_vocabulary

MAX_CONTEXT = 2048

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Prepared:
    """A checked recipe; its checkpoint is open, and no weights are loaded yet."""

    recipe: Recipe
    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    context: int
    width_multiple: int
    networks: FunctionalNetworks | None
    """The networks of `networks_from`, if it is given."""
    budget: Budget | None
    """Number of neurons to keep; None if the kept networks set it."""
    whole: frozenset[int]
    """Layers that keep all their neurons."""
    memory: MemoryPlan
    task: Task | None = None
    head_groups: int | None = None
    """Attention head groups that every layer keeps; None if no heads are removed."""
    forget: tuple[Example, ...] | None = None
    """Examples of the skill to remove; None if there is none."""
    vocabulary: tuple[VocabularyCut, VocabularyFigures] | None = None
    """The tokens that stay and the figures of that choice; None if all stay."""
    rest: tuple[int, ...] = ()
    """See :class:`fbn_prune.pruning.layout.LayoutRequest`."""

    @property
    def family(self) -> Family:
        return self.checkpoint.family

    @property
    def widths(self) -> list[int]:
        """MLP neurons of each layer."""
        return self.family.widths(self.checkpoint.config)

    @property
    def neurons(self) -> int:
        """MLP neurons of all layers."""
        return sum(self.widths)

    @property
    def layers(self) -> int:
        return self.family.num_layers(self.checkpoint.config)

    @property
    def notes(self) -> list[str]:
        """One line for each thing that the user should know before the work."""
        rounding = rounding_note(self.recipe, self.budget, self.widths, self.width_multiple)
        return [*self.recipe.notes, *([] if rounding is None else [rounding])]

    @property
    def heads_total(self) -> int:
        """Attention heads (query heads) of all layers."""
        return self.family.head_shape(self.checkpoint.config).heads * self.layers

    @property
    def heads_kept(self) -> int:
        """Attention heads of all layers after the cut."""
        if self.head_groups is None:
            return self.heads_total
        shape = self.family.head_shape(self.checkpoint.config)
        return self.head_groups * shape.queries * self.layers

    @property
    def vocabulary_cut(self) -> VocabularyCut | None:
        """The tokens that stay; None if all stay."""
        return None if self.vocabulary is None else self.vocabulary[0]

    @property
    def vocabulary_figures(self) -> VocabularyFigures | None:
        """What the trimmed vocabulary saves and does to text; None if all tokens stay."""
        return None if self.vocabulary is None else self.vocabulary[1]

    @property
    def size(self) -> ModelSize:
        """The size of the model with the heads and the tokens that stay."""
        return ModelSize.of(self.checkpoint, self.head_groups, self.vocabulary_cut)

    @property
    def batch_tokens(self) -> int:
        """Tokens per forward batch."""
        return self.memory.batch_tokens

    def load_model(self) -> ModelAdapter:
        """Return the model, in memory or streamed, as the memory plan says."""
        if not self.memory.streamed:
            return self.load_whole_model()
        return StreamedModel(
            self.checkpoint,
            self.device,
            self.dtype,
            scratch=self.memory.scratch,
            spill_hidden=not self.memory.keep_hidden,
        )

    def load_whole_model(self) -> ModelAdapter:
        """Return the model in memory, on one device or spread over those of the memory plan."""
        places = None
        if self.memory.placement is not None:
            first, *layers = (
                torch.device(self.device.type, index) for index in (0, *self.memory.placement)
            )
            bare = skeleton(self.checkpoint, self.dtype)
            places = device_map(bare, self.family, layers, first)
        model = self.checkpoint.load_model(self.device, self.dtype, places)
        return ModelAdapter(model, self.family)


def prepare(recipe: Recipe, clock: StageClock | None = None) -> Prepared:
    """Open and check everything that a recipe names.

    Parameters
    ----------
    clock
        Shows how the texts are read for the vocabulary; other steps take no time.

    Raises
    ------
    InvalidInput
        If the checkpoint, the output, the device, the context, the networks, the budget or the task cannot be used.
    """
    source = builtin.path_or_id(recipe.model)
    checkpoint = Checkpoint.open(source, trust_remote_code=recipe.trust_remote_code)
    check_places(recipe, checkpoint.path, checkpoint.total_bytes)
    device = chosen_device(recipe.device)
    dtype = chosen_dtype(recipe.dtype, device, checkpoint.storage_dtype)
    prepared = prepared_for(recipe, checkpoint, device, dtype, clock=clock)
    if prepared.memory.streamed:
        check_tensors(checkpoint)
    else:
        checkpoint.load_model("meta", dtype)
    return prepared


def prepared_for(
    recipe: Recipe,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    memory: MemoryPlan | None = None,
    clock: StageClock | None = None,
) -> Prepared:
    """Check a recipe against an open checkpoint or the headers of a model in memory.

    Parameters
    ----------
    memory
        Where weights and activations are kept. Default: planned from the recipe.
    clock
        See :func:`prepare`.

    Raises
    ------
    InvalidInput
        If the context, a width, the networks, the budget or the task do not fit the model.
    """
    family = checkpoint.family
    if recipe.experts is not None:
        raise InvalidInput(
            f"experts = {recipe.experts}: {recipe.model} is no mixture of experts: leave it out"
        )
    longest = family.context_length(checkpoint.config)
    check_context(recipe, longest)
    widths = family.widths(checkpoint.config)
    layers, neurons = len(widths), sum(widths)
    # Ragged layers that are narrower than the multiple stay whole.
    width = max(widths) if recipe.layout == "ragged" else min(widths)
    multiple = recipe.width_multiple or min(default_multiple(max(widths)), width)
    if multiple > width:
        raise InvalidInput(
            f"width_multiple = {multiple}: a layer has only {width} neurons: lower it"
        )
    if recipe.needs_networks and recipe.networks > neurons - 1:
        raise InvalidInput(
            f"networks = {recipe.networks}: the model has {neurons} neurons: lower it"
        )
    networks = None
    if recipe.networks_from is not None:
        networks = FunctionalNetworks.load(recipe.networks_from)
        if list(networks.widths) != widths:
            have = f"width {width}" if len(set(widths)) == 1 else f"widths {tuple(widths)}"
            raise InvalidInput(
                f"{recipe.networks_from} was found in layers of widths {networks.widths}; "
                f"the model has {layers} layers of {have}: discover the networks of this model"
            )
        counts = {"task_networks": recipe.task_networks, "keep_networks": recipe.keep_networks}
        for key, count in counts.items():
            if (count or 0) > len(networks.maps):
                held = f"{recipe.networks_from} holds {counted(len(networks.maps), 'network')}"
                raise InvalidInput(f"{key} = {count}: {held}; lower it, or discover more")
    if recipe.criterion == "membership-bias":
        require_bias(family, checkpoint.config)
    context = recipe.context or min(longest, MAX_CONTEXT)
    whole = whole_layers(recipe, layers)
    least = sum(one if layer in whole else min(one, multiple) for layer, one in enumerate(widths))
    head_groups = kept_head_groups(recipe, checkpoint)
    memory = memory or plan_memory(recipe, checkpoint, device, dtype, context)
    task = (
        None
        if recipe.task is None
        else Task.read(recipe.task, recipe.task_test, drawn=recipe.task_examples, seed=recipe.seed)
    )
    vocabulary = _vocabulary(recipe, checkpoint, task, clock or StageClock())
    kept = None if vocabulary is None else vocabulary[0]
    rest: tuple[int, ...] = ()
    if recipe.leaves_out_layers:
        require_depth(family, checkpoint.config)
        each = ModelSize.of(checkpoint).neuron_parameters
        rest = other_parameters(checkpoint, head_groups, each)
        # One layer stays, and all that the others have is room.
        stays = whole | {0}
        least = sum(widths[i] if i in whole else min(widths[i], multiple) for i in stays)
        least -= sum(size for layer, size in enumerate(rest) if layer not in stays)
    budget = stated_budget(recipe, checkpoint, least, head_groups, kept)
    return Prepared(
        recipe,
        checkpoint,
        device,
        dtype,
        context,
        multiple,
        networks,
        budget,
        whole,
        memory,
        task,
        head_groups,
        None if recipe.forget is None else tuple(read_examples(recipe.forget)),
        vocabulary,
        rest,
    )


def check_context(recipe: Recipe, longest: int) -> None:
    """Refuse a context that is longer than the model supports.

    Raises
    ------
    InvalidInput
        It is.
    """
    if recipe.context is not None and recipe.context > longest:
        raise InvalidInput(
            f"context = {recipe.context}: the model supports at most {longest} tokens: lower it"
        )


def require_layout(prepared: Prepared) -> None:
    """Refuse to make layers equally wide where that removes more than was asked for, or a share that is not yet known.

    Raises
    ------
    InvalidInput
        The model's layers differ in width, and an equal width for all does not reach the budget.
    """
    budget, widths, multiple = prepared.budget, prepared.widths, prepared.width_multiple
    if prepared.recipe.layout == "ragged" or len(set(widths)) == 1 or prepared.rest:
        return
    if prepared.recipe.forget is not None:
        raise InvalidInput(
            f"the layers have {min(widths)} to {max(widths)} neurons: forget from them with --layout ragged"
        )
    if budget is None:
        raise InvalidInput(
            f"the layers have {min(widths)} to {max(widths)} neurons, and only the run will tell how many the networks "
            "cover: use --layout ragged, or set the size (--sparsity)"
        )
    neurons = at_most(budget.neurons, len(widths), multiple) if budget.most else budget.neurons
    uniform_widths(neurons, widths, multiple)


def _vocabulary(
    recipe: Recipe, checkpoint: Checkpoint, task: Task | None, clock: StageClock
) -> tuple[VocabularyCut, VocabularyFigures] | None:
    """Choose the tokens that stay, from the texts and the task's examples; None if all stay."""
    if recipe.least_uses is None:
        return None
    rule = VocabularyRule(
        (*recipe.calibration, *recipe.vocabulary_texts, *recipe.recover_text),
        recipe.least_uses,
        recipe.vocabulary_chars,
    )
    more = () if task is None else [example.text for example in task.examples]
    with clock.stage("vocabulary"):
        return choose_vocabulary(checkpoint, rule, more=more)


def chosen_device(name: str) -> torch.device:
    """Return the device of a recipe's `device` key; "auto" prefers a GPU.

    Raises
    ------
    InvalidInput
        If there is no such device.
    """
    if name == "auto":
        return distributed.local_device(
            torch.device("cuda" if torch.cuda.is_available() else "cpu")
        )
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InvalidInput(f"device = {name!r}: write auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise InvalidInput(f"device = {name!r}: write auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidInput(
            f"device = {name!r}: this machine has {counted(torch.cuda.device_count(), 'CUDA device')}: "
            "give another, or auto"
        )
    return distributed.local_device(device)


def chosen_dtype(name: str, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """Return the dtype of a recipe's `dtype` key; "auto" is float32 on a CPU and the checkpoint's elsewhere."""
    if name != "auto":
        return _DTYPES[name]
    return torch.float32 if device.type == "cpu" else stored
