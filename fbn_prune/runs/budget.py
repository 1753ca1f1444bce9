"""Convert a recipe's budget into neurons, and neurons into parameters and bytes.

All numbers come from the checkpoint's headers: every MLP neuron of a model has the same size, and only neurons (and,
with `head_sparsity`, attention heads) are removed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from fbn_prune.errors import InvalidInput
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.head_groups import attention_layer, require_equal_groups
from fbn_prune.model.heads import head_tensor_shape
from fbn_prune.model.vocabulary import VocabularyCut, vocabulary_tensors
from fbn_prune.pruning.allocation import at_most, budget_from_sparsity, uniform_widths
from fbn_prune.pruning.layout import HeadLevels
from fbn_prune.recipe import Recipe, parse_count, parse_layers, parse_size


@dataclass(frozen=True)
class ModelSize:
    """The size of a checkpoint and of one of its MLP neurons.

    Attributes
    ----------
    neurons, parameters, nbytes
        Totals of the model; `nbytes` counts the tensors' bytes.
    neuron_parameters, neuron_bytes
        Size of one neuron: its rows, its column and its biases.
    header_bytes
        Bytes of the files that belong to no tensor.
    """

    neurons: int
    parameters: int
    nbytes: int
    neuron_parameters: int
    neuron_bytes: int
    header_bytes: int

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        head_groups: int | None = None,
        vocabulary: VocabularyCut | None = None,
    ) -> ModelSize:
        """Return the size of a checkpoint, cut to these groups of attention heads per layer and tokens if given."""
        family = checkpoint.family
        layers, neurons = (
            family.num_layers(checkpoint.config),
            sum(family.widths(checkpoint.config)),
        )
        parameters = nbytes = 0
        for name, info in checkpoint.tensors.items():
            location = family.locate(name)
            if location is None or location.layer >= layers:
                continue
            if location.part == "bias" and location.projection is family.output:
                continue
            parameters += info.parameters
            nbytes += info.nbytes
        gone_parameters, gone_bytes = _removed_heads(checkpoint, head_groups)
        if vocabulary is not None:
            gone_parameters += vocabulary.removed_parameters(checkpoint)
            gone_bytes += vocabulary.removed_bytes(checkpoint)
        # A live model has no files, and the bytes of quantized ones say nothing of the headers.
        files = checkpoint.weight_files if checkpoint.gguf is None else []
        stored = sum(file.stat().st_size for file in files)
        return cls(
            neurons=neurons,
            parameters=checkpoint.total_parameters - gone_parameters,
            nbytes=checkpoint.total_bytes - gone_bytes,
            neuron_parameters=parameters // neurons,
            neuron_bytes=nbytes // neurons,
            header_bytes=stored - checkpoint.total_bytes if files else 0,
        )

    def parameters_with(self, neurons: int) -> int:
        """Return the parameters of the model cut to `neurons` neurons."""
        return self.parameters - (self.neurons - neurons) * self.neuron_parameters

    def bytes_with(self, neurons: int) -> int:
        """Return the tensor bytes of the model cut to `neurons` neurons."""
        return self.nbytes - (self.neurons - neurons) * self.neuron_bytes


def _removed_heads(checkpoint: Checkpoint, groups: int | None) -> tuple[int, int]:
    """Return the parameters and bytes of the removed attention heads if each layer keeps `groups` groups."""
    if groups is None:
        return 0, 0
    family = checkpoint.family
    layers, heads = family.num_layers(checkpoint.config), family.head_shape(checkpoint.config)
    parameters = nbytes = 0
    for name, info in checkpoint.tensors.items():
        location = family.locate_heads(name)
        if location is None or location.layer >= layers:
            continue
        left = math.prod(head_tensor_shape(location, info.shape, groups, heads))
        parameters += info.parameters - left
        nbytes += (info.parameters - left) * info.dtype.itemsize
    return parameters, nbytes


def other_parameters(
    checkpoint: Checkpoint, head_groups: int | None, neuron_parameters: int
) -> tuple[int, ...]:
    """Return for each layer its parameters outside the MLP, in parameters of a neuron, rounded down.

    Parameters
    ----------
    head_groups
        As in :meth:`ModelSize.of`.
    """
    family, config = checkpoint.family, checkpoint.config
    found = [0] * family.num_layers(config)
    for name, info in checkpoint.tensors.items():
        layer = family.layer_of(name)
        if layer is None or layer >= len(found):
            continue
        location, heads = family.locate(name), family.locate_heads(name)
        if location is not None and (location.part, location.projection) != ("bias", family.output):
            continue
        shape: tuple[int, ...] = info.shape
        if heads is not None and head_groups is not None:
            shape = head_tensor_shape(heads, shape, head_groups, family.head_shape(config))
        found[layer] += math.prod(shape)
    return tuple(parameters // neuron_parameters for parameters in found)


def by_structure(checkpoint: Checkpoint) -> dict[str, int]:
    """Return the parameters of all MLP neurons, of the attention, of all else in layers, of the vocabulary, and others.

    The vocabulary's are the embedding and the head; the attention counts as all else in layers where it is not known.
    """
    family, found = checkpoint.family, Counter[str]()
    layers = family.num_layers(checkpoint.config)
    tokens = vocabulary_tensors(checkpoint)
    for name, info in checkpoint.tensors.items():
        layer = family.layer_of(name)
        if name in tokens:
            part = "vocabulary"
        elif layer is None or layer >= layers:
            part = "others"
        elif family.locate(name) is not None:
            part = "neurons"
        elif attention_layer(family, name) == layer:
            part = "attention"
        else:
            part = "the rest of layers"
        found[part] += info.parameters
    parts = ("neurons", "attention", "the rest of layers", "vocabulary", "others")
    return {part: found[part] for part in parts if found[part]}


HEAD_STEPS = 4
"""A search of attention heads tries this many numbers of them, evenly spaced."""


def head_levels(recipe: Recipe, checkpoint: Checkpoint, neuron_parameters: int) -> HeadLevels:
    """Return the numbers of groups of attention heads that a layer may keep."""
    family, config = checkpoint.family, checkpoint.config
    shape, numbers = family.head_shape(config), set[int]()
    if "heads" in recipe.removable:
        steps = (round(shape.groups * step / HEAD_STEPS) for step in range(1, HEAD_STEPS))
        numbers |= {groups for groups in steps if 0 < groups < shape.groups}
    if "attention" in recipe.removable:
        numbers.add(0)
    groups = (*sorted(numbers), shape.groups)
    whole, *saved = (
        _attention_saved(checkpoint, kept) // neuron_parameters for kept in (0, *groups)
    )
    return HeadLevels(groups, tuple(saved), whole)


def _attention_saved(checkpoint: Checkpoint, groups: int) -> int:
    """The parameters that each layer's attention loses if it keeps `groups` groups, at least."""
    family, config = checkpoint.family, checkpoint.config
    assert family.attention is not None
    shape, found = family.head_shape(config), [0] * family.num_layers(config)
    for name, info in checkpoint.tensors.items():
        layer = family.layer_of(name)
        if layer is None or layer >= len(found):
            continue
        location = family.locate_heads(name)
        if groups == 0:
            found[layer] += info.parameters if attention_layer(family, name) == layer else 0
        elif location is not None:
            left = math.prod(head_tensor_shape(location, info.shape, groups, shape))
            found[layer] += info.parameters - left
    return min(found)


