"""A live mixture of experts behind the same interface as every other model, with the experts of each layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.expert_block import ExpertBlock, ExpertsCut
from fbn_prune.model.mixture_family import MixtureFamily


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
        """Neurons of an expert, by layer."""
        return [block.width for block in self.blocks]

    @property
    def counts(self) -> list[int]:
        """Number of experts, by layer."""
        return [block.count for block in self.blocks]

    def layer_device(self, layer: int) -> torch.device:
        return self.blocks[layer].device

    def cut_experts(self, cuts: Sequence[ExpertsCut], *, round_to: torch.dtype) -> None:
        """Cut the experts of all layers in place and update the config.

        Raises
        ------
        FbnPruneError
            A new output weight is not finite in `round_to`.
        """
        for block, cut in zip(self.blocks, cuts, strict=True):
            block.cut(cut, round_to=round_to)
        text = self.mixture.text_config(self.config)
        first = self.blocks[0]
        changed = self.mixture.with_experts({}, first.count, first.width)
        for key, value in changed.get(self.mixture.text_key or "", changed).items():
            setattr(text, key, value)
        counts = {
            "num_experts": first.count,
            self.mixture.top_k_key: self.mixture.top_k_of(first.count),
        }
        for name, value in counts.items():  # the loss that balances the experts reads these
            if isinstance(getattr(self.model, name, None), int):
                setattr(self.model, name, value)

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
