"""Predict the memory of a run on a mixture of experts; see :mod:`fbn_prune.runs.memory`.

What is read and cut at once is one decoder layer. Its experts are fitted one after another, so that only one of them
has matrices in memory; their tokens, and the new weights of the layer, are held together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fbn_prune.model.checkpoint import SLICE_BYTES
from fbn_prune.model.mixture_family import MixtureFamily
from fbn_prune.networks.sampling import LOSS_CONTEXT
from fbn_prune.runs.memory import PROCESS_BYTES, Sizes

CHOICE_TOKENS, CHOICE_VALUES, PART = 4096, 2**27, 4096
"""As in `pruning/experts.py`, which is slow to import."""


@dataclass(frozen=True)
class MixtureSizes(Sizes):
    """Predicts the peak memory of each stage in bytes, for a mixture."""

    spreads: ClassVar[bool] = False

    def stages(self) -> dict[str, int]:
        recipe, checkpoint, size = self.recipe, self.checkpoint, self.dtype.itemsize
        family, config = checkpoint.family, checkpoint.config
        assert isinstance(family, MixtureFamily)
        hidden, vocabulary = family.hidden_size(config), family.vocab_size(config)
        neurons, layers = family.count * family.expert_width, len(family.mlp_layers)
        tokens, held_out = recipe.tokens, int(recipe.tokens * recipe.held_out)
        layer, largest, rest = self._weights()
        base = PROCESS_BYTES + (rest if self.streamed else checkpoint.total_parameters) * size
        # Fused experts may be turned on reading; experts stored apiece are read a few at a time.
        fused = max(
            (i.parameters for i in checkpoint.tensors.values() if len(i.shape) > 2), default=0
        )
        piece = max(2 * SLICE_BYTES, fused * size)
        part = layer * size + piece if self.streamed else 0
        head = vocabulary * hidden * size + min(SLICE_BYTES, largest) if self.streamed else 0
        batch = min(self.batch, tokens)
        forward = part + batch * (10 * hidden + self.context) * size + self._experts(batch)
        rows = min(self.context if self.streamed else batch, held_out)
        logits = head + rows * vocabulary * (size + 2 * 4)
        few_logits = head + min(LOSS_CONTEXT, self.context) * vocabulary * (size + 2 * 4)
        cut = layer * size * 3 // 2  # the cut layer beside the whole one, and what it is made from
        cuts = 0 if self.streamed else layers * layer * size // 2
        stages = {
            "perplexity": base
            + cuts
            + self._hidden(held_out)
            + max(logits, head + batch * hidden * size, forward + cut)
        }
        if not self.streamed:
            # The files are memory-mapped while the weights are loaded; of experts that are stored apiece, transformers
            # holds all before it puts them together.
            apiece = (
                0 if fused else checkpoint.total_parameters * size - checkpoint.total_bytes // 2
            )
            stages["load"] = base + checkpoint.total_bytes + max(apiece, 2 * layer * size)
        maps = 0
        if recipe.needs_networks:
            maps = 4 * recipe.networks * neurons * layers
            watched = forward + 3 * 4 * batch * neurons
            stages["networks"] = base + max(
                self._discovery(neurons, neurons * layers, max(few_logits, watched)),
                7 * maps + recipe.network_tokens,
            )
        streams = 2 if recipe.sequential else 1
        record = tokens * (hidden * size + family.top_k * (8 + size))
        lacking = tokens * hidden * 4 * streams
        stages["prune"] = int(
            base
            + cuts
            + maps
            + streams * self._hidden(tokens)
            + streams * record
            + max(
                head,
                forward + record,
                part + self._cutting(layer) + tokens * hidden * (size + 4) + lacking,
                forward + cut,
            )
        )
        stages["export"] = int(base + cuts + part + cut + 1.3 * largest + maps)
        return stages

    def _experts(self, batch: int) -> int:
        """Return the bytes of what the experts compute for a batch."""
        family, config = self.checkpoint.family, self.checkpoint.config
        assert isinstance(family, MixtureFamily)
        each = 5 * family.hidden_size(config) + 4 * family.expert_width
        return batch * family.top_k * each * self.dtype.itemsize

    def _cutting(self, layer: int) -> int:
        """Return the bytes for choosing and fitting a layer's experts, without their tokens."""
        family, config, size = self.checkpoint.family, self.checkpoint.config, self.dtype.itemsize
        assert isinstance(family, MixtureFamily)
        hidden, width, count = family.hidden_size(config), family.expert_width, family.count
        few = min(CHOICE_TOKENS, self.recipe.tokens, max(64, CHOICE_VALUES // (count * hidden)))
        choosing = few * hidden * (count * size + 4 * 4)
        each = 4 + 4 + 2 * size  # found, while solved, and two candidates as they are stored
        new = count * hidden * width * each
        solving = int(self._fit(width, hidden)) + PART * (3 * width * (size + 4) + 2 * hidden * 4)
        return max(choosing, new + max(solving, self._experts(PART)))

    def _fit(self, inputs: int, outputs: int) -> float:
        """Return the bytes for choosing and fitting the neurons of one expert."""
        square, columns = 8 * inputs * inputs, 8 * outputs * inputs
        return 5 * square + 6 * columns

    def _weights(self) -> tuple[int, int, int]:
        """As for other models, where the names in the files may be others than the model's."""
        checkpoint, family = self.checkpoint, self.checkpoint.family
        if any(family.layer_of(name) is not None for name in checkpoint.tensors):
            return super()._weights()
        layers = family.num_layers(checkpoint.config)
        largest = max(info.nbytes for info in checkpoint.tensors.values())
        return checkpoint.total_parameters // layers, largest, 0
