"""Cutting neurons out of an MLP and heads out of an attention, in a live model and in a checkpoint's tensors alike.

Both ways take the same `MlpCut` and end in the same numbers: the output weights are rounded once,
to the dtype in which they are stored, so what is evaluated in memory is what the exported
checkpoint computes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fbn_prune.errors import InvalidInput
from fbn_prune.model.families import Family, Location, Projection
from fbn_prune.model.heads import HeadCut, HeadLocation, cut_heads, rounded


@dataclass(frozen=True)
class MlpCut:
    """What one layer becomes.

    Attributes
    ----------
    kept : int64 [n], the neurons of its MLP that stay, ascending.
    down_weight : float32 or float64 [hidden, n], their new output weights.
    down_bias : [hidden], the new output bias (in place of the old one, not added to it); None
        leaves the bias alone.
    heads : the cut of its attention; None leaves that whole.
    """

    kept: Tensor
    down_weight: Tensor
    down_bias: Tensor | None = None
    heads: HeadCut | None = None

    def __post_init__(self) -> None:
        if self.kept.dtype != torch.int64 or self.kept.ndim != 1 or len(self.kept) == 0:
            raise ValueError(
                f"kept must be int64 [n > 0], found {self.kept.dtype} {list(self.kept.shape)}"
            )
        if self.kept[0] < 0 or bool((self.kept[1:] <= self.kept[:-1]).any()):
            raise ValueError("kept must be ascending, unique and non-negative")
        if self.down_weight.ndim != 2 or self.down_weight.shape[1] != len(self.kept):
            raise ValueError(
                f"down_weight {list(self.down_weight.shape)} does not fit "
                f"{len(self.kept)} kept neurons"
            )
        if self.down_bias is not None and self.down_bias.shape != self.down_weight.shape[:1]:
            raise ValueError(
                f"down_bias {list(self.down_bias.shape)} does not fit down_weight "
                f"{list(self.down_weight.shape)}"
            )

    @property
    def width(self) -> int:
        return len(self.kept)


def cut_parts(cut: MlpCut) -> dict[str, Tensor]:
    """The tensors that a cut is made of, by name."""
    parts = {"kept": cut.kept, "down_weight": cut.down_weight, "down_bias": cut.down_bias}
    if cut.heads is not None:
        parts |= {"kept_heads": cut.heads.kept, "out_weight": cut.heads.out_weight}
        parts["out_bias"] = cut.heads.out_bias
    return {name: part for name, part in parts.items() if part is not None}


def cut_of_parts(parts: Mapping[str, Tensor]) -> MlpCut:
    """The cut whose :func:`cut_parts` these are."""
    heads = None
    if "kept_heads" in parts:
        heads = HeadCut(parts["kept_heads"], parts["out_weight"], parts.get("out_bias"))
    return MlpCut(parts["kept"], parts["down_weight"], parts.get("down_bias"), heads)


def cut_tensor(family: Family, location: Location, tensor: Tensor, cut: MlpCut) -> Tensor:
    """A checkpoint's MLP tensor after the cut, contiguous, in the dtype it had.

    Raises
    ------
    FbnPruneError
        If a new output weight does not fit the dtype.
    """
    if location.projection is not family.output:
        return _cut_input(location.projection, location.part, tensor, cut.kept)
    if location.part == "weight":
        return _new_output_weight(family, cut, tensor.dtype)
    return tensor if cut.down_bias is None else rounded(cut.down_bias, tensor.dtype)


def apply_cut(
    model: PreTrainedModel,
    family: Family,
    layer: int,
    cut: MlpCut,
    *,
    round_to: torch.dtype | None = None,
) -> None:
    """Shrink one layer of a live model in place; its modules, and the hooks on them, stay.

    The config follows as soon as all layers are equally wide and have as many heads, so that
    `save_pretrained` writes a loadable model.

    Parameters
    ----------
    round_to : dtype in which the checkpoint will be stored; the output weights take its values.

    Raises
    ------
    InvalidInput
        If the cut brings a bias to an architecture that has no place for one.
    FbnPruneError
        If a new output weight does not fit `round_to`.
    """
    require_place_for_bias(model, family, [cut])
    _apply_mlp_cut(model, family, layer, cut, round_to)
    if cut.heads is not None:
        _apply_head_cut(model, family, layer, cut.heads, round_to)
    _sync_width(model, family)


@contextmanager
def as_if_cut(
    model: PreTrainedModel,
    family: Family,
    cuts: Sequence[MlpCut],
    *,
    round_to: torch.dtype | None = None,
) -> Iterator[None]:
    """The live model computes with the MLPs that the cut one would have, inside the context; then it is as it was.

    A layer is cut when it is called and whole again when it returns, so that one cut MLP at most is in memory beside
    the model. The model's own parameters are set aside meanwhile and never written to.

    Parameters
    ----------
    cuts : one a layer, asked for whenever the layer is called; their heads are left out of account.
    round_to : see :func:`apply_cut`.

    Raises
    ------
    InvalidInput, FbnPruneError
        From the model's forward pass, where :func:`apply_cut` would raise them.
    """
    aside: list[tuple[nn.Linear, dict[str, nn.Parameter | None]]] = []

    def cut(layer: int) -> None:
        put_back()  # what a forward pass that broke off has left
        modules = [family.projection_module(model, layer, each) for each in family.projections]
        aside.extend((module, dict(module._parameters)) for module in modules)
        if cuts[layer].down_bias is not None and family.down_bias(model, layer) is None:
            require_bias(family, model.config)
            _add_biases(model, family, layer)
        _apply_mlp_cut(model, family, layer, cuts[layer], round_to)

    def put_back() -> None:
        for module, parameters in aside:
            for part, parameter in parameters.items():
                setattr(module, part, parameter)
            set_features(module)
        aside.clear()

    with ExitStack() as hooks:
        hooks.callback(put_back)
        for layer, module in enumerate(family.layer_modules(model)):
            before = module.register_forward_pre_hook(lambda _, args, layer=layer: cut(layer))
            hooks.callback(before.remove)
            after = module.register_forward_hook(lambda _, args, output: put_back())
            hooks.callback(after.remove)
        yield


def pruned_config(
    config: Mapping[str, Any],
    family: Family,
    width: int,
    needs_bias: bool,
    head_groups: int | None = None,
) -> dict[str, Any]:
    """The `config.json` object of a model pruned to one width, and one number of heads, in every layer.

    `auto_map` goes: it names code files that an export does not hold, and the stock classes compute
    the same. `head_groups` are those that stay in every layer, None where no heads were cut.

    Raises
    ------
    InvalidInput
        If a bias is needed and the architecture has no place for one, or it does not accept that
        number of heads.
    """
    pruned = copy.deepcopy(dict(config))
    pruned.pop("auto_map", None)
    pruned[family.width_key] = width
    if head_groups is not None:
        pruned = family.with_head_groups(pruned, head_groups)
    if needs_bias and not family.has_bias(config):
        require_bias(family, config)
        assert family.bias_key is not None
        pruned[family.bias_key] = True
    return pruned


def kept_head_groups(cuts: Sequence[MlpCut]) -> int | None:
    """How many groups of attention heads the cuts leave in every layer; None where they cut none.

    Raises
    ------
    InvalidInput
        Not as many in each.
    """
    groups = {None if cut.heads is None else len(cut.heads.kept) for cut in cuts}
    if len(groups) > 1:
        raise InvalidInput("a config has one number of attention heads for all layers")
    return groups.pop()


def require_bias(family: Family, config: Any) -> None:
    """Refuse an architecture whose MLP output has no bias and can be given none."""
    if not family.accepts_bias(config):
        raise InvalidInput(
            f"{family.name} has no place for an MLP output bias, which this criterion adds; "
            "choose a criterion without a bias"
        )


def require_place_for_bias(model: PreTrainedModel, family: Family, cuts: Iterable[MlpCut]) -> None:
    """Give the MLPs of a live model zero biases if a cut brings one and they have none, or refuse it."""
    if family.output_module(model, 0).bias is None and any(
        cut.down_bias is not None for cut in cuts
    ):
        require_bias(family, model.config)
        for layer in range(len(family.layer_modules(model))):
            _add_biases(model, family, layer)
        assert family.bias_key is not None
        setattr(model.config, family.bias_key, True)


def rounded_cut(cut: MlpCut, dtype: torch.dtype) -> MlpCut:
    """The cut with its output weights as they will be stored.

    Raises
    ------
    FbnPruneError
        If a new output weight does not fit the dtype.
    """
    heads = cut.heads
    if heads is not None:
        heads = HeadCut(heads.kept, rounded(heads.out_weight, dtype), heads.out_bias)
    return MlpCut(cut.kept, rounded(cut.down_weight, dtype), cut.down_bias, heads)


def _apply_mlp_cut(
    model: PreTrainedModel, family: Family, layer: int, cut: MlpCut, round_to: torch.dtype | None
) -> None:
    for projection in family.inputs:
        module = family.projection_module(model, layer, projection)
        kept = cut.kept.to(module.weight.device)
        for part, parameter in list(module.named_parameters(recurse=False)):
            _replace(module, part, _cut_input(projection, part, parameter.detach(), kept))
        set_features(module)
    down = family.output_module(model, layer)
    _replace(down, "weight", _new_output_weight(family, cut, round_to or down.weight.dtype))
    if cut.down_bias is not None:
        _replace(down, "bias", rounded(cut.down_bias, round_to or down.bias.dtype))
    set_features(down)


def _apply_head_cut(
    model: PreTrainedModel, family: Family, layer: int, cut: HeadCut, round_to: torch.dtype | None
) -> None:
    assert family.attention is not None
    shape = family.head_shape(model.config)
    inside = family.layer_modules(model)[layer]
    for projection in family.attention.projections:
        module: Any = inside.get_submodule(projection.path)
        for part, parameter in list(module.named_parameters(recurse=False)):
            location = HeadLocation(layer, projection, "weight" if part == "weight" else "bias")
            old = parameter.detach()
            if projection.reads and round_to is not None:
                old = old.to(round_to)
            _replace(module, part, cut_heads(location, old, cut, shape))
        set_features(module)
    family.set_head_groups(model, layer, len(cut.kept))


def _cut_input(projection: Projection, part: str, tensor: Tensor, kept: Tensor) -> Tensor:
    axis = projection.neuron_axis if part == "weight" else 0
    width = tensor.shape[axis] // projection.stacked
    rows = torch.cat([kept + block * width for block in range(projection.stacked)])
    return tensor.index_select(axis, rows)


def _new_output_weight(family: Family, cut: MlpCut, dtype: torch.dtype) -> Tensor:
    weight = cut.down_weight if family.output.neuron_axis == 1 else cut.down_weight.T
    return rounded(weight, dtype).contiguous()


def _replace(module: nn.Module, part: str, values: Tensor) -> None:
    old: nn.Parameter = getattr(module, part)
    new = values.to(device=old.device, dtype=old.dtype, copy=True)
    setattr(module, part, nn.Parameter(new, requires_grad=old.requires_grad))


def set_features(module: nn.Linear | Conv1D) -> None:
    """Bring a layer's own record of its shape in line with its weight."""
    first, second = module.weight.shape
    if isinstance(module, Conv1D):
        module.nx, module.nf = first, second
    else:
        module.out_features, module.in_features = first, second


def _add_biases(model: PreTrainedModel, family: Family, layer: int) -> None:
    """Give every MLP projection a zero bias: the config's flag speaks for all of them at once."""
    for projection in family.projections:
        module = family.projection_module(model, layer, projection)
        zeros = module.weight.detach().new_zeros(module.out_features)
        module.bias = nn.Parameter(zeros, requires_grad=module.weight.requires_grad)


def _sync_width(model: PreTrainedModel, family: Family) -> None:
    layers = range(len(family.layer_modules(model)))
    widths = {family.down_weight(model, layer).shape[1] for layer in layers}
    if len(widths) == 1:
        setattr(model.config, family.width_key, widths.pop())
    if family.attention is None:
        return
    shape = family.head_shape(model.config)
    channels = {family.attention_output(model, layer).weight.shape[1] for layer in layers}
    if len(channels) == 1 and (groups := channels.pop() // shape.width) != shape.groups:
        family.set_config_head_groups(model.config, groups)
