"""The description of an architecture: where its MLPs and attention heads are, and how its config states their sizes.

The same :class:`Family` serves a live model and the tensor names of a checkpoint; :mod:`fbn_prune.model.families`
lists the supported architectures. The idea of a narrow adapter is SliceGPT's (`model_adapter.py`).

A layer's *neurons* are the intermediate units of its MLP. The `inputs` projections produce them (`gate` and `up`, or
`fc_in`), the `output` projection reads them (`down`, or `fc_out`); its input is the *activation*.
"""

from __future__ import annotations

import copy
import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from fbn_prune.errors import InvalidInput
from fbn_prune.model.gguf_facts import Gguf
from fbn_prune.model.heads import Attention, HeadLocation, HeadShape, Part

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    Config = PretrainedConfig | Mapping[str, Any]

MOST_LAYERS = 10_000
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_labels")
"""Config keys for which config classes allocate lists of that length."""


@dataclass(frozen=True)
class Projection:
    """One linear map of an MLP.

    Attributes
    ----------
    path
        The module's path relative to the layer ("mlp.gate_proj").
    neuron_axis
        Axis of `.weight` along which the neurons lie: Linear stores [out, in], Conv1D [in, out].
    stacked
        Number of blocks of `width` neurons along that axis (2 for a fused gate and up).
    """

    path: str
    neuron_axis: Literal[0, 1]
    stacked: int = 1


