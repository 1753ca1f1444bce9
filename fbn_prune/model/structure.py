"""Find the family of an architecture by its structure: where its MLPs are, and how its config states their width.

Everything is found on a tiny random copy of the architecture, which takes about a second, whatever the size of the
model. The config key of the width is found by building the copy with other values of each candidate.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.activations import ACT2FN

from fbn_prune.model.building import build, quiet_transformers
from fbn_prune.model.decoder_layers import NotFound
from fbn_prune.model.experts import mixture
from fbn_prune.model.family import as_config
from fbn_prune.model.found_family import FoundFamily, stock_form
from fbn_prune.model.headers import one_line
from fbn_prune.model.mlp_search import Mlp, Structure, find_structure
from fbn_prune.model.tiny_copy import tiny_config, tiny_model


def find_family(config: Mapping[str, Any]) -> FoundFamily:
    """Return the family of a `config.json` object, found on a tiny copy of its architecture.

    Raises
    ------
    NotFound
        It has no MLP that can be cut, or its config cannot state another width.
    InvalidInput
        transformers rejects the config.
    """
    return _find(json.dumps(stock_form(config), sort_keys=True, default=str))


@lru_cache(maxsize=32)
def _find(text: str) -> FoundFamily:
    fields = json.loads(text)
    if fields["model_type"] not in CONFIG_MAPPING:
        raise NotFound("is not known")
    typed = as_config(fields)
    if (experts := mixture(typed.to_dict())) is not None:
        raise NotFound(f"is a mixture of experts ({experts})")
    try:
        small = tiny_config(typed)
        model = tiny_model(small)
        structure = find_structure(model)
    except NotFound:
        raise
    except MemoryError:
        raise
    except Exception as error:  # a config that the copy's sizes do not fit raises any type
        raise NotFound(f"cannot be tried out on a tiny copy: {one_line(error)}") from error
    return _family(typed, small, structure)


def _family(typed: PretrainedConfig, small: PretrainedConfig, structure: Structure) -> FoundFamily:
    text_key = text_key_of(typed)
    mlps, layers = _main_mlps(structure)
    first = mlps[0]
    if len(set(first.biased)) > 1:
        raise NotFound("has an MLP with a bias in some of its projections alone")
    found = _width_setting(small, text_key, structure.layers, layers, mlps)
    return FoundFamily(
        name=typed.model_type,
        model_types=(typed.model_type,),
        layers=structure.layers,
        inputs=first.inputs,
        output=first.output,
        width_key=found.key,
        biased=first.biased[-1],
        activation_keys=_activation_keys(
            small if text_key is None else getattr(small, text_key), first
        ),
        mlp_modules=_common_module(first),
        text_key=text_key,
        mlp_layers=layers,
        factor=found.factor,
        settings=found.settings,
        up_first=first.up_first,
    )


def text_key_of(config: PretrainedConfig) -> str | None:
    """Return the key of the text model's config inside a config."""
    text = config.get_text_config(decoder=True)
    return next((key for key in config.sub_configs if getattr(config, key, None) is text), None)


def _main_mlps(structure: Structure) -> tuple[list[Mlp], tuple[int, ...]]:
    """Return the MLPs of the same projections that hold most of the neurons, with their layers."""
    groups: dict[tuple[Any, ...], dict[int, Mlp]] = {}
    for layer, mlps in enumerate(structure.mlps):
        for mlp in mlps:
            groups.setdefault((mlp.inputs, mlp.output, mlp.biased), {})[layer] = mlp
    main = max(groups.values(), key=lambda group: sum(mlp.width for mlp in group.values()))
    return list(main.values()), tuple(main)


def _common_module(mlp: Mlp) -> tuple[str, ...]:
    """Return the module that computes the MLP: the parent of all projections, if it is not the layer itself."""
    parents = {each.path.rpartition(".")[0] for each in (*mlp.inputs, mlp.output)}
    parent = parents.pop()
    return (parent,) if parent and not parents else ()


def _activation_keys(text: PretrainedConfig, mlp: Mlp) -> tuple[str, ...]:
    """Return the config keys that name the function of the gate, or of the only input; none if the MLP does more."""
    keys = ("hidden_activation", "hidden_act", "activation_function", "activation")
    gate, *others = mlp.computed
    found = []
    for key in keys:
        if (name := getattr(text, key, None)) in ACT2FN:
            expected = ACT2FN[name](gate)
            for other in others:
                expected = expected * other
            if torch.allclose(expected, mlp.activation, rtol=1e-3, atol=1e-4):
                found.append(key)
    return tuple(found)


