"""What a recipe's budget means in neurons, and what a number of neurons means in parameters and bytes.

All from the checkpoint's headers: every neuron of a model costs the same, and everything else stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fbn_prune.errors import InvalidInput
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.heads import head_tensor_shape
from fbn_prune.pruning.allocation import budget_from_sparsity
from fbn_prune.recipe import Recipe, parse_count, parse_layers, parse_size


@dataclass(frozen=True)
class ModelSize:
    """A checkpoint's size and what each of its MLP neurons adds to it.

    Attributes
    ----------
    neurons, parameters, nbytes
        Of the whole model; bytes are those of the tensors.
    neuron_parameters, neuron_bytes
        Of one neuron: its rows, its column, its biases.
    header_bytes
        What the files hold beside the tensors.
    """

    neurons: int
    parameters: int
    nbytes: int
    neuron_parameters: int
    neuron_bytes: int
    header_bytes: int

    @classmethod
    def of(cls, checkpoint: Checkpoint, head_groups: int | None = None) -> ModelSize:
        """The size of a checkpoint, or of what is left of it with so many groups of attention heads a layer."""
        family = checkpoint.family
        layers, width = family.num_layers(checkpoint.config), family.width(checkpoint.config)
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
        files = {info.file for info in checkpoint.tensors.values()}
        stored = sum((checkpoint.path / file).stat().st_size for file in files)
        return cls(
            neurons=layers * width,
            parameters=checkpoint.total_parameters - gone_parameters,
            nbytes=checkpoint.total_bytes - gone_bytes,
            neuron_parameters=parameters // (layers * width),
            neuron_bytes=nbytes // (layers * width),
            header_bytes=stored - checkpoint.total_bytes,
        )

    def parameters_with(self, neurons: int) -> int:
        """Parameters of the model cut to so many neurons."""
        return self.parameters - (self.neurons - neurons) * self.neuron_parameters

    def bytes_with(self, neurons: int) -> int:
        """Tensor bytes of the model cut to so many neurons."""
        return self.nbytes - (self.neurons - neurons) * self.neuron_bytes


def _removed_heads(checkpoint: Checkpoint, groups: int | None) -> tuple[int, int]:
    """Parameters and bytes of the attention heads that go where so many groups stay in each layer."""
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


def kept_head_groups(recipe: Recipe, checkpoint: Checkpoint) -> int | None:
    """How many groups of attention heads stay in every layer; None where none go.

    Raises
    ------
    InvalidInput
        None would stay or go, the architecture's heads cannot be cut, or its config does not accept what would be
        left; what it accepts is named.
    """
    if recipe.head_sparsity is None:
        return None
    family, config = checkpoint.family, checkpoint.config
    heads = family.head_shape(config)
    asked = f"head_sparsity = {recipe.head_sparsity:g}"
    kept = round(heads.groups * (1 - recipe.head_sparsity))
    if family.attention is None:
        family.with_head_groups(config, kept)  # says why not
    accepted = [groups for groups in range(1, heads.groups) if _accepts(checkpoint, groups)]
    if kept in accepted:
        return kept
    if not accepted:
        raise InvalidInput(f"{asked}: no number below {heads.groups} key-value heads can be had")
    shares = ", ".join(f"{1 - groups / heads.groups:.4g}" for groups in reversed(accepted))
    raise InvalidInput(
        f"{asked}: {kept} of {heads.groups} key-value heads a layer is no model that {family.name}'s config accepts; "
        f"shares that can go: {shares}"
    )


def _accepts(checkpoint: Checkpoint, groups: int) -> bool:
    try:
        checkpoint.family.with_head_groups(checkpoint.config, groups)
    except InvalidInput:
        return False
    return True


@dataclass(frozen=True)
class Budget:
    """Neurons to keep; `most` if the result may have fewer, but not more of them."""

    neurons: int
    most: bool


def stated_budget(
    recipe: Recipe, checkpoint: Checkpoint, least: int, head_groups: int | None = None
) -> Budget | None:
    """The budget that the recipe states by itself, None where the kept networks set it.

    Parameters
    ----------
    least
        The fewest neurons that can be kept.
    head_groups
        Groups of attention heads that stay in every layer, see :func:`kept_head_groups`.

    Raises
    ------
    InvalidInput
        The model is that small already, or cannot become that small.
    """
    size = ModelSize.of(checkpoint, head_groups)
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
        raise InvalidInput(f"{stated}: the model has {now}: there is nothing to remove")
    if neurons < least:
        raise InvalidInput(
            f"{stated}: attention, embeddings and the narrowest MLPs alone take {smallest}"
        )
    return Budget(neurons, most=True)


def whole_layers(recipe: Recipe, layers: int) -> frozenset[int]:
    """The layers that `keep_layers` names, counted from 0.

    Raises
    ------
    InvalidInput
        There is no such layer, or no other is left to cut.
    """
    if recipe.keep_layers is None:
        return frozenset()
    named = parse_layers(recipe.keep_layers, "keep_layers")
    for layer in named:
        if not -layers <= layer < layers:
            raise InvalidInput(
                f"keep_layers = {recipe.keep_layers}: there is no layer {layer} among {layers}"
            )
    whole = frozenset(layer % layers for layer in named)
    if len(whole) == layers:
        raise InvalidInput(f"keep_layers = {recipe.keep_layers}: no layer is left to cut")
    return whole
