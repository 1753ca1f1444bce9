"""Loads a causal language model whose layers have MLPs of different widths.

This file is part of the checkpoint it lies in, and needs transformers and torch alone. The widths are the
config's `per_layer_config`; where the MLPs are is in its `ragged_mlp`. transformers builds the model's own
architecture, and each MLP is then brought to its layer's width, before any weight is loaded. Where transformers
builds the widths by itself, nothing is left to do here.

This module's `LlamaForCausalLM` is that of transformers with such MLPs, and so is every other model class of
transformers: the names are the same because transformers looks up some facts by a class's name.
Written by fbn-prune.
"""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn

_AUTO = "AutoModelForCausalLM"
"""With what a saved model says it is to be loaded."""


def layer_widths(config: Any) -> list[int]:
    """Neurons of each layer's MLP, as the config has them."""
    fields = config.to_dict()
    key = fields["ragged_mlp"]["width_key"]
    own = {int(layer): values.get(key) for layer, values in fields["per_layer_config"].items()}
    return [own.get(layer) or fields[key] for layer in range(config.num_hidden_layers)]


class RaggedMlps:
    """Goes before an architecture's class; builds it with the MLP widths of `config.per_layer_config`."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        try:
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        except RuntimeError:  # the architecture asks for the one width that there is not
            different = config.to_dict()["per_layer_config"]
            config.per_layer_config = None
            try:
                super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
            finally:
                config.per_layer_config = different
        mlps = config.to_dict().get("ragged_mlp")
        if mlps is None:  # transformers may take this class for any later model of the architecture
            return
        for layer, width in zip(self._layers(mlps["layers"]), layer_widths(config), strict=True):
            for projection in mlps["inputs"]:
                _fit(layer, projection, width, reads=False)
            _fit(layer, mlps["output"], width, reads=True)

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: what transformers renames on loading the architecture it must rename here too."""
        return False

    def _layers(self, path: str) -> nn.ModuleList:
        """The decoder layers, of the whole model or of its base model alone."""
        root, _, rest = path.partition(".")
        return self.get_submodule(path if hasattr(self, root) else rest)  # type: ignore[attr-defined]


def _fit(layer: nn.Module, projection: dict[str, Any], width: int, *, reads: bool) -> None:
    """Bring one projection, which reads or makes the neurons, to `width` of them."""
    module: Any = layer.get_submodule(projection["path"])
    axis, size = projection["neuron_axis"], width * projection["stacked"]
    found = module.weight.shape[axis]
    if found < size:
        raise ValueError(f"per_layer_config asks for {size} neurons where there are {found}")
    if found > size:
        _narrow(module, axis, size, narrow_bias=not reads)


def _narrow(module: Any, axis: int, size: int, narrow_bias: bool) -> None:
    """Keep the first neurons; which they are means nothing yet: weights are loaded later."""
    module.weight = nn.Parameter(module.weight.detach().narrow(axis, 0, size).clone())
    if narrow_bias and module.bias is not None:
        module.bias = nn.Parameter(module.bias.detach()[:size].clone())
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    else:  # the Conv1D of GPT-2
        module.nx, module.nf = module.weight.shape


def ragged_class(stock: type) -> type:
    """The class of `stock` models with ragged MLPs."""
    return type(stock.__name__, (RaggedMlps, stock), {"__module__": __name__, "_auto_class": _AUTO})


def __getattr__(name: str) -> type:
    """The ragged counterpart of any model class of transformers."""
    stock = getattr(transformers, name, None)
    if not (isinstance(stock, type) and issubclass(stock, transformers.PreTrainedModel)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, ragged_class(stock))
