"""The model that a run works on, as one object: its architecture, its layers and weights, and how they are cut.

The pipeline holds a :class:`ModelAdapter` and never asks where the weights are. A live model's are in memory, on one
device or spread over several; a streamed model (:class:`fbn_prune.model.streaming.StreamedModel`) reads each part from
its checkpoint when it is wanted. What differs between architectures is in :mod:`fbn_prune.model.families`. The idea
of a narrow adapter is SliceGPT's (`model_adapter.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fbn_prune.data.calibration import Batch
from fbn_prune.model.families import family_of
from fbn_prune.model.family import Family, Projection
from fbn_prune.model.heads import HeadProjection
from fbn_prune.model.spill import Spilled
from fbn_prune.model.surgery import MlpCut, cut_tensor, require_bias


class ModelAdapter:
    """A causal language model in memory.

    Parameters
    ----------
    model
        In evaluation mode.
    family
        Its architecture; by default found by the model's config.

    Attributes
    ----------
    cuts
        Cuts of the layers cut so far, from the first on.
    returns_tuple
        Whether a decoder layer returns a tuple; None until a forward pass layer by layer has found out.

    Raises
    ------
    InvalidInput
        The architecture is not supported.
    """

    def __init__(self, model: PreTrainedModel, family: Family | None = None) -> None:
        self.model = model
        self.family = family or family_of(model.config, ragged=True)
        self.cuts: MutableSequence[MlpCut] = []
        self.returns_tuple: bool | None = None

    # Sizes

    @property
    def config(self) -> PretrainedConfig:
        """The model's config; it follows the cuts."""
        return self.model.config

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self.family.num_layers(self.config)

    @property
    def hidden_size(self) -> int:
        """Channels of the residual stream."""
        return self.family.hidden_size(self.config)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.family.vocab_size(self.config)

    @property
    def widths(self) -> list[int]:
        """Neurons of each layer's MLP as it is now."""
        return [
            self.output_module(layer).weight.shape[self.family.output.neuron_axis]
            for layer in range(self.num_layers)
        ]

    # Places

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        """Where token ids enter and logits come out; see :meth:`layer_device` for what is between."""
        return self.model.device

    def layer_device(self, layer: int) -> torch.device:
        """Where a decoder layer computes: a model may be spread over several devices."""
        return self.output_module(layer).weight.device

    def load_layer(self, layer: int) -> None:
        """Make sure that a layer's weights can be read."""

    def release(self) -> None:
        """Free weights that are in memory and can be read again."""

    def spill(self) -> Spilled | None:
        """A list on disk for activations that do not fit in memory; None where computing them again is cheaper."""
        return None

    def hidden_states(self) -> list[Tensor] | Spilled:
        """An empty list for the hidden states of all batches, in memory or on disk."""
        return []

    # Modules

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        return self.model.get_submodule(self.family.layers)  # type: ignore[return-value]

    def module(self, layer: int, projection: Projection | HeadProjection) -> nn.Linear:
        """A projection's live module: a Linear, or in GPT-2 a Conv1D (weight [in, out])."""
        module: Any = self.layers[layer].get_submodule(projection.path)
        return module

    def output_module(self, layer: int) -> nn.Linear:
        """The MLP's output projection, whose input is the activation x, [..., neurons]."""
        return self.module(layer, self.family.output)

    def attention_output(self, layer: int) -> nn.Linear:
        """The projection that reads what the attention heads put out, [..., heads * size]."""
        assert self.family.attention is not None
        return self.module(layer, self.family.attention.output)

    # Weights

    def down_weight(self, layer: int) -> Tensor:
        """View of the MLP's output weights, [hidden, neurons]: a neuron is a column in every family."""
        weight = self.output_module(layer).weight.detach()
        return weight if self.family.output.neuron_axis == 1 else weight.T

    def down_weights(self) -> Iterator[Tensor]:
        """The output weights of each layer in order, see :meth:`down_weight`; nothing else is read."""
        return map(self.down_weight, range(self.num_layers))

    def down_bias(self, layer: int) -> Tensor | None:
        """The MLP's output bias, [hidden], or None."""
        bias = self.output_module(layer).bias
        return None if bias is None else bias.detach()

    def input_weights(self, layer: int) -> tuple[Tensor, ...]:
        """Views of the MLP's input weights, [neurons, hidden] each: gate and up apart, even if fused."""
        views: list[Tensor] = []
        for projection in self.family.inputs:
            weight = self.module(layer, projection).weight.detach()
            weight = weight if projection.neuron_axis == 0 else weight.T
            views.extend(weight.chunk(projection.stacked, dim=0))
        return tuple(views)

    # Running

    def logits(
        self, batches: Sequence[Batch], on_batch: Callable[[int], None] = lambda tokens: None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Logits [blocks, length, vocabulary] of some blocks at a time, with their ids and masks [blocks, length].

        Parameters
        ----------
        on_batch
            Called with the number of valid tokens done since the last call.
        """
        for batch in batches:
            ids = batch.input_ids.to(self.device)
            yield self.model(input_ids=ids, use_cache=False).logits, ids, batch.valid
            on_batch(batch.tokens)

    # Cutting

    def cut(self, layer: int, cut: MlpCut, *, round_to: torch.dtype | None = None) -> None:
        """Shrink the next layer that is whole, in place; its modules, and the hooks on them, stay.

        The config follows as soon as all layers are equally wide and have as many heads, so that `save_pretrained`
        writes a loadable model.

        Parameters
        ----------
        round_to
            The dtype in which the checkpoint will be stored; the output weights take its values. Default: their own.

        Raises
        ------
        InvalidInput
            The cut brings a bias to an architecture that has no place for one.
        FbnPruneError
            A new output weight does not fit `round_to`.
        """
        self.make_place_for_bias([cut])
        self._cut_layer(layer, cut, round_to)
        if cut.heads is not None:
            self.set_head_groups(layer, len(cut.heads.kept))
        self._sync_config()
        self.cuts.append(cut)

    def trying(
        self, cuts: Sequence[MlpCut], *, round_to: torch.dtype | None = None
    ) -> AbstractContextManager[None]:
        """The model computes with the MLPs that the cut one would have, inside the context; then it is as it was.

        A live layer is cut when it is called and whole again when it returns, so that at most one cut MLP is in memory
        beside the model. The model's own parameters are set aside meanwhile and never written to.

        Parameters
        ----------
        cuts
            One for each layer, read whenever the layer is called; their heads are not cut.
        round_to
            See :meth:`cut`.

        Raises
        ------
        InvalidInput, FbnPruneError
            From the model's forward pass, where :meth:`cut` would raise them.
        """
        return self._trying(cuts, round_to)

    @contextmanager
    def _trying(self, cuts: Sequence[MlpCut], round_to: torch.dtype | None) -> Iterator[None]:
        aside: list[tuple[nn.Linear, dict[str, nn.Parameter | None]]] = []

        def cut(layer: int) -> None:
            put_back()  # what a forward pass that broke off has left
            modules = [self.module(layer, each) for each in self.family.projections]
            aside.extend((module, dict(module._parameters)) for module in modules)
            if cuts[layer].down_bias is not None and self.down_bias(layer) is None:
                require_bias(self.family, self.config)
                self._add_biases(layer)
            self._cut_layer(layer, replace(cuts[layer], heads=None), round_to)

        def put_back() -> None:
            for module, parameters in aside:
                for part, parameter in parameters.items():
                    setattr(module, part, parameter)
                set_features(module)
            aside.clear()

        with ExitStack() as hooks:
            hooks.callback(put_back)
            for layer, module in enumerate(self.layers):
                before = module.register_forward_pre_hook(lambda _, args, layer=layer: cut(layer))
                hooks.callback(before.remove)
                after = module.register_forward_hook(lambda _, args, output: put_back())
                hooks.callback(after.remove)
            yield

    def make_place_for_bias(self, cuts: Sequence[MlpCut]) -> None:
        """Give the MLPs zero biases if a cut brings one and they have none.

        Raises
        ------
        InvalidInput
            The architecture has no place for one.
        """
        missing = self.output_module(0).bias is None
        if missing and any(cut.down_bias is not None for cut in cuts):
            require_bias(self.family, self.config)
            for layer in range(self.num_layers):
                self._add_biases(layer)
            assert self.family.bias_key is not None
            setattr(self.config, self.family.bias_key, True)

    def set_head_groups(self, layer: int, groups: int) -> None:
        """Tell one live attention module how many groups of heads its weights have."""
        assert self.family.attention is not None
        module: Any = self.layers[layer].get_submodule(self.family.attention.module)
        # A config of its own: the model's speaks for all layers, and those not cut yet still run.
        module.config = copy.copy(module.config)
        self.family.set_config_head_groups(module.config, groups)
        if hasattr(module, "num_key_value_heads"):
            module.num_key_value_heads = groups

    def _cut_layer(self, layer: int, cut: MlpCut, round_to: torch.dtype | None) -> None:
        projections: list[Projection | HeadProjection] = list(self.family.projections)
        if cut.heads is not None and self.family.attention is not None:
            projections += self.family.attention.projections
        for projection in projections:
            module = self.module(layer, projection)
            for part, old in list(module.named_parameters(recurse=False)):
                name = f"{self.family.layers}.{layer}.{projection.path}.{part}"
                values = cut_tensor(
                    self.family, self.config, name, old.detach(), cut, dtype=round_to or old.dtype
                )
                new = values.to(device=old.device, dtype=old.dtype, copy=True)
                setattr(module, part, nn.Parameter(new, requires_grad=old.requires_grad))
            set_features(module)

    def _add_biases(self, layer: int) -> None:
        """Give every MLP projection a zero bias: the config's flag speaks for all of them at once."""
        for projection in self.family.projections:
            module = self.module(layer, projection)
            zeros = module.weight.detach().new_zeros(module.out_features)
            module.bias = nn.Parameter(zeros, requires_grad=module.weight.requires_grad)

    def _sync_config(self) -> None:
        if len(widths := set(self.widths)) == 1:
            setattr(self.config, self.family.width_key, widths.pop())
        if self.family.attention is None:
            return
        shape = self.family.head_shape(self.config)
        layers = range(self.num_layers)
        channels = {self.attention_output(layer).weight.shape[1] for layer in layers}
        if len(channels) == 1 and (groups := channels.pop() // shape.width) != shape.groups:
            self.family.set_config_head_groups(self.config, groups)


def set_features(module: nn.Linear | Conv1D) -> None:
    """Bring a linear module's own record of its shape in line with its weight."""
    first, second = module.weight.shape
    if isinstance(module, Conv1D):
        module.nx, module.nf = first, second
    else:
        module.out_features, module.in_features = first, second
