"""Apply a cut to a tensor and to a config, for the live model, the streamed model and the written checkpoint.

All three call :func:`cut_tensor`, so they have the same numbers: new output weights are rounded once, to the dtype in
which they are stored, and the model measured in memory computes what the written checkpoint computes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor
from transformers import MODEL_MAPPING

from fbn_prune.errors import InvalidInput
from fbn_prune.model import modeling_ragged
from fbn_prune.model.building import stock_class
from fbn_prune.model.family import Family, Projection, as_config
from fbn_prune.model.head_groups import (
    ATTENTION,
    attention_layer,
    has_own_head_groups,
    head_groups,
    layer_facts,
    layer_heads,
    own_code_fields,
    with_layer_groups,
)
from fbn_prune.model.heads import HeadCut, cut_heads, head_tensor_shape, rounded
from fbn_prune.model.stock_names import with_stock_names


@dataclass(frozen=True)
class MlpCut:
    """The cut of one layer.

    Attributes
    ----------
    kept
        int64 [n]: the neurons of the MLP to keep, ascending.
    down_weight
        float32 or float64 [hidden, n]: their new output weights.
    down_bias
        [hidden]: the new output bias; None keeps the old one.
    heads
        The cut of the attention; None keeps all heads.

    Raises
    ------
    ValueError
        The tensors' shapes or dtypes disagree, or the neurons are not ascending.
    """

    kept: Tensor
    down_weight: Tensor
    down_bias: Tensor | None = None
    heads: HeadCut | None = None

    def __post_init__(self) -> None:
        if self.kept.dtype != torch.int64 or self.kept.ndim != 1 or len(self.kept) == 0:
            raise ValueError(
                f"kept must be int64 [n > 0]: {self.kept.dtype} {list(self.kept.shape)}"
            )
        if self.kept[0] < 0 or bool((self.kept[1:] <= self.kept[:-1]).any()):
            raise ValueError("kept must be ascending, unique and non-negative")
        if self.down_weight.ndim != 2 or self.down_weight.shape[1] != len(self.kept):
            raise ValueError(
                f"down_weight {list(self.down_weight.shape)} does not fit {len(self.kept)} kept neurons"
            )
        if self.down_bias is not None and self.down_bias.shape != self.down_weight.shape[:1]:
            raise ValueError(
                f"down_bias {list(self.down_bias.shape)} does not fit down_weight {list(self.down_weight.shape)}"
            )

    @property
    def width(self) -> int:
        """Number of neurons kept."""
        return len(self.kept)


class CutsOnRequest(Sequence[MlpCut]):
    """One cut for each layer, made when it is read."""

    def __init__(self, cut: Callable[[int], MlpCut], layers: int) -> None:
        self._cut, self._layers = cut, layers

    def __len__(self) -> int:
        return self._layers

    @overload
    def __getitem__(self, index: int) -> MlpCut: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[MlpCut]: ...
    def __getitem__(self, index: int | slice) -> MlpCut | Sequence[MlpCut]:
        if isinstance(index, slice):
            return [self[layer] for layer in range(*index.indices(len(self)))]
        return self._cut(range(self._layers)[index])


def cut_parts(cut: MlpCut) -> dict[str, Tensor]:
    """Return the tensors of a cut by name."""
    parts = {"kept": cut.kept, "down_weight": cut.down_weight, "down_bias": cut.down_bias}
    if cut.heads is not None:
        parts |= {"kept_heads": cut.heads.kept, "out_weight": cut.heads.out_weight}
        parts["out_bias"] = cut.heads.out_bias
    return {name: part for name, part in parts.items() if part is not None}


def cut_of_parts(parts: Mapping[str, Tensor]) -> MlpCut:
    """Rebuild a cut from the tensors that :func:`cut_parts` returned."""
    heads = None
    if "kept_heads" in parts:
        heads = HeadCut(parts["kept_heads"], parts["out_weight"], parts.get("out_bias"))
    return MlpCut(parts["kept"], parts["down_weight"], parts.get("down_bias"), heads)


def cut_of(family: Family, name: str, cuts: Sequence[MlpCut]) -> MlpCut | None:
    """Return the cut that changes the tensor of this name; None if no cut does."""
    location = family.locate(name)
    if location is not None and location.layer < len(cuts):
        return cuts[location.layer]
    heads = family.locate_heads(name)
    if heads is not None and heads.layer < len(cuts) and cuts[heads.layer].heads is not None:
        return cuts[heads.layer]
    return None


def is_removed(family: Family, name: str, cuts: Sequence[MlpCut]) -> bool:
    """Return whether a tensor goes because its layer's cut leaves the attention out."""
    layer = attention_layer(family, name)
    if layer is None or layer >= len(cuts):
        return False
    heads = cuts[layer].heads
    return heads is not None and len(heads.kept) == 0


