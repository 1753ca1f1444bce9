"""Where each architecture keeps its MLPs and attention heads: one declarative entry a family, and
nothing about it anywhere else.

The same entry serves a live model and the tensor names of a checkpoint. The idea of a narrow
adapter is SliceGPT's (`model_adapter.py`); the facts are read from the modeling files of
transformers.

A layer's *neurons* are the intermediate units of its MLP. `inputs` are the projections that produce
them (`gate` and `up`, or `fc_in`), `output` is the one that reads them (`down`, or `fc_out`); the
*activation* is what `output` is fed.
"""

from __future__ import annotations

import copy
import re
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from fbn_prune.errors import InvalidInput
from fbn_prune.model.heads import Attention, HeadLocation, HeadShape, Part

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    Config = PretrainedConfig | Mapping[str, Any]

MOST_LAYERS = 10_000
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_labels")
"""Numbers of which config classes make lists and tables as long."""


@dataclass(frozen=True)
class Projection:
    """One linear map of an MLP.

    Attributes
    ----------
    path : where it is, relative to the layer ("mlp.gate_proj").
    neuron_axis : axis of `.weight` along which neurons lie. Linear stores [out, in], Conv1D [in,
        out].
    stacked : how many blocks of `width` neurons follow one another on that axis (2: a fused gate
        and up).
    """

    path: str
    neuron_axis: Literal[0, 1]
    stacked: int = 1


@dataclass(frozen=True)
class Gguf:
    """How llama.cpp knows the architecture.

    Attributes
    ----------
    arch : its name there.
    ragged_arch : the one that reads a width for each layer; None if none has this arithmetic.
    paired_rope : rotary embedding turns neighbouring channels there, where transformers turns the
        halves of a head: query and key rows are to be reordered.
    own_head_size : heads together may be narrower or wider than the hidden states.
    """

    arch: str
    ragged_arch: str | None = None
    paired_rope: bool = False
    own_head_size: bool = True


