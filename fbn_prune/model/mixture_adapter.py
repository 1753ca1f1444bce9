"""A live mixture of experts behind the same interface as every other model, with the experts of each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableSequence, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from fbn_prune.model.adapter import ModelAdapter, Removable
from fbn_prune.model.expert_block import ExpertBlock
from fbn_prune.model.mixture_family import MixtureFamily
from fbn_prune.model.routed import ExpertsCut, Routed
from fbn_prune.model.streaming import SpilledCuts


@dataclass(frozen=True)
class _Restored:
    """Changed output weights of experts; removing the change puts the old ones back."""

    experts: nn.Module
    down: nn.Parameter

    def remove(self) -> None:
        self.experts.down_proj = self.down


class MixtureAdapter(ModelAdapter):
    """A mixture of experts in memory; its layers are those with experts.

    Parameters
    ----------
    model
        The model, in evaluation mode.
    family
        Its architecture.

    Attributes
    ----------
    blocks
        The experts of each layer.
    """

    def __init__(self, model: PreTrainedModel, family: MixtureFamily) -> None:
        super().__init__(model, family)
        self.mixture = family
        self.blocks = [ExpertBlock(layer, family) for layer in self.layers]

    @property
    def widths(self) -> list[int]:
        """Neurons of all experts of a layer together: one after another, they are the layer's neurons."""
        return [block.count * block.width for block in self.blocks]

    @property
    def expert_widths(self) -> list[int]:
        """Neurons of an expert, by layer."""
        return [block.width for block in self.blocks]

    @property
    def counts(self) -> list[int]:
        """Number of experts, by layer."""
        return [block.count for block in self.blocks]

    def layer_device(self, layer: int) -> torch.device:
        return self.blocks[layer].device

    def output_module(self, layer: int) -> nn.Linear:
        """Return the module whose output is that of the layer's experts together."""
        module: Any = self.blocks[layer].experts
        return cast(nn.Linear, module)

    def down_weight(self, layer: int) -> Tensor:
        """Return the output weights of all experts side by side, a copy [hidden, experts * neurons]."""
        block = self.blocks[layer]
        return torch.cat([block.down(expert) for expert in range(block.count)], dim=1)

    def watch_neurons(self, layer: int, watch: Callable[[Tensor], None]) -> Removable:
        """Call `watch` with the activations of all experts times their gates; experts without the token count as 0."""
        block = self.blocks[layer]

        def seen(tokens: Routed) -> None:
            width = block.width
            x = tokens.hidden.new_zeros(len(tokens.hidden), block.count * width)
            for expert in tokens.index.unique().tolist():
                rows, gates = tokens.of(expert)
                active = block.activation(expert, tokens.hidden[rows]) * gates[:, None]
                x[rows, expert * width : (expert + 1) * width] = active.to(x)
            watch(x)

        return block.watched(seen)

    def change_neurons(self, layer: int, change: Callable[[Tensor], Tensor]) -> Removable:
        """Let the experts compute with ``change(x)`` for their activations x side by side, until that is removed.

        The change must be linear and act on each neuron by itself: it is applied to the output weights instead.
        """
        block = self.blocks[layer]
        old = block.experts.down_proj
        changed = change(self.down_weight(layer)).chunk(block.count, dim=1)
        axis = 1 if block.experts.is_transposed else 0
        new = torch.stack([one.T if axis else one for one in changed]).contiguous()
        block.experts.down_proj = nn.Parameter(new, requires_grad=False)
        return _Restored(block.experts, old)

    def cut_experts(self, cuts: Sequence[ExpertsCut], *, round_to: torch.dtype) -> None:
        """Cut the experts of all layers in place and update the config.

        Raises
        ------
        FbnPruneError
            A new output weight is not finite in `round_to`.
        """
        self.take_cuts(cuts, round_to=round_to)
        text = self.mixture.text_config(self.config)
        count, width = len(cuts[0].experts), cuts[0].width
        changed = self.mixture.with_experts({}, count, width)
        for key, value in changed.get(self.mixture.text_key or "", changed).items():
            setattr(text, key, value)
        counts = {"num_experts": count, self.mixture.top_k_key: self.mixture.top_k_of(count)}
        for name, value in counts.items():  # the loss that balances the experts reads these
            if isinstance(getattr(self.model, name, None), int):
                setattr(self.model, name, value)

    def take_cuts(self, cuts: Sequence[ExpertsCut], *, round_to: torch.dtype) -> None:
        """Cut the experts of all layers, and leave the config as it is."""
        for block, cut in zip(self.blocks, cuts, strict=True):
            block.cut(cut, round_to=round_to)

    def cuts_list(self) -> MutableSequence[ExpertsCut] | SpilledCuts[ExpertsCut]:
        """Return an empty list for the cuts of the layers, in memory or on disk."""
        return []

    def state_names(self) -> list[str]:
        """Return the names of the tensors of the model's state, without those that are tied to others."""
        return list(remove_tied_weights_from_state_dict(self.model.state_dict(), self.model))

    def stored_state(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors of the model's state whose names begin with `prefix`."""
        state = self.model.state_dict()
        return {name: tensor for name, tensor in state.items() if name.startswith(prefix)}

    @contextmanager
    def trying_experts(
        self, cuts: Sequence[ExpertsCut], *, round_to: torch.dtype
    ) -> Iterator[None]:
        """Compute with cut experts inside the context; on exit the model is as before."""
        before = [block.saved() for block in self.blocks]
        try:
            for block, cut in zip(self.blocks, cuts, strict=True):
                block.cut(cut, round_to=round_to)
            yield
        finally:
            for block, state in zip(self.blocks, before, strict=True):
                block.restore(state)