def kept_head_groups(recipe: Recipe, checkpoint: Checkpoint) -> int | None:
    """Return the number of attention head groups that every layer keeps, or None if no heads are removed.

    Raises
    ------
    InvalidInput
        If the share would remove no group or all groups, or the architecture or its config does not support the
        result; the message lists the shares that are possible.
    """
    if recipe.head_sparsity is None:
        return None
    family, config = checkpoint.family, checkpoint.config
    require_equal_groups(family, config)
    heads = family.head_shape(config)
    asked = f"head_sparsity = {recipe.head_sparsity:g}"
    kept = round(heads.groups * (1 - recipe.head_sparsity))
    if family.attention is None:
        family.with_head_groups(config, kept)  # raises the error that explains why
    accepted = [groups for groups in range(1, heads.groups) if _accepts(checkpoint, groups)]
    if kept in accepted:
        return kept
    if not accepted:
        raise InvalidInput(
            f"{asked}: the model cannot have fewer than its {heads.groups} key-value heads"
        )
    shares = ", ".join(f"{1 - groups / heads.groups:.4g}" for groups in reversed(accepted))
    raise InvalidInput(
        f"{asked}: {family.name}'s config does not accept {kept} of {heads.groups} key-value heads per layer; "
        f"possible shares: {shares}"
    )


def _accepts(checkpoint: Checkpoint, groups: int) -> bool:
    try:
        checkpoint.family.with_head_groups(checkpoint.config, groups)
    except InvalidInput:
        return False
    return True


