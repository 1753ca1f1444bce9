"""One interface to a model, live or streamed: its architecture, its layers and weights, and how they are cut.

The pipeline uses a :class:`ModelAdapter` without knowing where the weights are. A live model holds them in memory, on
one device or several; a streamed model (:class:`fbn_prune.model.streaming.StreamedModel`) reads each layer from its
checkpoint on demand. The differences between architectures are in :mod:`fbn_prune.model.families`. The idea of a
narrow adapter is SliceGPT's (`model_adapter.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fbn_prune.data.calibration import Batch
from fbn_prune.model.calling import Calling
from fbn_prune.model.families import family_of
from fbn_prune.model.family import Family, Projection
from fbn_prune.model.heads import HeadProjection
from fbn_prune.model.spill import Spilled
from fbn_prune.model.surgery import MlpCut, cut_tensor, require_bias


class Removable(Protocol):
    """What ends when it is removed, such as a hook of torch."""

    def remove(self) -> None: ...


class ModelAdapter:
    """A causal language model in memory.

    Parameters
    ----------
    model
        The model, in evaluation mode.
    family
        Its architecture; by default determined from the model's config.

    Attributes
    ----------
    cuts
        The cuts applied so far, one for each layer from the first on.
    calling
        How the model calls its layers; None until the first layer-by-layer forward pass.
    left_out
        Layers that return their input, see :func:`fbn_prune.model.depth.leave_out`.

    Raises
    ------
    InvalidInput
        The architecture is not supported.
    """

    def __init__(self, model: PreTrainedModel, family: Family | None = None) -> None:
        self.model = model
        self.family = family or family_of(model.config)
        self.cuts: MutableSequence[MlpCut] = []
        self.calling: Calling | None = None
        self.left_out: set[int] = set()

    # Sizes

    @property
    def config(self) -> PretrainedConfig:
        """The model's config, kept in line with the cuts."""
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
        """The current number of neurons in each layer's MLP."""
        return [
            self.output_module(layer).weight.shape[self.family.output.neuron_axis]
            for layer in range(self.num_layers)
        ]

    # Devices and memory

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the model computes."""
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        """The device of the token ids and the logits; :meth:`layer_device` gives that of each layer."""
        return self.model.device

    def layer_device(self, layer: int) -> torch.device:
        """The device of a decoder layer; a model may be spread over several."""
        return self.output_module(layer).weight.device

    def load_layer(self, layer: int) -> None:
        """Load a layer's weights; a live model has them in memory already."""

    def release(self) -> None:
        """Free weights that can be read again from the checkpoint."""

    def spill(self) -> Spilled | None:
        """Return an empty list on disk for activations; None where recomputing them is cheaper than storing them."""
        return None

    def hidden_states(self) -> list[Tensor] | Spilled:
        """Return an empty list for the hidden states of all batches, in memory or on disk."""
        return []

    # Modules

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers with an MLP: one for each layer of this interface."""
        found: Any = self.model.get_submodule(self.family.layers)
        numbers = map(self.family.decoder_layer, range(self.num_layers))
        return nn.ModuleList(found[number] for number in numbers)

    @property
    def decoder_layers(self) -> list[tuple[nn.Module, ...]]:
        """For each layer the decoder layers that run for it in turn: those without an MLP run with the next one."""
        found: Any = self.model.get_submodule(self.family.layers)
        groups: list[list[nn.Module]] = [[] for _ in range(self.num_layers)]
        for number, module in enumerate(found):
            layer = self.family.layer_of(f"{self.family.layers}.{number}.")
            assert layer is not None
            groups[layer].append(module)
        return [tuple(group) for group in groups]

    def module(self, layer: int, projection: Projection | HeadProjection) -> nn.Linear:
        """Return a projection's live module: a Linear, or in GPT-2 a Conv1D (weight [in, out])."""
        number = self.family.decoder_layer(layer)
        module: Any = self.model.get_submodule(f"{self.family.layers}.{number}.{projection.path}")
        return module

    def output_module(self, layer: int) -> nn.Linear:
        """Return the MLP's output projection; its input is the activation x, [..., neurons]."""
        return self.module(layer, self.family.output)

    def attention_output(self, layer: int) -> nn.Linear:
        """Return the attention's output projection; its input is the heads' output, [..., heads * size]."""
        assert self.family.attention is not None
        return self.module(layer, self.family.attention.output)

    # Weights

    def down_weight(self, layer: int) -> Tensor:
        """Return a view of the MLP's output weights, [hidden, neurons]: a neuron is a column in every family."""
        weight = self.output_module(layer).weight.detach()
        return weight if self.family.output.neuron_axis == 1 else weight.T

    def down_weights(self) -> Iterator[Tensor]:
        """Yield each layer's output weights as :meth:`down_weight` does; a streamed model reads no other tensors."""
        return map(self.down_weight, range(self.num_layers))

    def down_bias(self, layer: int) -> Tensor | None:
        """Return the MLP's output bias, [hidden], or None."""
        bias = self.output_module(layer).bias
        return None if bias is None else bias.detach()

    def input_weights(self, layer: int) -> tuple[Tensor, ...]:
        """Return views of the MLP's input weights, each [neurons, hidden]; a fused gate and up gives two views."""
        views: list[Tensor] = []
        for projection in self.family.inputs:
            weight = self.module(layer, projection).weight.detach()
            weight = weight if projection.neuron_axis == 0 else weight.T
            views.extend(weight.chunk(projection.stacked, dim=0))
        return tuple(views)

    def watch_neurons(self, layer: int, watch: Callable[[Tensor], None]) -> Removable:
        """Call `watch` with the MLP's activations, [..., neurons], whenever the layer runs, until it is removed."""
        return self.output_module(layer).register_forward_pre_hook(
            lambda module, args: watch(args[0])
        )

    def change_neurons(self, layer: int, change: Callable[[Tensor], Tensor]) -> Removable:
        """Let the layer compute with ``change(x)`` for its activations x, [..., neurons], until that is removed."""
        return self.output_module(layer).register_forward_pre_hook(
            lambda module, args: (change(args[0]), *args[1:])
        )

    # Running

    def logits(
        self, batches: Sequence[Batch], on_batch: Callable[[int], None] = lambda tokens: None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield logits [blocks, length, vocabulary] with the blocks' token ids and masks [blocks, length].

        Parameters
        ----------
        batches
            Right-padded token blocks. One step may cover part of a batch.
        on_batch
            Called with the number of valid tokens processed since the previous call.
        """
        for batch in batches:
            ids = batch.input_ids.to(self.device)
            yield self.model(input_ids=ids, use_cache=False).logits, ids, batch.valid
            on_batch(batch.tokens)

    # Cutting

    def cut(self, layer: int, cut: MlpCut, *, round_to: torch.dtype | None = None) -> None:
        """Cut the first layer that is still whole, in place; its module objects and their hooks stay.

        With the last layer the config is updated, so that `save_pretrained` writes a loadable model if all layers have
        the same width and number of heads, or the model's class builds layers of different widths.

        Parameters
        ----------
        layer
            The layer to cut: the number of cuts so far.
        cut
            The neurons and heads to keep, and the new output weights.
        round_to
            The dtype of the checkpoint to be written; the new output weights are rounded to it. Default: their own.

        Raises
        ------
        InvalidInput
            The cut adds a bias that the architecture does not support.
        FbnPruneError
            A new output weight is not finite in `round_to`.
        """
        self.make_place_for_bias([cut])
        self._cut_layer(layer, cut, round_to)
        if cut.heads is not None:
            self.set_head_groups(layer, len(cut.heads.kept))
        self.cuts.append(cut)
        if len(self.cuts) == self.num_layers:
            self._sync_config()

    def trying(
        self,
        cuts: Sequence[MlpCut],
        *,
        alone: int | None = None,
        round_to: torch.dtype | None = None,
    ) -> AbstractContextManager[None]:
        """Return a context in which the model computes with cut MLPs; on exit it is unchanged.

        A live layer is cut when it is called and restored when it returns, so that memory holds at most one cut MLP
        beside the model. The model's own parameters are never modified.

        Parameters
        ----------
        cuts
            One cut for each layer, read whenever the layer is called; attention heads stay whole.
        alone
            Cut this layer only. Default: all.
        round_to
            See :meth:`cut`.

        Raises
        ------
        InvalidInput, FbnPruneError
            As :meth:`cut`, but during the model's forward pass.
        """
        return self._trying(cuts, alone, round_to)

    @contextmanager
    def _trying(
        self, cuts: Sequence[MlpCut], alone: int | None, round_to: torch.dtype | None
    ) -> Iterator[None]:
        originals: list[tuple[nn.Linear, dict[str, nn.Parameter | None]]] = []

        def cut(layer: int) -> None:
            restore()  # an interrupted forward pass may have left a layer cut
            modules = [self.module(layer, each) for each in self.family.projections]
            originals.extend((module, dict(module._parameters)) for module in modules)
            if cuts[layer].down_bias is not None and self.down_bias(layer) is None:
                require_bias(self.family, self.config)
                self._add_biases(layer)
            self._cut_layer(layer, replace(cuts[layer], heads=None), round_to)

        def restore() -> None:
            for module, parameters in originals:
                for part, parameter in parameters.items():
                    setattr(module, part, parameter)
                set_features(module)
            originals.clear()

        with ExitStack() as hooks:
            hooks.callback(restore)
            for layer, module in enumerate(self.layers):
                if alone not in (None, layer):
                    continue
                before = module.register_forward_pre_hook(lambda _, args, layer=layer: cut(layer))
                hooks.callback(before.remove)
                after = module.register_forward_hook(lambda _, args, output: restore())
                hooks.callback(after.remove)
            yield

    def make_place_for_bias(self, cuts: Sequence[MlpCut]) -> None:
        """Give all MLPs zero biases if a cut adds a bias and they have none.

        Raises
        ------
        InvalidInput
            The architecture does not support biases in the MLP.
        """
        missing = self.output_module(0).bias is None
        if missing and any(cut.down_bias is not None for cut in cuts):
            require_bias(self.family, self.config)
            for layer in range(self.num_layers):
                self._add_biases(layer)
            assert self.family.bias_key is not None
            setattr(self.config, self.family.bias_key, True)

    def set_head_groups(self, layer: int, groups: int) -> None:
        """Set the number of head groups in one live attention module, after its weights are cut."""
        assert self.family.attention is not None
        module: Any = self.layers[layer].get_submodule(self.family.attention.module)
        # The module gets its own config: the model's is shared with layers that are still whole.
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
                number = self.family.decoder_layer(layer)
                name = f"{self.family.layers}.{number}.{projection.path}.{part}"
                values = cut_tensor(
                    self.family, self.config, name, old.detach(), cut, dtype=round_to or old.dtype
                )
                new = values.to(device=old.device, dtype=old.dtype, copy=True)
                setattr(module, part, nn.Parameter(new, requires_grad=old.requires_grad))
            set_features(module)

    def _add_biases(self, layer: int) -> None:
        """Give every MLP projection a zero bias: the config's flag applies to all of them."""
        for projection in self.family.projections:
            module = self.module(layer, projection)
            zeros = module.weight.detach().new_zeros(module.out_features)
            module.bias = nn.Parameter(zeros, requires_grad=module.weight.requires_grad)

    def _sync_widths(self) -> None:
        widths = [width for layer, width in enumerate(self.widths) if layer not in self.left_out]
        own = "ragged_mlp"
        if not self.family.needs_own_code(self.config, widths):
            self.family.set_config_width(self.config, widths)
            for key in (own, "auto_map"):
                if hasattr(self.config, own) and hasattr(self.config, key):
                    delattr(self.config, key)
        elif hasattr(self.config, own):  # a class of `modeling_ragged.py`, which builds any widths
            self.family.set_config_own_widths(self.config, widths)

    def _sync_config(self) -> None:
        self._sync_widths()
        if self.family.attention is None:
            return
        shape = self.family.head_shape(self.config)
        layers = set(range(self.num_layers)) - self.left_out
        channels = {self.attention_output(layer).weight.shape[1] for layer in layers}
        if len(channels) == 1 and (groups := channels.pop() // shape.width) != shape.groups:
            self.family.set_config_head_groups(self.config, groups)


def set_features(module: nn.Linear | Conv1D) -> None:
    """Set a linear module's size attributes to the shape of its weight."""
    first, second = module.weight.shape
    if isinstance(module, Conv1D):
        module.nx, module.nf = first, second
    else:
        module.out_features, module.in_features = first, second
