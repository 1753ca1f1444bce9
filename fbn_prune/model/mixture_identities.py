"""Try out on a tiny random copy what was found of a mixture of experts, before a real checkpoint is touched.

The steps are those of :mod:`fbn_prune.model.identities`, for experts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig

from fbn_prune.data.calibration import Batch
from fbn_prune.model.building import quiet_transformers
from fbn_prune.model.expert_block import ExpertBlock
from fbn_prune.model.family import as_config
from fbn_prune.model.headers import one_line
from fbn_prune.model.identities import first_failure, is_close
from fbn_prune.model.layerwise import LayerwiseForward
from fbn_prune.model.mixture_adapter import MixtureAdapter
from fbn_prune.model.mixture_family import MixtureFamily, mixture_family
from fbn_prune.model.routed import ExpertsCut
from fbn_prune.model.tiny_copy import VOCABULARY, tiny_config, tiny_model

_ALIGNED = 4
"""transformers' own kernels want rows of 16 bytes, four numbers in float32."""


def failed_mixture_step(config: PretrainedConfig) -> str | None:
    """Return the first step that fails on a tiny copy, as a predicate that follows the model_type; None if all hold."""
    return _failed(json.dumps(config.to_dict(), sort_keys=True, default=str), config.model_type)


@lru_cache(maxsize=32)
def _failed(config: str, model_type: str) -> str | None:
    try:
        typed = as_config({**json.loads(config), "model_type": model_type})
        small = tiny_config(typed)
        family = mixture_family({**small.to_dict(), "model_type": model_type})
        copied = _Copy(MixtureAdapter(tiny_model(small), family), family)
    except Exception as error:
        return f"is a mixture of experts that cannot be tried out on a tiny copy: {one_line(error)}"
    failure = first_failure(copied.steps())
    return None if failure is None else f"is a mixture of experts that {failure}"


class _Copy:
    """A tiny copy and the steps that are tried out on it, in order."""

    def __init__(self, adapter: MixtureAdapter, family: MixtureFamily) -> None:
        self._adapter, self._family, self._model = adapter, family, adapter.model
        generator = torch.Generator().manual_seed(0)
        self._ids = torch.randint(3, VOCABULARY - 3, (2, 9), generator=generator)
        self._before = self._logits(self._model)
        self._experts = torch.arange(family.count)

    def steps(self) -> Iterator[tuple[str, Callable[[], bool]]]:
        """Yield the name of each step and what carries it out."""
        yield "no token sees the tokens after it", self._causal
        yield "experts are read as they compute", self._read
        yield "all experts and neurons are kept", self._keep_all
        yield "layers run one by one", self._layer_by_layer
        yield "neurons without output are removed", self._remove_silent
        yield "the router sends tokens to the experts that stay", self._reroute
        yield "the cut model is saved and loaded", self._reload

    @torch.no_grad()
    def _logits(self, model: Any, ids: Tensor | None = None) -> Tensor:
        logits: Tensor = model(input_ids=self._ids if ids is None else ids, use_cache=False).logits
        return logits.float()

    def _causal(self) -> bool:
        other = self._ids.clone()
        other[:, -1] = 3 + (other[:, -1] - 2) % (VOCABULARY - 6)
        changed = self._logits(self._model, other)
        return is_close(changed[:, :-1], self._before[:, :-1]) and not is_close(
            changed[:, -1], self._before[:, -1]
        )

    def _read(self) -> bool:
        for block in self._adapter.blocks:
            with block.recording() as seen:
                self._logits(self._model)
            (tokens,) = seen
            block.check(tokens)
            again = block.route(tokens.hidden)
            same = again.index.sort(1).values == tokens.index.sort(1).values
            if not bool(same.all()):
                return False
        return True

    def _cut(self, block: ExpertBlock, experts: Tensor, neurons: Tensor) -> ExpertsCut:
        kept = experts.tolist()
        bias = [block.bias(expert) for expert in kept]
        return ExpertsCut(
            experts,
            tuple(neurons for _ in kept),
            tuple(block.down(expert)[:, neurons].clone() for expert in kept),
            None if bias[0] is None else tuple(one for one in bias if one is not None),
        )

    def _cuts(self, experts: Tensor, neurons: Tensor) -> list[ExpertsCut]:
        return [self._cut(block, experts, neurons) for block in self._adapter.blocks]

    def _keep_all(self) -> bool:
        every = torch.arange(self._family.expert_width)
        with self._adapter.trying_experts(self._cuts(self._experts, every), round_to=torch.float32):
            kept = self._logits(self._model)
        return is_close(kept, self._before) and is_close(self._logits(self._model), self._before)

    def _layer_by_layer(self) -> bool:
        batches = [Batch(ids[None], torch.ones(1, len(ids), dtype=torch.bool)) for ids in self._ids]
        forward = LayerwiseForward(self._adapter, batches)
        for _ in self._family.mlp_layers:
            forward.advance()
        logits = torch.cat([forward.logits(hidden) for hidden in forward.hidden])
        return is_close(logits.float(), self._before)

    def _remove_silent(self) -> bool:
        """Silence neurons of all experts in the copy, then look at it without them."""
        full = self._family.expert_width
        widths = [w for w in range(_ALIGNED, full, _ALIGNED) if self._family.states_width(w)]
        generator = torch.Generator().manual_seed(2)
        self._kept = torch.randperm(full, generator=generator)[: max(widths)].sort().values
        silent = torch.ones(full, dtype=torch.bool)
        silent[self._kept] = False
        for block in self._adapter.blocks:
            for expert in range(block.count):
                block.down(expert)[:, silent] = 0.0
        before, dense = self._logits(self._model), self._before
        cuts = self._cuts(self._experts, self._kept)
        with self._adapter.trying_experts(cuts, round_to=torch.float32):
            return is_close(self._logits(self._model), before) and not is_close(dense, before)

    @property
    def _left(self) -> Tensor:
        """Experts to keep: all but one of each of the router's groups, or all where these are too small."""
        size = self._family.count // self._family.groups
        return self._experts[self._experts % size != 1] if size > 2 else self._experts

    def _reroute(self) -> bool:
        """Compare where tokens would go without some experts with where they go once these are removed."""
        with self._adapter.blocks[0].recording() as seen:
            self._logits(self._model)
        hidden = seen[0].hidden
        block, left = self._adapter.blocks[0], self._left
        expected = block.route(hidden, left)
        with self._adapter.trying_experts(self._cuts(left, self._kept), round_to=torch.float32):
            found = block.route(hidden)
        there, order = left[found.index].sort(1)
        here, other = expected.index.sort(1)
        gates = found.gates.gather(1, order), expected.gates.gather(1, other)
        return torch.equal(there, here) and is_close(*gates)

    def _reload(self) -> bool:
        """Cut experts and neurons, save the copy and load it by the stock class."""
        self._adapter.cut_experts(self._cuts(self._left, self._kept), round_to=torch.float32)
        before = self._logits(self._model)
        with TemporaryDirectory() as folder, quiet_transformers():
            self._model.generation_config = GenerationConfig()
            self._model.save_pretrained(folder)
            loaded: Any = type(self._model).from_pretrained(Path(folder), local_files_only=True)
        return is_close(self._logits(loaded.eval()), before)