@dataclass(frozen=True)
class Location:
    """Which part of which layer's projection a checkpoint tensor is."""

    layer: int
    projection: Projection
    part: Part


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes
    ----------
    layers
        Path of the list of layers in the `...ForCausalLM` module. Checkpoints saved from the base model omit its first
        component (openai-community/gpt2: "h.0.mlp.c_fc.weight").
    width_key
        Config key of the MLP width.
    biased
        Whether the MLP's projections have biases, or the config flag that decides it.
    bias_key
        Config flag that adds biases to the MLP and to nothing else; None if the config has no such flag.
    gguf
        The architecture in GGUF files; None if they are neither read nor written.
    stored_as
        (Part of a module name, its replacement in checkpoints) where transformers renames tensors on loading.
    activation_keys
        Config keys of the activation function; the first key with a value applies.
    mlp_modules
        Paths, relative to the layer, of the modules that compute the MLP when called in turn: one, or several where
        the layer itself calls the projections.
    attention
        Where the attention heads are; None if heads cannot be cut.
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
        """Whether linear maps store their weights as [in, out], as Conv1D does."""
        return self.output.neuron_axis == 0

    # The config

    def width(self, config: Config) -> int:
        """Neurons of one MLP. In GPT-2 and Falcon a null width means four times the hidden size."""
        config = _typed(config)
        width = getattr(config, self.width_key)
        return 4 * self.hidden_size(config) if width is None else int(width)

    def widths(self, config: Config) -> list[int]:
        """Neurons of each layer's MLP; `per_layer_config` overrides the common width.

        Raises
        ------
        InvalidInput
            A width is not an integer, `per_layer_config` is malformed, or the number of layers is out of range.
        """
        config = _typed(config)
        fields = config.to_dict()
        own = {int(i): v.get(self.width_key) for i, v in per_layer(fields).items()}
        if not own:
            return [self.width(config)] * self.num_layers(config)
        common = fields.get(self.width_key) or 4 * self.hidden_size(config)
        widths = [own.get(i) or common for i in range(self.num_layers(config))]
        for width in widths:
            if not isinstance(width, int):
                raise InvalidInput(
                    f"a layer's {self.width_key} is {reprlib.repr(width)}: not an integer; correct it in config.json"
                )
        return widths

    def stored_widths(self, shapes: Mapping[str, tuple[int, ...]]) -> list[int]:
        """Return the width of each layer according to the shapes of the tensors, by name."""
        found = {
            location.layer: shape[self.output.neuron_axis]
            for name, shape in shapes.items()
            if (location := self.locate(name))
            and (location.projection, location.part) == (self.output, "weight")
            and len(shape) == 2
        }
        return [found[layer] for layer in sorted(found)]

    def has_own_widths(self, config: Config) -> bool:
        """Whether `per_layer_config` gives a layer another width than the common one, as stock classes cannot."""
        fields = _typed(config).to_dict()
        own = [values.get(self.width_key) for values in per_layer(fields).values()]
        return any(width and width != fields.get(self.width_key) for width in own)

    def with_widths(self, config: Mapping[str, Any], widths: Sequence[int]) -> dict[str, Any]:
        """Return the `config.json` object with these MLP widths; different ones are given in `per_layer_config`."""
        uniform = len(set(widths)) == 1
        common = widths[0] if uniform else max(*self.widths(config), *widths)
        changed = {key: value for key, value in config.items() if key != "per_layer_config"}
        changed[self.width_key] = common
        if not uniform:
            changed["per_layer_config"] = {
                str(layer): {self.width_key: width}
                for layer, width in enumerate(widths)
                if width != common
            }
        return changed

    def needs_own_code(self, config: Config, widths: Sequence[int]) -> bool:
        """Whether no stock class builds these widths, so that a checkpoint needs `modeling_ragged.py`."""
        return len(set(widths)) > 1

    def set_config_width(self, config: PretrainedConfig, widths: Sequence[int]) -> None:
        """Set the widths, which stock classes can build, in a loaded config."""
        config.per_layer_config = None
        setattr(config, self.width_key, widths[0])

    def set_config_own_widths(self, config: PretrainedConfig, widths: Sequence[int]) -> None:
        """Set widths that only `modeling_ragged.py` builds in the loaded config of one of its models."""
        fields = self.with_widths(config.to_dict(), widths)
        config.per_layer_config = fields["per_layer_config"]

    def num_layers(self, config: Config) -> int:
        layers = _typed(config).num_hidden_layers
        try:
            count = int(layers)
        except (TypeError, ValueError, OverflowError):
            count = -1
        if not 0 <= count <= MOST_LAYERS:
            raise InvalidInput(
                f"the config says {reprlib.repr(layers)} layers: at most {MOST_LAYERS:,}; correct it"
            )
        return count

    def hidden_size(self, config: Config) -> int:
        return int(_typed(config).hidden_size)

    def vocab_size(self, config: Config) -> int:
        return int(_typed(config).vocab_size)

    def context_length(self, config: Config) -> int:
        """The longest sequence, in tokens, that the model supports."""
        return int(_typed(config).max_position_embeddings)

    def has_bias(self, config: Config) -> bool:
        """Whether the MLP's projections have biases."""
        if isinstance(self.biased, bool):
            return self.biased
        return bool(getattr(_typed(config), self.biased))

    def activation(self, config: Config) -> str:
        """The MLP's activation function, as transformers names it."""
        config = _typed(config)
        names = (getattr(config, key, None) for key in self.activation_keys)
        return str(next(name for name in names if name is not None))

    def accepts_bias(self, config: Config) -> bool:
        """Whether `output` has a bias, or the architecture's config has a flag to add one."""
        return self.bias_key is not None or self.has_bias(config)

    def head_shape(self, config: Config) -> HeadShape:
        """The shape of every layer's attention heads."""
        config = _typed(config)
        heads = int(config.num_attention_heads)
        # The attribute cannot be read where `per_layer_config` states it by layer.
        groups = int(config.to_dict().get("num_key_value_heads") or heads)
        size = getattr(config, "head_dim", None) or self.hidden_size(config) // heads
        return HeadShape(groups, heads // groups, int(size))

    def with_head_groups(self, config: Mapping[str, Any], groups: int) -> dict[str, Any]:
        """Return the `config.json` object of a model with `groups` head groups in every layer.

        Raises
        ------
        InvalidInput
            The architecture's heads cannot be cut, or its config does not accept that number of groups.
        """
        if self.attention is None:
            raise InvalidInput(
                f"attention heads of {self.name} cannot be cut: its config has no separate head size, "
                "or a norm spans all heads; leave out --head-sparsity"
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
        """Set the number of head groups of every layer in a loaded config."""
        shape = self.head_shape(config)
        config.head_dim = shape.size
        config.num_key_value_heads = groups
        config.num_attention_heads = groups * shape.queries

    def mlp_facts(self) -> dict[str, Any]:
        """The MLPs' places and sizes as the JSON object `ragged_mlp` that `modeling_ragged.py` reads."""
        return {
            "inputs": [asdict(projection) for projection in self.inputs],
            "layers": self.layers,
            "output": asdict(self.output),
            "width_key": self.width_key,
        }

    # A checkpoint's tensors

    def decoder_layer(self, layer: int) -> int:
        """The number that the model gives a layer."""
        return layer

    def layer_of(self, name: str) -> int | None:
        """The decoder layer that a tensor belongs to; None for tensors outside the layers."""
        root, _, stem = self.layers.partition(".")
        match = re.match(rf"(?:{re.escape(root)}\.)?{re.escape(stem)}\.(\d+)\.", name)
        return None if match is None else int(match[1])

    def locate(self, name: str) -> Location | None:
        """The MLP projection that a tensor belongs to; None if it is not part of an MLP."""
        layer, path, part = self._place(name)
        for projection in self.projections:
            if projection.path == path:
                return Location(layer, projection, part)
        return None

    def locate_heads(self, name: str) -> HeadLocation | None:
        """The attention projection that a tensor belongs to; None if there is none, or if heads cannot be cut."""
        if self.attention is None:
            return None
        layer, path, part = self._place(name)
        for projection in self.attention.projections:
            if projection.path == path:
                return HeadLocation(layer, projection, part)
        return None

    def _place(self, name: str) -> tuple[int, str, Part]:
        """Layer, module path and part of a tensor; the path is empty for tensors outside the layers."""
        root, _, stem = self.layers.partition(".")
        match = re.fullmatch(
            rf"(?:{re.escape(root)}\.)?{re.escape(stem)}\.(\d+)\.(.+)\.(weight|bias)", name
        )
        if match is None:
            return 0, "", "weight"
        return int(match[1]), match[2], "weight" if match[3] == "weight" else "bias"

    def tensor_shape(self, location: Location, hidden: int, width: int) -> tuple[int, ...]:
        """Shape of an MLP tensor for the given hidden size and MLP width."""
        neurons = width * location.projection.stacked
        if location.part == "bias":
            return (hidden,) if location.projection is self.output else (neurons,)
        return (neurons, hidden) if location.projection.neuron_axis == 0 else (hidden, neurons)


def per_layer(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a config's `per_layer_config`, empty if absent; raise InvalidInput if it is malformed."""
    own = fields.get("per_layer_config") or {}
    sound = isinstance(own, Mapping) and all(
        re.fullmatch(r"[0-9]{1,9}", str(layer)) and isinstance(values, Mapping)
        for layer, values in own.items()
    )
    if not sound:
        raise InvalidInput(
            f"the config's per_layer_config must map layer numbers to objects, found {reprlib.repr(own)}"
        )
    return own


def _typed(config: Config) -> PretrainedConfig:
    """Return the typed config for reading: one object per `config.json`, because building it is slow."""
    if not isinstance(config, Mapping):
        return config
    try:
        text = json.dumps(config, sort_keys=True)
    except (TypeError, ValueError):  # a live model's config may hold what no file can
        return as_config(config)
    return _built(text)


@lru_cache(maxsize=32)
def _built(text: str) -> PretrainedConfig:
    return as_config(json.loads(text))


def as_config(config: Config) -> PretrainedConfig:
    """Return the typed config of a `config.json` object, with defaults filled in and legacy keys translated.

    Code from the checkpoint never runs. A config that is already typed is returned unchanged.

    Raises
    ------
    InvalidInput
        A count is out of range, or transformers rejects the config.
    """
    if not isinstance(config, Mapping):
        return config
    from transformers import CONFIG_MAPPING  # slow to import, and `--help` does not need it

    for key in _COUNTS:
        count = config.get(key)
        if isinstance(count, int | float) and not abs(count) <= MOST_LAYERS:
            raise InvalidInput(
                f"the config says {key} = {reprlib.repr(count)}: the most supported is {MOST_LAYERS:,}"
            )
    model_type = str(config.get("model_type"))
    try:
        return CONFIG_MAPPING[model_type].from_dict(_decoded(config))
    except Exception as error:  # config classes raise many types of error on malformed values
        reason = " ".join(str(error).split())
        raise InvalidInput(
            f"the config is not a valid {model_type!r} config, correct it: {reason}"
        ) from error


def _decoded(value: Any) -> Any:
    """Return a copy of a value of `config.json`, with the numbers that transformers writes as {"__float__": NAME}."""
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {key: _decoded(each) for key, each in value.items()}
    return [_decoded(each) for each in value] if isinstance(value, list) else copy.deepcopy(value)
