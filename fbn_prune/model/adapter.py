"""One interface to a model, live or streamed: its architecture, its layers and weights, and how they are cut.

The pipeline uses a :class:`ModelAdapter` without knowing where the weights are. A live model holds them in memory, on
one device or several; a streamed model (:class:`fbn_prune.model.streaming.StreamedModel`) reads each layer from its
checkpoint on demand. The differences between architectures are in :mod:`fbn_prune.model.families`. The idea of a
narrow adapter is SliceGPT's (`model_adapter.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableSequence, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from fbn_prune.data.calibration import Batch
from fbn_prune.model.calling import Calling
from fbn_prune.model.families import family_of
from fbn_prune.model.family import Family, Projection
from fbn_prune.model.head_groups import layer_facts, set_layer_groups
from fbn_prune.model.heads import HeadCut, HeadProjection
from fbn_prune.model.modeling_ragged import set_features, set_groups, without_attention
from fbn_prune.model.spill import Spilled
from fbn_prune.model.surgery import CutsOnRequest, MlpCut, cut_tensor, require_bias
from fbn_prune.model.trial import live_trial


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
    attention_left_out
        Layers whose attention returns zeros, see :mod:`fbn_prune.model.attention_blocks`, each with that module and
        its own `forward` attribute if it had one.

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
        self.attention_left_out: dict[int, tuple[nn.Module, Callable[..., Any] | None]] = {}

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

    @property
    def head_groups(self) -> list[int]:
        """The current number of head groups in each layer's attention, where heads can be cut."""
        width = self.family.head_shape(self.config).width
        return [
            self.attention_output(layer).weight.shape[1] // width
            if any(True for _ in self.attention_module(layer).parameters())
            else 0
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

    def attention_module(self, layer: int) -> nn.Module:
        """Return the attention of a layer, where heads can be cut; it has no weights if it was left out for good."""
        assert self.family.attention is not None
        return self.layers[layer].get_submodule(self.family.attention.module)

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
        self.cut_layer(layer, cut, round_to)
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
        with_heads: bool = False,
    ) -> AbstractContextManager[None]:
        """Return a context in which the model computes with cut layers; on exit it is unchanged.

        A live layer is cut when it is called and restored when it returns, so that memory holds at most one cut layer
        beside the model. The model's own parameters are never modified.

        Parameters
        ----------
        cuts
            One cut for each layer, read whenever the layer is called.
        alone
            Cut this layer only. Default: all.
        round_to
            See :meth:`cut`.
        with_heads
            Cut the attention too, where a cut says so. Default: heads stay whole.

        Raises
        ------
        InvalidInput, FbnPruneError
            As :meth:`cut`, but during the model's forward pass.
        """
        chosen = cuts
        if not with_heads:
            chosen = CutsOnRequest(lambda layer: replace(cuts[layer], heads=None), len(cuts))
        return self._trying(chosen, alone, round_to)

    def trying_heads(
        self, layer: int, heads: HeadCut, round_to: torch.dtype
    ) -> AbstractContextManager[None]:
        """Return a context as :meth:`trying` does, in which one layer's attention is cut and nothing else."""
        self.load_layer(layer)
        weight = self.down_weight(layer).float().cpu()
        cut = MlpCut(torch.arange(weight.shape[1]), weight, heads=heads)
        cuts = CutsOnRequest(lambda _: cut, self.num_layers)
        return self.trying(cuts, alone=layer, round_to=round_to, with_heads=True)

    def _trying(
        self, cuts: Sequence[MlpCut], alone: int | None, round_to: torch.dtype | None
    ) -> AbstractContextManager[None]:
        return live_trial(self, cuts, alone, round_to)

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
                self.add_biases(layer)
            assert self.family.bias_key is not None
            setattr(self.config, self.family.bias_key, True)

    def set_head_groups(self, layer: int, groups: int) -> None:
        """Set the number of head groups in one live attention module, whose weights are cut; 0 replaces the module."""
        assert self.family.attention is not None
        if groups == 0:
            without_attention(self.layers[layer], self.family.attention.module)
            return
        queries = self.family.head_shape(self.config).queries
        set_groups(self.attention_module(layer), self.config, groups, queries)

    def projections_of(self, cut: MlpCut) -> list[Projection | HeadProjection]:
        """Return the projections whose weights a cut changes; attention that it leaves out has none of them."""
        projections: list[Projection | HeadProjection] = list(self.family.projections)
        if self.family.attention is not None and cut.heads is not None and len(cut.heads.kept):
            projections += self.family.attention.projections
        return projections

    def cut_layer(self, layer: int, cut: MlpCut, round_to: torch.dtype | None) -> None:
        """Cut the weights of one layer in place."""
        for projection in self.projections_of(cut):
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

    def add_biases(self, layer: int) -> None:
        """Give every MLP projection a zero bias: the config's flag applies to all of them."""
        for projection in self.family.projections:
            module = self.module(layer, projection)
            zeros = module.weight.detach().new_zeros(module.out_features)
            module.bias = nn.Parameter(zeros, requires_grad=module.weight.requires_grad)

    def _sync_widths(self) -> None:
        widths = [width for layer, width in enumerate(self.widths) if layer not in self.left_out]
        if not self.family.needs_own_code(self.config, widths):
            self.family.set_config_width(self.config, widths)
            if hasattr(self.config, "ragged_mlp"):
                del self.config.ragged_mlp
        elif getattr(self.model, "_auto_class", None) is not None:
            # A class of `modeling_ragged.py`, which builds any widths.
            self.family.set_config_own_widths(self.config, widths)
            self.config.ragged_mlp = self.family.mlp_facts()

    def _sync_config(self) -> None:
        self._sync_widths()
        if self.family.attention is not None:
            every = enumerate(self.head_groups)
            groups = [kept for layer, kept in every if layer not in self.left_out]
            set_layer_groups(self.family, self.config, groups)
        if hasattr(self.config, "auto_map") and not layer_facts(self.family, self.config):
            del self.config.auto_map
