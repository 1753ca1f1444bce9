"""Run a mixture of experts that is larger than memory: one decoder layer is in memory at a time.

A cut layer is not kept in memory either: each time, it is read and cut again as a live one is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.converted_tensors import ConvertedTensors
from fbn_prune.model.mixture_adapter import MixtureAdapter
from fbn_prune.model.routed import ExpertsCut
from fbn_prune.model.streaming import Part, SpilledCuts, StreamedModel


class StreamedMixture(StreamedModel, MixtureAdapter):
    """A mixture of experts that reads its weights from the checkpoint on demand; see :class:`StreamedModel`."""

    _tensors: ConvertedTensors

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        *,
        scratch: Path,
        spill_hidden: bool = False,
    ) -> None:
        self._experts_cuts: Sequence[ExpertsCut] | None = None
        super().__init__(checkpoint, device, dtype, scratch=scratch, spill_hidden=spill_hidden)
        self._whole = [block.saved() for block in self.blocks]

    def down_weights(self) -> Iterator[Tensor]:
        """Yield the output weights of all experts of each layer, as :meth:`down_weight` does."""
        for layer in range(self.num_layers):
            self.load_layer(layer)
            yield self.down_weight(layer)
        self.release()

    def release(self) -> None:
        part = self._loaded
        super().release()
        if isinstance(part, int):
            self.blocks[part].restore(self._whole[part])

    def take_cuts(self, cuts: Sequence[ExpertsCut], *, round_to: torch.dtype) -> None:
        self.release()
        self._experts_cuts = cuts

    @contextmanager
    def trying_experts(
        self, cuts: Sequence[ExpertsCut], *, round_to: torch.dtype
    ) -> Iterator[None]:
        self.release()
        before, self._experts_cuts = self._experts_cuts, cuts
        try:
            yield
        finally:
            self.release()
            self._experts_cuts = before

    def cuts_list(self) -> SpilledCuts[ExpertsCut]:
        return SpilledCuts(self._scratch, ExpertsCut.parts, ExpertsCut.of_parts)

    def state_names(self) -> list[str]:
        parameters = {name for name, _ in self.model.named_parameters()}
        return [n for n in self.model.state_dict() if n in self._tensors or n not in parameters]

    def stored_state(self, prefix: str) -> dict[str, Tensor]:
        layer = self.family.layer_of(prefix)
        part: Part | None = layer
        if layer is None:
            part = next((p for p in (self._input, self._output) if prefix.startswith(p)), None)
        if part is None:
            self.release()
        else:
            self._bring(part)
        return super().stored_state(prefix)

    # How StreamedModel reads

    def _open_tensors(self) -> None:
        self._tensors = ConvertedTensors(self._checkpoint, self.model)
        tied = self.model.config.get_text_config(decoder=True).tie_word_embeddings
        names = [name for name, _ in self.model.named_parameters()]
        self._tensors.require([n for n in names if not (tied and n.startswith(self._output))])

    def _values(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        stored = [name for name in names if name in self._tensors]
        yield from self._tensors.read(stored, self._device)
        for name in names:
            if name not in self._tensors:  # tied
                ((_, value),) = self._tensors.read([f"{self._input}.weight"], self._device)
                yield name, value

    def _stored_buffers(self) -> Iterator[tuple[str, Tensor]]:
        names = [name for name, _ in self.model.named_buffers() if name in self._tensors]
        yield from self._tensors.read(names, self._device)

    def _bring(self, part: Part) -> None:
        if self._loaded == part:
            return
        super()._bring(part)
        if isinstance(part, int) and self._experts_cuts is not None:
            cut = self._experts_cuts[part]
            self.blocks[part].cut(cut, round_to=self._checkpoint.storage_dtype)

    def _set_sizes(self, layer: int) -> None:
        """Whole experts have the sizes of the config."""
