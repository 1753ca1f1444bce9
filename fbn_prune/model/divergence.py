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
from fbn_prune.model.depth import leaving_out
from fbn_prune.model.layerwise import LayerwiseForward
from fbn_prune.model.surgery import MlpCut
from fbn_prune.progress import Advance

DIGITS = 5
"""Digits of a divergence that are kept."""

EVERY = 2
"""Measure at every second token: neighbours tell nearly the same, and the logits cost as much as many layers."""


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
        """Return the mean divergence of the model with all these cuts, one for each layer.

        The layers in `left_out` return their input instead.
        """
        with (
            leaving_out(self._adapter, left_out),
            self._adapter.trying(cuts, round_to=self._round_to, with_heads=True),
        ):
            forward = self._past_all_layers()
        advance(sum(batch.tokens for batch in self._batches))
        hidden = [forward.hidden[index] for index in range(len(self._batches))]
        (apart,) = self._apart([hidden], every=1)
        return _mean(apart)

    def alone(
        self,
        entries: Sequence[Sequence[MlpCut]],
        advance: Advance,
        *,
        below_gaps: Sequence[MlpCut] | None = None,
    ) -> Iterator[list[float]]:
        """For each layer, the mean divergences of the model with this layer alone cut, one for each entry.

        With `below_gaps`, a last one is that of the model without the layer,
        where the layer below has its cut of `below_gaps`.

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
        skipped = [dense.hidden[index] for index in indices]  # the first layer has none below it
        for layer in range(adapter.num_layers):
            found: list[list[Tensor]] = []
            for cuts in entries:
                with adapter.trying(cuts, alone=layer, round_to=self._round_to, with_heads=True):
                    found.append([dense.run(index) for index in indices])
            if below_gaps is not None:
                found.append(skipped)
                with adapter.trying(below_gaps, alone=layer, round_to=self._round_to):
                    skipped = [dense.run(index) for index in indices]
            with torch.inference_mode():
                for above in range(layer + 1, adapter.num_layers):
                    found = [
                        [dense.through(above, hidden[index], index) for index in indices]
                        for hidden in found
                    ]
            measured = [_mean(apart) for apart in self._apart(found, every=EVERY)]
            advance(sum(batch.tokens for batch in self._batches) * len(found))
            dense.advance()
            yield measured

    def _past_all_layers(self) -> LayerwiseForward:
        forward = LayerwiseForward(self._adapter, self._batches)
        for _ in range(self._adapter.num_layers):
            forward.advance()
        return forward

    @torch.inference_mode()
    def _apart(self, changed: Sequence[Sequence[Tensor]], *, every: int) -> list[Tensor]:
        """The divergence of each model at every n-th of this process's tokens, from its outputs of the last layer.

        The outputs are given for each of the first batches; the dense model's logits are computed once for all models.
        """
        found: list[list[Tensor]] = [[torch.zeros(0, dtype=torch.float64)] for _ in changed]
        for index in range(len(changed[0]) if changed else 0):
            # One block at a time: the logits of a batch can be the largest tensor of the run.
            for block, valid in enumerate(self._batches[index].valid):
                dense = self._dense[index]
                measured = valid.nonzero().flatten()[::every].to(dense.device)
                expected = self._predictions(dense, block, measured)
                weights = expected.exp()
                for model, outputs in enumerate(changed):
                    apart = expected - self._predictions(outputs[index], block, measured)
                    found[model].append((weights * apart).sum(-1).double().cpu())
        return [torch.cat(each) for each in found]

    def _predictions(self, hidden: Tensor, block: int, positions: Tensor) -> Tensor:
        """The log-probabilities at some positions of a block, [positions, vocabulary], from [blocks, length, d]."""
        chosen = hidden[block : block + 1, positions.to(hidden.device)]
        return self._forward.logits(chosen)[0].float().log_softmax(-1)


def _mean(apart: Tensor) -> float:
    """The mean over the tokens of all processes."""
    total, tokens = distributed.total(float(apart.sum()), len(apart))
    # The order of the sums differs with the number of processes; what is decided by them must not.
    return float(format(total / tokens, f".{DIGITS}g"))
