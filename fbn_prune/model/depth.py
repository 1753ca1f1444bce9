"""Leave whole decoder layers out of a model, so that stock code loads the result as a model with fewer layers.

The layers that stay get new numbers, and the config's per-layer lists (the kinds of attention, say) lose the entries
of the others.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PretrainedConfig

from fbn_prune.errors import InvalidInput
from fbn_prune.model.family import Family, as_config

if TYPE_CHECKING:
    from fbn_prune.model.adapter import ModelAdapter

_NOT_PER_LAYER = re.compile(r"architectures|.*token_ids?|auto_map")
"""Config keys whose lists may have as many entries as the model has layers by accident only."""


@dataclass(frozen=True)
class Depth:
    """The decoder layers of a model that stay.

    Attributes
    ----------
    layers
        Number of layers of the whole model.
    left_out
        Those that do not stay.
    """

    layers: int
    left_out: frozenset[int]

    @property
    def staying(self) -> list[int]:
        """The layers that stay, by their numbers in the whole model, ascending."""
        return [layer for layer in range(self.layers) if layer not in self.left_out]

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the `config.json` object of the model with fewer layers.

        Lists that the config class derives from other values, such as a pattern of attention kinds, are written out.
        """
        typed = as_config(config)
        changed = copy.deepcopy(dict(config))
        changed[_count_key(typed)] = len(self.staying)
        for key, values in self._lists(typed).items():
            changed[key] = values
        if own := changed.get("per_layer_config"):
            by_layer = {int(layer): values for layer, values in own.items()}  # "00" is layer 0
            changed["per_layer_config"] = {
                str(new): by_layer[old] for new, old in enumerate(self.staying) if old in by_layer
            }
        return changed

    def name(self, family: Family, name: str) -> str | None:
        """Return a tensor's name in the model with fewer layers; None if its layer does not stay."""
        layer = family.layer_of(name)
        if layer is None or layer >= self.layers:
            return name
        if layer in self.left_out:
            return None
        stem = family.layers.rpartition(".")[2]
        before, number = f"{stem}.{layer}.", f"{stem}.{self.staying.index(layer)}."
        return name.replace(before, number, 1)

    def apply(self, model: nn.Module, family: Family) -> None:
        """Remove the layers from a live model, in place; the others keep their module objects and get new numbers."""
        config: PretrainedConfig = model.config  # type: ignore[assignment]
        lists = self._lists(config)
        parent = model.get_submodule(family.layers.rpartition(".")[0])
        found: Any = model.get_submodule(family.layers)
        setattr(
            parent,
            family.layers.rpartition(".")[2],
            nn.ModuleList(found[layer] for layer in self.staying),
        )
        for new, old in enumerate(self.staying):
            for module in found[old].modules():
                if getattr(module, "layer_idx", None) == old:
                    module.layer_idx = new
        setattr(config, _count_key(config), len(self.staying))
        for key, values in lists.items():
            setattr(config, key, values)

    def _lists(self, config: PretrainedConfig) -> dict[str, list[Any]]:
        """The config's lists with an entry for each layer, without those of the layers that do not stay."""
        return {
            key: [values[layer] for layer in self.staying]
            for key, values in config.to_dict().items()
            if isinstance(values, list)
            and len(values) == self.layers
            and not _NOT_PER_LAYER.fullmatch(key)
        }


def leave_out(adapter: ModelAdapter, layers: Iterable[int]) -> None:
    """Let layers of a live or streamed model return their input, as if they were not there; their weights stay.

    The model must have run layer by layer before, so that it is known what its layers return.
    """

    def passed(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert adapter.calling is not None
        return adapter.calling.output(hidden_states)

    for layer in layers:
        for module in adapter.decoder_layers[layer]:
            module.forward = passed
        adapter.left_out.add(layer)


def put_back(adapter: ModelAdapter, layers: Iterable[int]) -> None:
    """Let layers that were left out compute again."""
    for layer in layers:
        for module in adapter.decoder_layers[layer]:
            del module.forward
        adapter.left_out.discard(layer)


@contextmanager
def leaving_out(adapter: ModelAdapter, layers: Iterable[int]) -> Iterator[None]:
    """Leave layers out within the context only."""
    layers = set(layers) - adapter.left_out
    leave_out(adapter, layers)
    try:
        yield
    finally:
        put_back(adapter, layers)


def require_depth(family: Family, config: Any) -> None:
    """Raise InvalidInput unless layers can be left out of a model of this architecture.

    Raises
    ------
    InvalidInput
        The layers are not one list of like layers with an MLP each, or there is a single one.
    """
    layers = family.num_layers(config)
    plain = type(family) is Family and all(
        family.decoder_layer(layer) == layer for layer in range(layers)
    )
    if not plain:
        raise InvalidInput(
            f"{family.name}: layers cannot be left out of this architecture: use --structures neurons"
        )
    if layers < 2:
        raise InvalidInput(
            "the model has a single layer, which must stay: use --structures neurons"
        )


def _count_key(config: PretrainedConfig) -> str:
    """The config's own name of the number of layers."""
    return config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