# The config key of the width


@dataclass(frozen=True)
class _Setting:
    """How a config states the width: the key, the neurons for each unit, and values of other keys that it needs."""

    key: str
    factor: Fraction
    settings: Mapping[str, Any]


_TRIED = (240, 293)
"""Widths that are tried out: one with many divisors, and a prime number."""
_FACTORS = (Fraction(1), Fraction(1, 2), Fraction(2))
"""Neurons for each unit of a config's width."""


def _width_setting(
    small: PretrainedConfig,
    text_key: str | None,
    path: str,
    layers: Sequence[int],
    mlps: Sequence[Mlp],
) -> _Setting:
    """Find the config key that changes the width of the MLPs, in proportion and nothing else.

    Raises
    ------
    NotFound
        No key does.
    """
    fields = {**small.to_dict(), "model_type": small.model_type}
    text = fields if text_key is None else fields[text_key]
    before = _shapes(fields)
    own = {
        f"{path}.{layer}.{projection.path}.{part}"
        for layer in layers
        for projection in (*mlps[0].inputs, mlps[0].output)
        for part in ("weight", "bias")
    }
    output = mlps[0].output
    outputs = [f"{path}.{layer}.{output.path}.weight" for layer in layers]

    def factors(key: str, value: int, changes: Mapping[str, Any]) -> set[Fraction] | None:
        """Neurons for each unit of the key's value; None if the value changes anything but the MLPs, or not them."""
        old = text.get(key)
        new = [value] * len(old) if isinstance(old, list) else value
        shapes = _shapes(_with(fields, text_key, {**changes, key: new}))
        if shapes is None or before is None or shapes.keys() != before.keys():
            return None
        if any(shapes[name] != before[name] for name in before if name not in own):
            return None
        if all(shapes[name] == before[name] for name in outputs):
            return None
        return {Fraction(shapes[name][output.neuron_axis], value) for name in outputs}

    flags: list[dict[str, Any]] = [{}]
    flags += [{key: not value} for key, value in text.items() if type(value) is bool]
    for key in _width_keys(text, mlps, 1 + max(layers)):
        changing = False
        for changes in flags:
            if changes and not changing:
                break
            one = factors(key, _TRIED[0], changes)
            changing = changing or one is not None
            if one is None or len(one) != 1:
                continue
            factor = one.pop()
            if factor not in _FACTORS:  # it comes from a size of the copy
                continue
            if factors(key, _TRIED[1] * factor.denominator, changes) == {factor}:
                return _Setting(key, factor, changes)
    raise NotFound("has no config key that sets the width of its MLPs and nothing else")


def _width_keys(text: Mapping[str, Any], mlps: Sequence[Mlp], layers: int) -> list[str]:
    """Return the config keys that may hold the width, the likeliest first."""
    widths = {mlp.width for mlp in mlps}

    def rank(value: Any) -> int | None:
        if isinstance(value, list):
            value = value[0] if len(value) >= layers and len(set(map(str, value))) == 1 else None
            return None if type(value) is not int else rank(value)
        if value is None:
            return 2
        if type(value) is not int or value < 1:
            return None
        return 0 if value in widths else 1 if any(value == 2 * width for width in widths) else 3

    ranked = [
        (order, not any(part in key for part in ("inter", "inner", "ffn", "ff_", "feed")), key)
        for key, value in text.items()
        if (order := rank(value)) is not None
    ]
    return [key for order, unnamed, key in sorted(ranked) if order < 2 or not unnamed]


def _with(
    fields: Mapping[str, Any], text_key: str | None, changes: Mapping[str, Any]
) -> dict[str, Any]:
    if text_key is None:
        return {**fields, **changes}
    return {**fields, text_key: {**fields[text_key], **changes}}


def _shapes(fields: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
    """Return the shapes of the parameters that transformers builds from a config; None if it builds none."""
    try:
        with quiet_transformers(), init_empty_weights(include_buffers=False):
            model = build(as_config(fields), torch.float32)
    except Exception:  # a value that this config does not allow
        return None
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
