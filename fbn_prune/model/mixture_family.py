"""Find the experts of a mixture by structure: where they are, what follows their number, and how the config states it.

transformers 5 holds the experts of a layer in one module with fused tensors and says on the module how they are laid
out (transposed, interleaved, with biases or a gate); nothing is guessed from shapes. What follows the number of experts
(router rows, correction biases) and the width is found by building the model on the meta device with other values.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import CONFIG_MAPPING

from fbn_prune.errors import InvalidInput
from fbn_prune.model.building import build, quiet_transformers
from fbn_prune.model.decoder_layers import NotFound
from fbn_prune.model.families import refusal, refuse_obstacles
from fbn_prune.model.family import Projection, as_config
from fbn_prune.model.found_family import FoundFamily
from fbn_prune.model.headers import one_line
from fbn_prune.model.structure import text_key_of

if TYPE_CHECKING:
    from fbn_prune.model.family import Config

_LAYOUT = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
"""What transformers says of the layout of a module of experts."""
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k")
"""Config keys of the number of experts that a token is sent to."""


@dataclass(frozen=True)
class MixtureFamily(FoundFamily):
    """A mixture of experts; `mlp_layers` are the layers with experts, and their other MLPs are left alone.

    Attributes
    ----------
    experts
        Path, relative to a layer, of the module that holds the experts.
    counted
        Paths, relative to a layer, of the other tensors with a row for each expert.
    count_keys, width_keys
        Config keys of the number of experts and of their width.
    count, expert_width, top_k, top_k_key
        Experts of a layer, neurons of an expert, and experts that a token is sent to with the config key for it.
    groups, chosen_groups
        Groups of experts with the same number in each, and how many of them a token is sent to.
    shared_key, shared
        Config key and number of shared experts, where the config gives them the experts' width; None elsewhere.
    """

    experts: str = ""
    counted: tuple[str, ...] = ()
    count_keys: tuple[str, ...] = ()
    width_keys: tuple[str, ...] = ()
    count: int = 0
    expert_width: int = 0
    top_k: int = 0
    top_k_key: str = "num_experts_per_tok"
    groups: int = 1
    chosen_groups: int = 1
    shared_key: str | None = None
    shared: int = 0

    def widths(self, config: Config) -> list[int]:
        """Neurons of all experts of each layer together."""
        return [self.count * self.expert_width] * len(self.mlp_layers)

    def states_width(self, width: int) -> bool:
        """Whether the config can state this width of the experts, with the shared experts left whole."""
        return self.shared_key is None or self.expert_width * self.shared % width == 0

    def top_k_of(self, count: int) -> int:
        """The experts that a token is sent to if so many are left."""
        return min(self.top_k, count * self.chosen_groups // self.groups)

    def check_count(self, count: int) -> None:
        """Refuse a number of experts to keep that the architecture does not allow.

        Raises
        ------
        InvalidInput
            There are fewer experts, or the groups could not be equally large.
        """
        if not 1 <= count <= self.count:
            raise InvalidInput(
                f"experts = {count}: a layer has {self.count}: keep 1 to {self.count}"
            )
        if self.groups > 1 and (count % self.groups or count < 2 * self.groups):
            raise InvalidInput(
                f"experts = {count}: the router has {self.groups} groups of equal size, at least 2 experts in each: "
                f"keep a multiple of {self.groups}"
            )

    def with_experts(self, config: Mapping[str, Any], count: int, width: int) -> dict[str, Any]:
        """Return the `config.json` object with so many experts of this width."""
        changes: dict[str, Any] = dict.fromkeys(self.count_keys, count)
        changes |= dict.fromkeys(self.width_keys, width)
        if self.top_k_of(count) != self.top_k:
            changes[self.top_k_key] = self.top_k_of(count)
        if self.shared_key is not None and width != self.expert_width:
            changes[self.shared_key] = self.expert_width * self.shared // width
        return _changed(config, self.text_key, changes)


def mixture_family(config: Mapping[str, Any]) -> MixtureFamily:
    """Return the family of a mixture's `config.json` object.

    Raises
    ------
    InvalidInput
        The model cannot be pruned; the reason is named.
    """
    model_type = str(config.get("model_type"))
    refuse_obstacles(config, mixtures=True)
    try:
        return _find(json.dumps(config, sort_keys=True, default=str))
    except NotFound as reason:
        raise refusal(model_type, f"is a mixture of experts that {reason}") from reason


@lru_cache(maxsize=32)
def _find(text: str) -> MixtureFamily:
    fields = json.loads(text)
    if fields["model_type"] not in CONFIG_MAPPING:
        raise NotFound("transformers does not know")
    typed = as_config(fields)
    text_key = text_key_of(typed)
    settings = typed.get_text_config(decoder=True)
    try:
        model = _skeleton(fields)
    except Exception as error:
        raise NotFound(f"transformers cannot build: {one_line(error)}") from error
    path, layers, experts = _places(model)
    module: Any = model.get_submodule(f"{path}.{layers[0]}.{experts}")
    count, (axis, width) = _sizes(module)
    before = _shapes(fields)
    assert before is not None
    own = {f"{path}.{layer}.{experts}." for layer in layers}

    def tried(**changes: Any) -> dict[str, tuple[int, ...]]:
        """Return the tensors whose shape the changed config changes; empty if it builds no such model."""
        after = _shapes(_changed(fields, text_key, changes))
        if after is None or after.keys() != before.keys():
            return {}
        return {name: shape for name, shape in after.items() if shape != before[name]}

    count_keys, rows = _count_keys(settings, fields, text_key, count, tried, before, own)
    width_keys, shared_key = _width_keys(settings, fields, text_key, width, tried, own, axis)
    relative = {_relative(name, path) for name in rows}
    groups = int(getattr(settings, "n_group", None) or 1)
    if groups > 1 and not any(name.endswith("bias") for name in relative):
        raise NotFound("sends tokens to groups of experts without a correction bias")
    top_k_key = next((key for key in _TOP_K if type(getattr(settings, key, None)) is int), None)
    if top_k_key is None:
        raise NotFound("has no known config key of the number of experts that a token is sent to")
    return MixtureFamily(
        name=typed.model_type,
        model_types=(typed.model_type,),
        layers=path,
        inputs=(),
        output=Projection(f"{experts}.down_proj", 1),
        width_key=width_keys[0],
        text_key=text_key,
        mlp_layers=layers,
        experts=experts,
        counted=tuple(sorted(relative)),
        count_keys=count_keys,
        width_keys=width_keys,
        count=count,
        expert_width=width,
        top_k=int(getattr(settings, top_k_key)),
        top_k_key=top_k_key,
        groups=groups,
        chosen_groups=int(getattr(settings, "topk_group", None) or 1),
        shared_key=shared_key,
        shared=0 if shared_key is None else int(getattr(settings, shared_key)),
    )


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds fused experts in one of the layouts that transformers describes."""
    return all(hasattr(module, name) for name in (*_LAYOUT, "down_proj", "_is_expert_parallel"))


