"""Layers with different numbers of attention head groups, down to none: how a config states them.

A stock config has one number for all layers. Where they differ, `attention_groups` lists the groups that each layer
keeps, and the numbers of heads in the config are those before the cut: transformers builds the layers from them, and
:mod:`fbn_prune.model.modeling_ragged` narrows each one to its groups. A *group* is defined in
:mod:`fbn_prune.model.heads`.

`per_layer_config`, transformers' own form, states them too: it lets the stock classes refuse the config, where they
would otherwise give layers without attention a random one.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fbn_prune.errors import InvalidInput
from fbn_prune.model.family import Family
from fbn_prune.model.heads import HeadShape

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from fbn_prune.model.family import Config

GROUPS = "attention_groups"
"""Config key of the head groups of each layer, where they differ."""

KEY_HEADS = "num_key_value_heads"
"""The key by which `per_layer_config` states them."""

ATTENTION = "ragged_attention"
"""Config key of what `modeling_ragged.py` must know of the attention."""


def has_own_head_groups(family: Family, config: Config) -> bool:
    """Whether the config lists the head groups of each layer, which stock classes do not read."""
    return family.attention is not None and _stated(config) is not None


def head_groups(family: Family, config: Config) -> list[int]:
    """Return the number of head groups of each layer.

    Raises
    ------
    InvalidInput
        The config's list has another length than the model has layers, or an entry is out of range.
    """
    layers, most = family.num_layers(config), family.head_shape(config).groups
    if not has_own_head_groups(family, config):
        return [most] * layers
    stated = _stated(config)
    sound = isinstance(stated, list) and all(
        type(groups) is int and 0 <= groups <= most for groups in stated
    )
    if not sound:
        raise InvalidInput(
            f"the config's {GROUPS} must be a list of integers from 0 to {most}, found {reprlib.repr(stated)}: "
            "correct it"
        )
    assert isinstance(stated, list)
    if len(stated) != layers:
        raise InvalidInput(
            f"the config's {GROUPS} has {len(stated)} entries, the model has {layers} layers: correct it"
        )
    return list(stated)


def layer_heads(family: Family, config: Config, layer: int) -> HeadShape:
    """Return the shape of one layer's attention heads."""
    return replace(family.head_shape(config), groups=head_groups(family, config)[layer])


def with_layer_groups(
    family: Family, config: Mapping[str, Any], groups: Sequence[int]
) -> dict[str, Any]:
    """Return the `config.json` object of a model whose layers have these numbers of head groups.

    Equal ones are stated as the architecture's own config does, if it accepts the number.

    Raises
    ------
    InvalidInput
        The architecture's heads cannot be cut.
    """
    plain = {key: value for key, value in config.items() if key not in (GROUPS, ATTENTION)}
    if family.attention is not None and _needs_own_code(family, plain, groups):
        return {**plain, GROUPS: list(groups)}
    return family.with_head_groups(plain, groups[0])


def set_layer_groups(family: Family, config: PretrainedConfig, groups: Sequence[int]) -> None:
    """Set the number of head groups of each layer in a loaded config."""
    for key in (GROUPS, ATTENTION):
        if hasattr(config, key):
            delattr(config, key)
    if (before := config.to_dict().get("per_layer_config")) is not None:
        config.per_layer_config = _without_heads(before) or None
    if set(groups) == {family.head_shape(config).groups}:
        return
    if _needs_own_code(family, {**config.to_dict(), "model_type": config.model_type}, groups):
        setattr(config, ATTENTION, _attention_facts(family, config))
        setattr(config, GROUPS, list(groups))
        most = family.head_shape(config).groups
        config.per_layer_config = _with_heads(config.to_dict(), groups, most)
    else:
        family.set_config_head_groups(config, groups[0])


def attention_layer(family: Family, name: str) -> int | None:
    """Return the layer to whose attention module a tensor belongs; None if there is none or heads cannot be cut."""
    layer = family.layer_of(name)
    if layer is None or family.attention is None:
        return None
    stem = family.layers.rpartition(".")[2]
    place = f"{stem}.{family.decoder_layer(layer)}.{family.attention.module}."
    return layer if f".{place}" in f".{name}" else None


def layer_facts(family: Family, config: Config) -> dict[str, Any]:
    """Return what `modeling_ragged.py` must know to build a config's layers; empty if stock classes build them."""
    facts: dict[str, Any] = {}
    if family.has_own_widths(config):
        facts["ragged_mlp"] = family.mlp_facts()
    if has_own_head_groups(family, config):
        facts[ATTENTION] = _attention_facts(family, config)
    return facts


def own_code_fields(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the `config.json` object of a model that stock classes do not build states for its own code."""
    fields = layer_facts(family, config)
    if has_own_head_groups(family, config):
        groups, most = head_groups(family, config), family.head_shape(config).groups
        fields["per_layer_config"] = _with_heads(config, groups, most)
    return fields


def require_equal_groups(family: Family, config: Config) -> None:
    """Raise InvalidInput if the layers differ in their head groups, so that heads are not cut again."""
    if has_own_head_groups(family, config):
        raise InvalidInput(
            "the layers of this model keep different numbers of attention heads already, which are not cut again: "
            "cut its neurons alone (leave out --head-sparsity), or start from the model before it"
        )


def _stated(config: Config) -> object:
    return config.get(GROUPS) if isinstance(config, Mapping) else getattr(config, GROUPS, None)


def _with_heads(
    config: Mapping[str, Any], groups: Sequence[int], most: int
) -> dict[int | str, dict[str, Any]]:
    """The `per_layer_config` of a config with the key-value heads of the layers that have fewer than the most."""
    own = _without_heads(config.get("per_layer_config") or {})
    for layer, count in enumerate(groups):
        if count != most:
            own.setdefault(str(layer), {})[KEY_HEADS] = count
    return own


def _without_heads(own: Mapping[str, Any]) -> dict[int | str, dict[str, Any]]:
    """A `per_layer_config` without key-value heads, and without the zeros that pad the numbers of layers."""
    bare = {
        str(int(layer)): {key: value for key, value in values.items() if key != KEY_HEADS}
        for layer, values in own.items()
    }
    return {layer: values for layer, values in bare.items() if values}


def _needs_own_code(family: Family, config: Mapping[str, Any], groups: Sequence[int]) -> bool:
    """Whether no stock class builds these numbers of groups."""
    if len(set(groups)) > 1 or groups[0] == 0:
        return True
    try:
        family.with_head_groups(config, groups[0])
    except InvalidInput:  # some configs accept only certain numbers of heads
        return True
    return False


def _attention_facts(family: Family, config: Config) -> dict[str, Any]:
    """The attention's place and the numbers of its heads before the cut, as a JSON object."""
    attention, shape = family.attention, family.head_shape(config)
    assert attention is not None
    return {
        "layers": family.layers,
        "module": attention.module,
        "inputs": [projection.path for projection in attention.inputs],
        "output": attention.output.path,
        "groups": shape.groups,
        "queries": shape.queries,
    }
