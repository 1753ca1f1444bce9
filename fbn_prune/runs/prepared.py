"""A checked recipe with its open checkpoint: what a run knows before it reads text or loads weights."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from fbn_prune.data.examples import Example
from fbn_prune.data.tasks import Task
from fbn_prune.errors import InvalidInput, counted
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.family import Family
from fbn_prune.model.head_groups import head_groups
from fbn_prune.model.opening import live_adapter, streamed_adapter
from fbn_prune.model.placement import device_map
from fbn_prune.model.streaming import skeleton
from fbn_prune.model.vocabulary import VocabularyCut
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.pruning.layout import HeadLevels, Layout
from fbn_prune.recipe import Recipe
from fbn_prune.runs.budget import Budget, ModelSize, rounding_note
from fbn_prune.runs.memory import MemoryPlan
from fbn_prune.runs.vocabulary import VocabularyFigures


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
    heads: HeadLevels | None = None
    """Both as in :class:`fbn_prune.pruning.layout.LayoutRequest`."""

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
        whole = self.recipe.removes_heads and self.heads is None
        kept = f"note: {self.family.name} keeps all attention heads, which cannot be cut in it"
        return [*self.recipe.notes, *([] if rounding is None else [rounding]), *[kept] * whole]

    @property
    def heads_total(self) -> int:
        """Attention heads (query heads) of all layers."""
        family, config = self.family, self.checkpoint.config
        return family.head_shape(config).queries * sum(head_groups(family, config))

    def heads_kept(self, layout: Layout | None = None) -> int:
        """Return the attention heads of all layers after the cut; of a layout in which they were searched, its own."""
        family, config = self.family, self.checkpoint.config
        shape, groups = family.head_shape(config), head_groups(family, config)
        if self.head_groups is not None:
            groups = [self.head_groups] * self.layers
        left_out: Collection[int] = ()
        if layout is not None:
            groups, left_out = layout.head_groups or groups, layout.left_out
        return shape.queries * sum(
            kept for layer, kept in enumerate(groups) if layer not in left_out
        )

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
        return streamed_adapter(
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
        return live_adapter(model, self.family)


def networks_of(recipe: Recipe, widths: Sequence[int]) -> FunctionalNetworks | None:
    """Return the networks of the recipe's file, or None if they are to be discovered, in layers of these widths.

    Raises
    ------
    InvalidInput
        They were found in another model, are fewer than the recipe needs, or the model is too small for so many.
    """
    neurons = sum(widths)
    if recipe.needs_networks and recipe.networks > neurons - 1:
        raise InvalidInput(
            f"networks = {recipe.networks}: the model has {neurons} neurons: lower it"
        )
    if recipe.networks_from is None:
        return None
    networks = FunctionalNetworks.load(recipe.networks_from)
    if list(networks.widths) != list(widths):
        have = f"width {widths[0]}" if len(set(widths)) == 1 else f"widths {tuple(widths)}"
        raise InvalidInput(
            f"{recipe.networks_from} was found in layers of widths {networks.widths}; "
            f"the model has {len(widths)} layers of {have}: discover the networks of this model"
        )
    counts = {"task_networks": recipe.task_networks, "keep_networks": recipe.keep_networks}
    for key, count in counts.items():
        if (count or 0) > len(networks.maps):
            held = f"{recipe.networks_from} holds {counted(len(networks.maps), 'network')}"
            raise InvalidInput(f"{key} = {count}: {held}; lower it, or discover more")
    return networks


def task_of(recipe: Recipe) -> Task | None:
    """Return the recipe's task; None if it has none.

    Raises
    ------
    InvalidInput
        It cannot be read.
    """
    if recipe.task is None:
        return None
    return Task.read(recipe.task, recipe.task_test, drawn=recipe.task_examples, seed=recipe.seed)