@dataclass(frozen=True)
class Location:
    """What a checkpoint's tensor is: a part of one projection of one layer."""

    layer: int
    projection: Projection
    part: Part


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes
    ----------
    layers : path of the list of layers in the `...ForCausalLM` module. Checkpoints saved from the
        base model leave its first component out (openai-community/gpt2: "h.0.mlp.c_fc.weight").
    width_key : config key of the MLP width.
    biased : whether the MLP's projections have biases, or the config flag that says so.
    bias_key : config flag that gives biases to the MLP and to nothing else; None if there is no
        such flag.
    gguf : the form in GGUF files; None if none is written.
    stored_as : a part of module names and what checkpoints have in its place, where transformers
        renames on loading.
    activation_keys : config keys of the activation function, the first present counts.
    mlp_modules : paths, relative to the layer, of the modules that are the MLP when called in turn:
        one, or several where the layer itself calls the projections.
    attention : where the attention heads are; None if they cannot be cut.
    """

    name: str
    model_types: tuple[str, ...]
    layers: str
    inputs: tuple[Projection, ...]
    output: Projection
    width_key: str = "intermediate_size"
    biased: bool | str = False
    bias_key: str | None = None
    gguf: Gguf | None = None
    stored_as: tuple[str, str] | None = None
    activation_keys: tuple[str, ...] = ("hidden_act",)
    mlp_modules: tuple[str, ...] = ("mlp",)
    attention: Attention | None = None

    @property
    def projections(self) -> tuple[Projection, ...]:
        return (*self.inputs, self.output)

    @property
    def is_conv1d(self) -> bool:
        """Whether linear maps store their weights as Conv1D does, [in, out]."""
        return self.output.neuron_axis == 0

    # The config

    def width(self, config: Config) -> int:
        """Neurons of one MLP. GPT-2 and Falcon mean four times the hidden size by a null width."""
        config = as_config(config)
        width = getattr(config, self.width_key)
        return 4 * self.hidden_size(config) if width is None else int(width)

    def widths(self, config: Config) -> list[int]:
        """Neurons of each layer's MLP, also where `per_layer_config` gives the layers their own."""
        config = as_config(config)
        fields = config.to_dict()
        own = {int(i): v.get(self.width_key) for i, v in per_layer(fields).items()}
        if not own:
            return [self.width(config)] * self.num_layers(config)
        common = fields.get(self.width_key) or 4 * self.hidden_size(config)
        widths = [own.get(i) or common for i in range(self.num_layers(config))]
        for width in widths:
            if not isinstance(width, int):
                raise InvalidInput(
                    f"the config gives a layer {self.width_key} = {reprlib.repr(width)}"
                )
        return widths

    def widest(self, config: Config) -> int:
        """Neurons of the widest layer's MLP."""
        return max(self.widths(config))

    def num_layers(self, config: Config) -> int:
        layers = as_config(config).num_hidden_layers
        try:
            count = int(layers)
        except (TypeError, ValueError, OverflowError):
            count = -1
        if not 0 <= count <= MOST_LAYERS:
            raise InvalidInput(f"the config means a model of {reprlib.repr(layers)} layers")
        return count

    def hidden_size(self, config: Config) -> int:
        return int(as_config(config).hidden_size)

    def vocab_size(self, config: Config) -> int:
        return int(as_config(config).vocab_size)

    def context_length(self, config: Config) -> int:
        """The longest sequence, in tokens, the model was made for."""
        return int(as_config(config).max_position_embeddings)

    def has_bias(self, config: Config) -> bool:
        """Whether the MLP's projections have biases."""
        if isinstance(self.biased, bool):
            return self.biased
        return bool(getattr(as_config(config), self.biased))

    def activation(self, config: Config) -> str:
        """The MLP's activation function, as transformers names it."""
        config = as_config(config)
        names = (getattr(config, key, None) for key in self.activation_keys)
        return str(next(name for name in names if name is not None))

    def accepts_bias(self, config: Config) -> bool:
        """Whether `output` has a bias, or a stock config can say that it has one."""
        return self.bias_key is not None or self.has_bias(config)

    def head_shape(self, config: Config) -> HeadShape:
        """The attention heads of every layer."""
        config = as_config(config)
        heads = int(config.num_attention_heads)
        groups = int(getattr(config, "num_key_value_heads", None) or heads)
        size = getattr(config, "head_dim", None) or self.hidden_size(config) // heads
        return HeadShape(groups, heads // groups, int(size))

    def with_head_groups(self, config: Mapping[str, Any], groups: int) -> dict[str, Any]:
        """The object in `config.json` of a model with so many groups of heads in every layer.

        Raises
        ------
        InvalidInput
            The architecture's heads cannot be cut, or its config does not accept that number.
        """
        if self.attention is None:
            raise InvalidInput(
                f"attention heads of {self.name} cannot be cut: its config has no head size of their own, "
                "or a norm spans all heads"
            )
        shape = self.head_shape(config)
        fewer = {
            **config,
            "num_attention_heads": groups * shape.queries,
            "num_key_value_heads": groups,
            "head_dim": shape.size,
        }
        as_config(fewer)
        return fewer

    def set_config_head_groups(self, config: PretrainedConfig, groups: int) -> None:
        """Have a loaded config say that every layer has so many groups of heads."""
        shape = self.head_shape(config)
        config.head_dim = shape.size
        config.num_key_value_heads = groups
        config.num_attention_heads = groups * shape.queries

    def mlp_facts(self) -> dict[str, Any]:
        """Where the MLPs are, as the JSON object `ragged_mlp` that `modeling_ragged.py` reads."""
        return {
            "inputs": [asdict(projection) for projection in self.inputs],
            "layers": self.layers,
            "output": asdict(self.output),
            "width_key": self.width_key,
        }

    # A checkpoint's tensors

    def layer_of(self, name: str) -> int | None:
        """The decoder layer that the tensor of this name belongs to; None if it belongs to none."""
        root, _, stem = self.layers.partition(".")
        match = re.match(rf"(?:{re.escape(root)}\.)?{re.escape(stem)}\.(\d+)\.", name)
        return None if match is None else int(match[1])

    def locate(self, name: str) -> Location | None:
        """What the tensor of this name is, or None if it is no part of an MLP."""
        layer, path, part = self._place(name)
        for projection in self.projections:
            if projection.path == path:
                return Location(layer, projection, part)
        return None

    def locate_heads(self, name: str) -> HeadLocation | None:
        """What the tensor of this name is, or None if it is no part of the attention, or heads cannot be cut."""
        if self.attention is None:
            return None
        layer, path, part = self._place(name)
        for projection in self.attention.projections:
            if projection.path == path:
                return HeadLocation(layer, projection, part)
        return None

    def _place(self, name: str) -> tuple[int, str, Part]:
        """Layer, module and part of a tensor; the module is empty for what is in no layer."""
        root, _, stem = self.layers.partition(".")
        match = re.fullmatch(
            rf"(?:{re.escape(root)}\.)?{re.escape(stem)}\.(\d+)\.(.+)\.(weight|bias)", name
        )
        if match is None:
            return 0, "", "weight"
        return int(match[1]), match[2], "weight" if match[3] == "weight" else "bias"

    def tensor_shape(self, location: Location, hidden: int, width: int) -> tuple[int, ...]:
        """Shape a checkpoint's MLP tensor has at this hidden size and width."""
        neurons = width * location.projection.stacked
        if location.part == "bias":
            return (hidden,) if location.projection is self.output else (neurons,)
        return (neurons, hidden) if location.projection.neuron_axis == 0 else (hidden, neurons)


def per_layer(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    own = fields.get("per_layer_config") or {}
    sound = isinstance(own, Mapping) and all(
        re.fullmatch(r"[0-9]{1,9}", str(layer)) and isinstance(values, Mapping)
        for layer, values in own.items()
    )
    if not sound:
        raise InvalidInput(
            f"the config's per_layer_config is no object of layers: {reprlib.repr(own)}"
        )
    return own


def as_config(config: Config) -> PretrainedConfig:
    """The typed config of a `config.json` object: its defaults filled in, its legacy keys
    translated.

    Never runs code from the checkpoint. A loaded config is returned as it is.
    """
    if not isinstance(config, Mapping):
        return config
    # Slow to import, and the command line's help needs none of it.
    from transformers import CONFIG_MAPPING

    for key in _COUNTS:
        count = config.get(key)
        if isinstance(count, int | float) and not abs(count) <= MOST_LAYERS:
            raise InvalidInput(
                f"the config says {key} = {reprlib.repr(count)}: no model has so many"
            )
    model_type = str(config.get("model_type"))
    try:
        return CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(dict(config)))
    except Exception as error:  # what a stranger's JSON can do to a config class has no end
        reason = " ".join(str(error).split())
        raise InvalidInput(f"the config is not a valid {model_type!r} config: {reason}") from error
