"""Load a causal language model whose layers differ in size. Written by fbn-prune.

This file is part of the checkpoint's folder and needs only transformers and torch. transformers builds the stock
architecture, then each layer is narrowed to its own size before the weights are loaded:

- The config's `mlp_widths` or `per_layer_config` gives the widths of the MLPs, its `ragged_mlp` says where they are.
  Widths that transformers builds itself stay as they are.
- `attention_groups` gives the key-value heads of each layer's attention, with each of which its query heads stay;
  `ragged_attention` says where they are. A layer with 0 has no attention.

For every model class of transformers this module has a class of the same name with ragged layers, such as
`LlamaForCausalLM`. The names are equal because transformers finds some settings by a class's name.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

_AUTO = "AutoModelForCausalLM"
"""The auto class by which a saved model is loaded."""


def layer_widths(config: Any) -> list[int]:
    """Return the number of neurons of each MLP according to the config."""
    fields = config.to_dict()
    if fields.get("mlp_widths"):
        return list(fields["mlp_widths"])
    key = fields["ragged_mlp"]["width_key"]
    own = {int(layer): values.get(key) for layer, values in fields["per_layer_config"].items()}
    return [own.get(layer) or fields[key] for layer in range(config.num_hidden_layers)]


class RaggedLayers:
    """Mixin for a stock model class: builds the model with the sizes of each layer that the config states."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        try:
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        except RuntimeError:  # the stock class needs one common width
            different = config.to_dict()["per_layer_config"]
            config.per_layer_config = None
            try:
                super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
            finally:
                config.per_layer_config = different
        fields = config.to_dict()
        # transformers may use this class for later, uniform models as well, which have neither key.
        if (attention := fields.get("ragged_attention")) is not None:
            layers = self._layers(attention["layers"])
            for layer, groups in zip(layers, fields["attention_groups"], strict=True):
                _fit_heads(layer, attention, groups, config)
        if (mlps := fields.get("ragged_mlp")) is not None:
            self._fit_mlps(mlps, layer_widths(config))

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return False, so that transformers renames tensors on loading as it does for the stock class."""
        return False

    def _layers(self, path: str) -> list[nn.Module]:
        """The decoder layers, whether this is the whole model or its base model."""
        root, _, rest = path.partition(".")
        return list(self.get_submodule(path if hasattr(self, root) else rest))  # type: ignore[attr-defined]

    def _fit_mlps(self, mlps: dict[str, Any], widths: list[int]) -> None:
        layers = self._layers(mlps["layers"])
        if mlps.get("mlp_layers"):  # the others have none
            layers = [layers[number] for number in mlps["mlp_layers"]]
        for layer, width in zip(layers, widths, strict=True):
            for projection in mlps["inputs"]:
                _fit(layer, projection, width, reads=False)
            _fit(layer, mlps["output"], width, reads=True)

    def _get_static_cache_init_shape(self) -> Any:
        """Return None where the layers' heads differ: a static cache then takes its shapes from the layers."""
        if getattr(self.config, "attention_groups", None) is not None:  # type: ignore[attr-defined]
            return None
        return super()._get_static_cache_init_shape()  # type: ignore[misc]


class NoHeads(nn.Module):
    """Stands where a layer's attention was left out: it adds nothing and has no weights.

    It puts one number for each token into the cache, because caches tell by single layers, such as the first one, how
    many tokens they hold. "Attention" in the class's name would let transformers take the whole file for a model that
    computes attention in its own way, and refuse to change the implementation.
    """

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        cache: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        cache = past_key_values if cache is None else cache  # the earlier name
        if cache is not None:
            marks = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            cache.update(marks, marks, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class LayerConfig:
    """The model's config as one layer reads it: with numbers of its own, and all else as the model's is now."""

    def __init__(self, config: Any, **own: Any) -> None:
        vars(self).update(own, _of_model=config)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_of_model" not in vars(self):  # while it is copied
            raise AttributeError(name)
        return getattr(self._of_model, name)


def set_groups(attention: Any, config: Any, groups: int, queries: int) -> None:
    """Tell an attention module its number of key-value heads, each with `queries` query heads."""
    heads = groups * queries
    attention.config = LayerConfig(config, num_key_value_heads=groups, num_attention_heads=heads)
    own = {"num_key_value_heads": groups, "num_attention_heads": heads, "num_heads": heads}
    for name, number in own.items():
        if hasattr(attention, name):
            setattr(attention, name, number)


def without_attention(layer: nn.Module, path: str) -> None:
    """Replace a layer's attention by one without weights."""
    parent, _, name = path.rpartition(".")
    old: Any = layer.get_submodule(path)
    setattr(layer.get_submodule(parent), name, NoHeads(old.layer_idx))


def _fit_heads(layer: nn.Module, attention: dict[str, Any], groups: int, config: Any) -> None:
    """Narrow a layer's attention to `groups` key-value heads."""
    if groups == 0:
        without_attention(layer, attention["module"])
        return
    for path in (*attention["inputs"], attention["output"]):
        axis = int(path == attention["output"])
        module: Any = layer.get_submodule(path)
        size = module.weight.shape[axis] // attention["groups"] * groups
        _narrow(module, axis, size, narrow_bias=axis == 0)
    set_groups(layer.get_submodule(attention["module"]), config, groups, attention["queries"])


def _fit(layer: nn.Module, projection: dict[str, Any], width: int, *, reads: bool) -> None:
    """Narrow one projection to `width` neurons, which it reads or computes."""
    module: Any = layer.get_submodule(projection["path"])
    axis, size = projection["neuron_axis"], width * projection["stacked"]
    found = module.weight.shape[axis]
    if found < size:
        raise ValueError(f"per_layer_config has {size} neurons, more than the config's {found}")
    if found > size:
        _narrow(module, axis, size, narrow_bias=not reads)


def _narrow(module: Any, axis: int, size: int, narrow_bias: bool) -> None:
    """Keep the first neurons or heads; the values do not matter, because the weights are loaded later."""
    module.weight = nn.Parameter(module.weight.detach().narrow(axis, 0, size).clone())
    if narrow_bias and module.bias is not None:
        module.bias = nn.Parameter(module.bias.detach()[:size].clone())
    set_features(module)


def set_features(module: Any) -> None:
    """Set a linear module's size attributes to the shape of its weight."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    else:  # the Conv1D of GPT-2
        module.nx, module.nf = module.weight.shape


def ragged_class(stock: type) -> type:
    """Return the class of `stock` models with ragged layers."""
    return type(
        stock.__name__, (RaggedLayers, stock), {"__module__": __name__, "_auto_class": _AUTO}
    )


def __getattr__(name: str) -> type:
    """Return the ragged counterpart of any model class of transformers."""
    stock = getattr(transformers, name, None)
    if not (isinstance(stock, type) and issubclass(stock, transformers.PreTrainedModel)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, ragged_class(stock))