@dataclass(frozen=True)
class Budget:
    """Number of neurons to keep; with `most` it is an upper limit, otherwise a target."""

    neurons: int
    most: bool


def stated_budget(
    recipe: Recipe,
    checkpoint: Checkpoint,
    least: int,
    head_groups: int | None = None,
    vocabulary: VocabularyCut | None = None,
) -> Budget | None:
    """Return the budget that `sparsity`, `target_params` or `target_size` sets, or None if none is given.

    Parameters
    ----------
    least
        The smallest number of neurons that the layout can keep.
    head_groups
        Attention head groups that every layer keeps; see :func:`kept_head_groups`.
    vocabulary
        The tokens that are kept; all by default.

    Raises
    ------
    InvalidInput
        If the model is already that small, or cannot become that small.
    """
    size = ModelSize.of(checkpoint, head_groups, vocabulary)
    if recipe.sparsity is not None:
        return Budget(budget_from_sparsity(size.neurons, recipe.sparsity), most=False)
    if recipe.target_params is not None:
        room = parse_count(recipe.target_params, "target_params") - size.parameters_with(0)
        neurons = room // size.neuron_parameters
        stated, now = f"target_params = {recipe.target_params}", f"{size.parameters:,} parameters"
        smallest = f"{size.parameters_with(least):,} parameters"
    elif recipe.target_size is not None:
        room = (
            parse_size(recipe.target_size, "target_size") - size.header_bytes - size.bytes_with(0)
        )
        neurons = room // size.neuron_bytes
        stated, now = f"target_size = {recipe.target_size}", f"{size.nbytes / 1e6:,.1f} MB"
        smallest = f"{(size.bytes_with(least) + size.header_bytes) / 1e6:,.1f} MB"
    else:
        return None
    if neurons >= size.neurons:
        once = "" if vocabulary is None else " once its vocabulary is trimmed"
        raise InvalidInput(f"{stated}: the model has only {now}{once}; there is nothing to remove")
    if neurons < least:
        raise InvalidInput(
            f"{stated}: {_what_stays(recipe)} alone take {smallest}: give at least that"
        )
    return Budget(neurons, most=True)


def _what_stays(recipe: Recipe) -> str:
    if recipe.removes_heads and not recipe.leaves_out_layers:
        narrow = "neurons" in recipe.removable
        return f"embeddings, norms and the {'narrowest ' if narrow else ''}MLPs"
    if recipe.leaves_out_layers:
        return "embeddings and the narrowest layer that stays"
    return "attention, embeddings and the narrowest MLPs"


def rounding_note(
    recipe: Recipe, budget: Budget | None, widths: Sequence[int], multiple: int
) -> str | None:
    """One line if equal widths in multiples of `multiple` remove clearly more or less than was asked for; or None.

    Parameters
    ----------
    budget
        Neurons to keep; None if the kept networks set it.
    widths
        Present neurons of each layer.
    """
    if budget is None or recipe.layout != "uniform" or recipe.leaves_out_layers:
        return None
    total = sum(widths)
    neurons = at_most(budget.neurons, len(widths), multiple) if budget.most else budget.neurons
    kept = uniform_widths(neurons, widths, multiple)
    asked, removed = 1 - budget.neurons / total, 1 - sum(kept) / total
    if abs(removed - asked) <= max(0.02, 0.1 * asked):
        return None
    finer = "" if multiple == 1 else "; a smaller --width-multiple comes closer"
    return (
        f"note: asked to remove {asked:.1%} of the MLP neurons, but widths are multiples of {multiple}: each layer "
        f"keeps {kept[0]} of {max(widths)}, which removes {removed:.1%}{finer}"
    )


def whole_layers(recipe: Recipe, layers: int) -> frozenset[int]:
    """Return the indices of the layers in `keep_layers`.

    Raises
    ------
    InvalidInput
        If a layer does not exist, or no other layer is left to cut.
    """
    if recipe.keep_layers is None:
        return frozenset()
    named = parse_layers(recipe.keep_layers, "keep_layers")
    for layer in named:
        if not -layers <= layer < layers:
            raise InvalidInput(
                f"keep_layers = {recipe.keep_layers}: there is no layer {layer}; the model has {layers}, "
                "counted from 0: name one of them"
            )
    whole = frozenset(layer % layers for layer in named)
    if len(whole) == layers:
        raise InvalidInput(
            f"keep_layers = {recipe.keep_layers}: no layer is left to cut: name fewer"
        )
    return whole