def cut_tensor(
    family: Family,
    config: Any,
    name: str,
    tensor: Tensor,
    cut: MlpCut,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return a tensor of a layer's MLP or attention after the cut, contiguous, on the device of `tensor`.

    Tensors that :func:`is_removed` names have no form after the cut.

    Parameters
    ----------
    family
        The model's architecture.
    config
        The config of the dense model, loaded or as in `config.json`.
    name
        The tensor's name, in the live model or in the checkpoint.
    tensor
        Its values before the cut; zeros for a bias that the cut adds.
    cut
        The cut of the tensor's layer.
    dtype
        The dtype to which new output weights and biases are rounded. Default: that of `tensor`.

    Raises
    ------
    FbnPruneError
        A new output weight is not finite in `dtype`.
    """
    dtype = dtype or tensor.dtype
    location = family.locate(name)
    if location is None:
        heads = family.locate_heads(name)
        if heads is None or cut.heads is None:
            return tensor
        shape = layer_heads(family, config, heads.layer)
        return cut_heads(heads, tensor, cut.heads, shape, dtype)
    if location.projection is not family.output:
        return _cut_input(location.projection, location.part, tensor, cut.kept)
    if location.part == "weight":
        weight = cut.down_weight if family.output.neuron_axis == 1 else cut.down_weight.T
        return rounded(weight, dtype).contiguous()
    return tensor if cut.down_bias is None else rounded(cut.down_bias, dtype)


def cut_shape(
    family: Family, config: Any, name: str, shape: tuple[int, ...], cut: MlpCut
) -> tuple[int, ...]:
    """Return the shape that :func:`cut_tensor` gives a tensor of shape `shape`."""
    location = family.locate(name)
    if location is not None:
        return family.tensor_shape(location, family.hidden_size(config), cut.width)
    heads = family.locate_heads(name)
    if heads is None or cut.heads is None:
        return shape
    before = layer_heads(family, config, heads.layer)
    return head_tensor_shape(heads, shape, len(cut.heads.kept), before)


def cut_config(config: Mapping[str, Any], family: Family, cuts: Sequence[MlpCut]) -> dict[str, Any]:
    """Return the `config.json` object of a cut model.

    Layers of equal width and equal numbers of heads give a stock config. Different widths are written as transformers'
    `per_layer_config`, different numbers of head groups as :mod:`fbn_prune.model.head_groups` says. The stock classes
    do not build models from them, so `auto_map` names `modeling_ragged.py`, which must be in the checkpoint's folder.
    Other names of code are replaced, see :func:`fbn_prune.model.stock_names.with_stock_names`.

    Raises
    ------
    InvalidInput
        A cut adds a bias that the architecture does not support, or cuts heads where that cannot be.
    """
    widths = [cut.width for cut in cuts]
    pruned = with_stock_names(family.with_widths(copy.deepcopy(dict(config)), widths))
    for key in ("ragged_mlp", ATTENTION):
        pruned.pop(key, None)
    if has_own_head_groups(family, config) or any(cut.heads is not None for cut in cuts):
        before = head_groups(family, config)
        groups = [
            old if cut.heads is None else len(cut.heads.kept)
            for old, cut in zip(before, cuts, strict=True)
        ]
        pruned = with_layer_groups(family, pruned, groups)
    if any(cut.down_bias is not None for cut in cuts) and not family.has_bias(config):
        require_bias(family, config)
        assert family.bias_key is not None
        pruned[family.bias_key] = True
    return with_own_code(pruned, family) if layer_facts(family, pruned) else pruned


def with_own_code(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Return the `config.json` object of a model whose layers differ in size, naming the code that builds it."""
    typed = as_config(config)
    stock: dict[str, Any] = {
        "AutoModel": MODEL_MAPPING[type(typed)],
        "AutoModelForCausalLM": stock_class(typed),
    }
    # `transformers serve` uses a checkpoint's own code only under this name; otherwise it takes the stock class.
    stock["AutoModelForDecision"] = stock["AutoModelForCausalLM"]
    if (
        typed.get_text_config(decoder=True) is not typed
    ):  # users load a model around a text model by this name
        stock["AutoModelForImageTextToText"] = stock["AutoModelForCausalLM"]
    classes = {auto: model_class.__name__ for auto, model_class in stock.items()}
    file = modeling_ragged.__name__.rpartition(".")[2]
    return {
        **config,
        "architectures": [classes["AutoModelForCausalLM"]],
        "auto_map": {auto: f"{file}.{name}" for auto, name in classes.items()},
        **own_code_fields(family, config),
    }


def require_bias(family: Family, config: Any) -> None:
    """Raise InvalidInput if the architecture's MLP output cannot have a bias."""
    if not family.accepts_bias(config):
        raise InvalidInput(
            f"{family.name} does not support an MLP output bias, which this criterion adds; "
            "choose a criterion without a bias"
        )


def rounded_cut(cut: MlpCut, dtype: torch.dtype) -> MlpCut:
    """Return the cut with its output weights rounded to `dtype`, as they will be stored.

    Raises
    ------
    FbnPruneError
        A new output weight is not finite in `dtype`.
    """
    heads = cut.heads
    if heads is not None:
        heads = HeadCut(heads.kept, rounded(heads.out_weight, dtype), heads.out_bias)
    return MlpCut(cut.kept, rounded(cut.down_weight, dtype), cut.down_bias, heads)


def _cut_input(projection: Projection, part: str, tensor: Tensor, kept: Tensor) -> Tensor:
    axis = projection.neuron_axis if part == "weight" else 0
    width = tensor.shape[axis] // projection.stacked
    kept = kept.to(tensor.device)
    rows = torch.cat([kept + block * width for block in range(projection.stacked)])
    return tensor.index_select(axis, rows)
