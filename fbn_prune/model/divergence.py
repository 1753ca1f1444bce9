"""Measure how far a changed model's predictions are from the dense model's, on a few tokens.

The measure is the Kullback-Leibler divergence KL(dense || changed) of the next token's distribution, in nats, averaged
over tokens. Both models see the same tokens, so its sampling error is far smaller than that of a difference of losses.
To measure a change of one layer, only that layer and those above run: the dense model's hidden states below are known.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from fbn_prune import distributed
from fbn_prune.data.calibration import Batch
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.layerwise import LayerwiseForward
from fbn_prune.model.surgery import MlpCut
from fbn_prune.progress import Advance


class DenseReference:
    """The dense model's outputs on these batches, to compare changed models with.

    Parameters
    ----------
    adapter
        The model, still dense; it must be dense again whenever a method is called.
    batches
        The tokens, all of them valid or padding on the right. Several processes share them.
    round_to
        The dtype in which cut output weights would be stored.
    """

    def __init__(
        self, adapter: ModelAdapter, batches: Sequence[Batch], round_to: torch.dtype
    ) -> None:
        self._adapter, self._round_to = adapter, round_to
        self._batches = distributed.share(batches)
        self._forward = self._past_all_layers()
        self._dense = [self._forward.hidden[index] for index in range(len(self._batches))]

    def divergence(
        self, cuts: Sequence[MlpCut], advance: Advance, left_out: Collection[int] = ()
    ) -> float:
        """Return the divergence of the model with all these cuts, one for each layer, in nats a token.

        The layers in `left_out` return their input instead.
        """
        with (
            self._adapter.leaving_out(left_out),
            self._adapter.trying(cuts, round_to=self._round_to),
        ):
            forward = self._past_all_layers()
        advance(self._tokens)
        return self._mean([forward.hidden[index] for index in range(len(self._batches))])

    def alone(
        self, entries: Sequence[Sequence[MlpCut]], advance: Advance, *, leave_out: bool = False
    ) -> Iterator[list[float]]:
        """For each layer, the divergences of the model with this layer alone cut, one for each entry.

        With `leave_out`, a last one is that of the model without the layer.

        Parameters
        ----------
        entries
            Each has one cut for each layer.
        advance
            Called with the number of tokens after each entry of a layer.
        """
        adapter = self._adapter
        dense = LayerwiseForward(adapter, self._batches)
        indices = range(len(self._batches))
        for layer in range(adapter.num_layers):
            found: list[list[Tensor]] = []
            for cuts in entries:
                with adapter.trying(cuts, alone=layer, round_to=self._round_to):
                    found.append([dense.run(index) for index in indices])
            if leave_out:
                found.append([dense.hidden[index] for index in indices])
            with torch.inference_mode():
                for above in range(layer + 1, adapter.num_layers):
                    found = [
                        [dense.through(above, hidden[index], index) for index in indices]
                        for hidden in found
                    ]
            measured = []
            for hidden in found:
                measured.append(self._mean(hidden))
                advance(self._tokens)
            dense.advance()
            yield measured

    @property
    def _tokens(self) -> int:
        return sum(batch.tokens for batch in self._batches)

    def _past_all_layers(self) -> LayerwiseForward:
        forward = LayerwiseForward(self._adapter, self._batches)
        for _ in range(self._adapter.num_layers):
            forward.advance()
        return forward

    @torch.inference_mode()
    def _mean(self, hidden: Sequence[Tensor]) -> float:
        """The mean divergence for outputs of the last layer, over the tokens of all processes."""
        total, count = 0.0, 0
        for dense, changed, batch in zip(self._dense, hidden, self._batches, strict=True):
            # One block at a time: the logits of a batch can be the largest tensor of the run.
            for one, other, valid in zip(
                dense.split(1), changed.split(1), batch.valid, strict=True
            ):
                expected = self._forward.logits(one)[0][valid].float().log_softmax(-1)
                logits = self._forward.logits(other)[0][valid].float().log_softmax(-1)
                apart = (expected.exp() * (expected - logits)).sum(-1)
                total, count = total + float(apart.double().sum()), count + len(apart)
        total, tokens = distributed.total(total, count)
        return total / tokens
