"""Load a causal language model whose layers have MLPs of different widths. Written by fbn-prune.

This file is part of the checkpoint's folder and needs only transformers and torch. The config's `mlp_widths` or
`per_layer_config` gives the widths, its `ragged_mlp` says where the MLPs are. transformers builds the stock
architecture, then each MLP is narrowed to its layer's width before the weights are loaded; widths that transformers
builds itself stay as they are.

For every model class of transformers this module has a class of the same name with ragged MLPs, such as
`LlamaForCausalLM`. The names are equal because transformers finds some settings by a class's name.
"""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn

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


class RaggedMlps:
    """Mixin for a stock model class: builds the model with the MLP widths of `config.per_layer_config`."""

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
        mlps = config.to_dict().get("ragged_mlp")
        if mlps is None:  # transformers may use this class for later, uniform models as well
            return
        layers = list(self._layers(mlps["layers"]))
        if mlps.get("mlp_layers"):  # the others have none
            layers = [layers[number] for number in mlps["mlp_layers"]]
        for layer, width in zip(layers, layer_widths(config), strict=True):
            for projection in mlps["inputs"]:
                _fit(layer, projection, width, reads=False)
            _fit(layer, mlps["output"], width, reads=True)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return False, so that transformers renames tensors on loading as it does for the stock class."""
        return False

    def _layers(self, path: str) -> nn.ModuleList:
        """The decoder layers, whether this is the whole model or its base model."""
        root, _, rest = path.partition(".")
        return self.get_submodule(path if hasattr(self, root) else rest)  # type: ignore[attr-defined]


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
    """Keep the first neurons; the values do not matter, because the weights are loaded later."""
    module.weight = nn.Parameter(module.weight.detach().narrow(axis, 0, size).clone())
    if narrow_bias and module.bias is not None:
        module.bias = nn.Parameter(module.bias.detach()[:size].clone())
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    else:  # the Conv1D of GPT-2
        module.nx, module.nf = module.weight.shape


def ragged_class(stock: type) -> type:
    """Return the class of `stock` models with ragged MLPs."""
    return type(stock.__name__, (RaggedMlps, stock), {"__module__": __name__, "_auto_class": _AUTO})


def __getattr__(name: str) -> type:
    """Return the ragged counterpart of any model class of transformers."""
    stock = getattr(transformers, name, None)
    if not (isinstance(stock, type) and issubclass(stock, transformers.PreTrainedModel)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, ragged_class(stock))