def _places(model: nn.Module) -> tuple[str, tuple[int, ...], str]:
    """Return the path of the layers, the layers with experts, and the path of the experts in a layer."""
    found: dict[tuple[str, str], list[int]] = {}
    for name, module in model.named_modules():
        if is_experts(module) and (match := re.match(r"(.+?)\.(\d+)\.(.+)", name)) is not None:
            found.setdefault((match[1], match[3]), []).append(int(match[2]))
    if not found:
        raise NotFound("holds its experts in a form that is not known")
    if len(found) > 1:
        raise NotFound("holds its experts in several places")
    ((path, experts), layers) = next(iter(found.items()))
    return path, tuple(layers), experts


def _sizes(module: Any) -> tuple[int, tuple[int, int]]:
    """Return the number of experts, and the axis and size of their neurons in `down_proj`."""
    if module.has_post_expert_norm:
        raise NotFound("has a norm after each expert")
    axis = 1 if module.is_transposed else 2
    return module.down_proj.shape[0], (axis, module.down_proj.shape[axis])


def _count_keys(
    settings: Any,
    fields: Mapping[str, Any],
    text_key: str | None,
    count: int,
    tried: Any,
    before: Mapping[str, tuple[int, ...]],
    own: set[str],
) -> tuple[tuple[str, ...], list[str]]:
    for keys in _candidates(settings, fields, text_key, count, "expert"):
        changed = tried(**dict.fromkeys(keys, 2 * count))
        rows = all(
            shape == (2 * count, *before[name][1:]) and before[name][0] == count
            for name, shape in changed.items()
        )
        inside = {name.rpartition(".")[0] + "." for name in changed}
        if changed and rows and own <= inside:
            return keys, [name for name in changed if name.rpartition(".")[0] + "." not in own]
    raise NotFound("has no config key that sets the number of its experts and nothing else")


def _width_keys(
    settings: Any,
    fields: Mapping[str, Any],
    text_key: str | None,
    width: int,
    tried: Any,
    own: set[str],
    axis: int,
) -> tuple[tuple[str, ...], str | None]:
    for keys in _candidates(settings, fields, text_key, width, "size"):
        twice = dict.fromkeys(keys, 2 * width)
        changed = tried(**twice)
        if not own <= {name.rpartition(".")[0] + "." for name in changed}:
            continue
        outside = {n: s for n, s in changed.items() if n.rpartition(".")[0] + "." not in own}
        if not outside:
            return keys, None
        for key, value in settings.to_dict().items():
            # Shared experts as wide as so many experts: twice the number is the same as twice the width.
            counts = type(value) is int and value > 0 and "shared" in key
            if counts and tried(**{key: 2 * value}) == outside:
                return keys, key
    raise NotFound("has no config key that sets the width of its experts and nothing else")


def _candidates(
    settings: Any, fields: Mapping[str, Any], text_key: str | None, value: int, part: str
) -> list[tuple[str, ...]]:
    """Return the config keys that have this value, those with `part` in their names first; aliases together."""
    raw = fields if text_key is None else fields.get(text_key, {})
    aliases: dict[str, list[str]] = {}
    for alias, key in settings.attribute_map.items():
        aliases.setdefault(key, []).append(alias)
    found: list[tuple[str, ...]] = []
    for key, stated in settings.to_dict().items():
        if type(stated) is int and stated == value:
            names = [name for name in (key, *aliases.get(key, [])) if name in raw]
            found.append(tuple(names) or (key,))
    return sorted(found, key=lambda keys: part not in keys[0])


def _relative(name: str, path: str) -> str:
    match = re.match(rf"{re.escape(path)}\.\d+\.(.+)", name)
    if match is None:
        raise NotFound(f"has a tensor with a row for each expert outside its layers, {name}")
    return match[1]


def _changed(
    fields: Mapping[str, Any], text_key: str | None, changes: Mapping[str, Any]
) -> dict[str, Any]:
    if text_key is None:
        return {**fields, **changes}
    return {**fields, text_key: {**fields.get(text_key, {}), **changes}}


def _skeleton(fields: Mapping[str, Any]) -> nn.Module:
    with quiet_transformers(), init_empty_weights(include_buffers=False):
        return build(as_config(fields), torch.float32)


def _shapes(fields: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
    """Return the shapes of the tensors that a model of this config stores; None if there is no such model."""
    try:
        model = _skeleton(fields)
    except Exception:  # a value that this config does not allow
        return None
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
