"""A family that was found by structure: what its config says of the MLPs, wherever the config says it.

A declared family reads and writes its config by one key. A found one may have its text model's config inside another,
a list with one width for each layer, widths that are computed from several keys, and layers without an MLP.

Where some decoder layers have no MLP, a *layer* of this package is one with an MLP and those without one before it;
after the last MLP, those that follow too. So the rest of the package sees layers that all have an MLP.
"""

from __future__ import annotations

import copy
import json
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights

from fbn_prune.errors import InvalidInput
from fbn_prune.model.building import build
from fbn_prune.model.family import Family, _typed, as_config
from fbn_prune.model.heads import HeadShape, Part

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from fbn_prune.model.family import Config

WIDTHS = "mlp_widths"
"""Config key of the width of each MLP where they differ, which :mod:`fbn_prune.model.modeling_ragged` reads.

transformers' `per_layer_config` would be read by stock classes that refuse layers of one kind to differ.
"""
_LONGEST = 1_000_000
"""The context of a model whose config states none."""
_CONTEXTS = (
    "max_position_embeddings",
    "n_positions",
    "max_target_positions",
    "max_seq_len",
    "max_sequence_length",
    "model_max_length",
    "context_length",
    "n_ctx",
)


@dataclass(frozen=True)
class FoundFamily(Family):
    """An architecture that was found by structure.

    Attributes
    ----------
    text_key
        Key of the text model's config inside the config; None if the config is the text model's own.
    mlp_layers
        The decoder layers with an MLP that can be cut, ascending.
    factor
        Neurons of a layer for each unit of the config's width.
    settings
        Config values with which every layer has the width that the config's key says, where other values compute it
        differently.
    up_first
        Whether a fused input computes the up projection before the gate.
    """

    text_key: str | None = None
    mlp_layers: tuple[int, ...] = ()
    factor: Fraction = Fraction(1)
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    up_first: bool = False

    # The config

    def text_config(self, config: Config) -> PretrainedConfig:
        """The config of the text model."""
        typed = _typed(config)
        text: PretrainedConfig = typed if self.text_key is None else getattr(typed, self.text_key)
        return text

    def num_layers(self, config: Config) -> int:
        """Number of layers with an MLP."""
        return len(self.mlp_layers)

    def hidden_size(self, config: Config) -> int:
        return int(self.text_config(config).hidden_size)

    def vocab_size(self, config: Config) -> int:
        return int(self.text_config(config).vocab_size)

    def context_length(self, config: Config) -> int:
        text = self.text_config(config)
        stated = (getattr(text, key, None) for key in _CONTEXTS)
        return next((size for size in stated if isinstance(size, int) and size > 0), _LONGEST)

    def width(self, config: Config) -> int:
        return max(self.widths(config))

    def widths(self, config: Config) -> list[int]:
        if (own := self._own_widths(config)) is not None:
            return own
        fields = self._fields(config)
        stated = fields.get(self.width_key)
        if isinstance(stated, list) and max(self.mlp_layers) < len(stated):
            return [int(stated[layer] * self.factor) for layer in self.mlp_layers]
        settled = all(fields.get(key) == value for key, value in self.settings.items())
        if type(stated) is not int or not settled:
            return list(_measured(self, json.dumps(_as_fields(config), sort_keys=True)))
        return [int(stated * self.factor)] * len(self.mlp_layers)

    def _own_widths(self, config: Config) -> list[int] | None:
        """The widths that this package wrote for layers that differ; None if the config has none."""
        own = _as_fields(config).get(WIDTHS)
        if own is None:
            return None
        if not isinstance(own, list) or not all(type(width) is int for width in own):
            raise InvalidInput(
                f"the config's {WIDTHS} must be a list of integers, found {own!r:.80}"
            )
        if len(own) != len(self.mlp_layers):
            raise InvalidInput(
                f"the config's {WIDTHS} has {len(own)} widths, the model has {len(self.mlp_layers)} MLPs: correct it"
            )
        return own

    def has_own_widths(self, config: Config) -> bool:
        return self._own_widths(config) is not None

    def with_widths(self, config: Mapping[str, Any], widths: Sequence[int]) -> dict[str, Any]:
        changed = copy.deepcopy({key: value for key, value in config.items() if key != WIDTHS})
        fields = changed if self.text_key is None else changed.setdefault(self.text_key, {})
        fields.update(self.settings)
        if isinstance(stated := self._fields(config).get(self.width_key), list):
            by_layer = dict(zip(self.mlp_layers, widths, strict=True))
            fields[self.width_key] = [
                self._unit(by_layer[i]) if i in by_layer else old for i, old in enumerate(stated)
            ]
            return changed
        if self.needs_own_code(config, widths):
            changed[WIDTHS] = list(widths)
            fields[self.width_key] = ceil(max(widths) / self.factor)
        else:
            fields[self.width_key] = self._unit(widths[0])
        return changed

    def needs_own_code(self, config: Config, widths: Sequence[int]) -> bool:
        stated = self._fields(config).get(self.width_key)
        return len(set(widths)) > 1 and not isinstance(stated, list)

    def set_config_width(self, config: PretrainedConfig, widths: Sequence[int]) -> None:
        text = self.text_config(config)
        if hasattr(config, WIDTHS):
            delattr(config, WIDTHS)
        for key, value in self.settings.items():
            setattr(text, key, value)
        stated = getattr(text, self.width_key)
        if isinstance(stated, list):
            for layer, width in zip(self.mlp_layers, widths, strict=True):
                stated[layer] = self._unit(width)
        else:
            setattr(text, self.width_key, self._unit(widths[0]))

    def set_config_own_widths(self, config: PretrainedConfig, widths: Sequence[int]) -> None:
        setattr(config, WIDTHS, list(widths))

    def _unit(self, width: int) -> int:
        """The config's value for a width."""
        unit = width / self.factor
        if unit.denominator != 1:
            raise InvalidInput(
                f"{self.name} has {self.factor} neurons for each unit of {self.width_key}: a width of {width} cannot "
                "be stated; choose another --width-multiple"
            )
        return int(unit)

    def _fields(self, config: Config) -> dict[str, Any]:
        fields: dict[str, Any] = self.text_config(config).to_dict()
        return fields

    def has_bias(self, config: Config) -> bool:
        if isinstance(self.biased, bool):
            return self.biased
        return bool(getattr(self.text_config(config), self.biased))

    def activation(self, config: Config) -> str:
        if not self.activation_keys or not self.mlp_modules or self.up_first:
            raise InvalidInput(
                f"{self.name} models are not served: the MLP is no module of its own, or it computes something else "
                "than an activation that the config names"
            )
        return Family.activation(self, self.text_config(config))

    def head_shape(self, config: Config) -> HeadShape:
        """The heads that the config names; layers of other kinds have none, so that no head can be cut."""
        text = self.text_config(config)
        try:
            return Family.head_shape(self, text)
        except (AttributeError, TypeError, ZeroDivisionError):
            return HeadShape(1, 1, self.hidden_size(config))

    def mlp_facts(self) -> dict[str, Any]:
        return {**Family.mlp_facts(self), "mlp_layers": list(self.mlp_layers)}

    # A checkpoint's tensors

    def decoder_layer(self, layer: int) -> int:
        return self.mlp_layers[layer]

    def layer_of(self, name: str) -> int | None:
        decoder_layer = Family.layer_of(self, name)
        if decoder_layer is None:
            return None
        return min(bisect_left(self.mlp_layers, decoder_layer), len(self.mlp_layers) - 1)

    def _place(self, name: str) -> tuple[int, str, Part]:
        root, _, stem = self.layers.partition(".")
        match = re.match(rf"(?:{re.escape(root)}\.)?{re.escape(stem)}\.(\d+)\.", name)
        if match is None or int(match[1]) not in self.mlp_layers:
            return 0, "", "weight"
        _, path, part = Family._place(self, name)
        return self.mlp_layers.index(int(match[1])), path, part


def stock_form(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a `config.json` object without the layers' own widths that this package wrote: stock classes build it."""
    own = (WIDTHS, "ragged_mlp", "auto_map") if WIDTHS in config else ()
    return {key: value for key, value in config.items() if key not in own}


def _as_fields(config: Config) -> Mapping[str, Any]:
    return (
        config
        if isinstance(config, Mapping)
        else {**config.to_dict(), "model_type": config.model_type}
    )


@lru_cache(maxsize=32)
def _measured(family: FoundFamily, config: str) -> tuple[int, ...]:
    """The widths of the model that transformers builds from a config."""
    with init_empty_weights(include_buffers=False):
        layers: Any = build(as_config(json.loads(config)), torch.float32).get_submodule(
            family.layers
        )
    output = family.output
    return tuple(
        layers[layer].get_submodule(output.path).weight.shape[output.neuron_axis]
        for layer in family.mlp_layers
    )
