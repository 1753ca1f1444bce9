"""Try out on a tiny random copy what a found family says of an architecture, before a real checkpoint is touched.

Each step is a property that holds for any architecture that this package can prune. A step that fails is a refusal that
names it: a wrong adapter would write a model that computes something else, and nothing else would tell.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from fbn_prune.data.calibration import Batch
from fbn_prune.errors import FbnPruneError
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.building import quiet_transformers
from fbn_prune.model.family import as_config
from fbn_prune.model.found_family import FoundFamily, stock_form
from fbn_prune.model.headers import one_line
from fbn_prune.model.layerwise import LayerwiseForward
from fbn_prune.model.surgery import MlpCut
from fbn_prune.model.tiny_copy import VOCABULARY, tiny_config, tiny_model

_CLOSE = 1e-4
"""Largest difference of logits, relative to the largest logit, that rounding of float32 explains."""


def failed_step(family: FoundFamily, config: PretrainedConfig) -> str | None:
    """Return the first step that fails on a tiny copy, as a predicate that follows the model_type; None if all hold.

    Parameters
    ----------
    family
        What was found of the architecture.
    config
        The config of the model.
    """
    return _failed(
        family,
        json.dumps(stock_form(config.to_dict()), sort_keys=True, default=str),
        config.model_type,
    )


@lru_cache(maxsize=32)
def _failed(family: FoundFamily, config: str, model_type: str) -> str | None:
    typed = as_config({**json.loads(config), "model_type": model_type})
    try:
        copied = _Copy(family, tiny_model(tiny_config(typed)))
    except Exception as error:
        return f"cannot be tried out on a tiny copy: {one_line(error)}"
    return first_failure(copied.steps())


def first_failure(steps: Iterator[tuple[str, Callable[[], bool]]]) -> str | None:
    """Carry out the steps of a tiny copy, and return what is wrong with the first that fails; None if all hold.

    Parameters
    ----------
    steps
        The name of each step, and a function that says whether the logits are what they should be.
    """
    for name, holds in steps:
        try:
            reason = None if holds() else "the logits differ"
        except MemoryError:
            raise
        except Exception as error:  # a model class that cannot do the step raises any type
            reason = one_line(error)
        if reason is not None:
            return f"fails a check on a tiny random copy, {name}: {reason}"
    return None


class _Copy:
    """A tiny copy and the steps that are tried out on it, in order; each leaves it as it was or says so."""

    def __init__(self, family: FoundFamily, model: PreTrainedModel) -> None:
        self._family, self._model = family, model
        generator = torch.Generator().manual_seed(0)
        self._ids = torch.randint(3, VOCABULARY - 3, (2, 9), generator=generator)
        self._before = self._logits(model)

    def steps(self) -> Iterator[tuple[str, Callable[[], bool]]]:
        """Yield the name of each step and what carries it out."""
        yield "no token sees the tokens after it", self._causal
        yield "all neurons are kept", self._keep_all
        yield "the neurons are put into another order", self._permute
        yield "layers run one by one", self._layer_by_layer
        yield "neurons without output are removed", self._remove_silent
        yield "the cut model is saved and loaded", self._reload

    @torch.no_grad()
    def _logits(self, model: PreTrainedModel, ids: Tensor | None = None) -> Tensor:
        logits: Tensor = model(input_ids=self._ids if ids is None else ids, use_cache=False).logits
        return logits.float()

    def _adapter(self) -> ModelAdapter:
        return ModelAdapter(copy.deepcopy(self._model), self._family)

    def _causal(self) -> bool:
        other = self._ids.clone()
        other[:, -1] = 3 + (other[:, -1] - 2) % (VOCABULARY - 6)
        changed = self._logits(self._model, other)
        return is_close(changed[:, :-1], self._before[:, :-1]) and not is_close(
            changed[:, -1], self._before[:, -1]
        )

    def _keep_all(self) -> bool:
        adapter = self._adapter()
        for layer, width in enumerate(adapter.widths):
            adapter.cut(layer, MlpCut(torch.arange(width), adapter.down_weight(layer).clone()))
        return is_close(self._logits(adapter.model), self._before)

    def _permute(self) -> bool:
        adapter = self._adapter()
        family = self._family
        generator = torch.Generator().manual_seed(1)
        for layer, width in enumerate(adapter.widths):
            order = torch.randperm(width, generator=generator)
            for projection in family.projections:
                module = adapter.module(layer, projection)
                blocks = torch.cat([order + width * block for block in range(projection.stacked)])
                weight = module.weight.data
                module.weight.data = weight.index_select(projection.neuron_axis, blocks)
                if module.bias is not None and projection is not family.output:
                    module.bias.data = module.bias.data[blocks]
        return is_close(self._logits(adapter.model), self._before)

    def _layer_by_layer(self) -> bool:
        batches = [Batch(ids[None], torch.ones(1, len(ids), dtype=torch.bool)) for ids in self._ids]
        forward = LayerwiseForward(ModelAdapter(self._model, self._family), batches)
        for _ in self._family.mlp_layers:
            forward.advance()
        logits = torch.cat([forward.logits(hidden) for hidden in forward.hidden])
        return is_close(logits.float(), self._before)

    def _remove_silent(self) -> bool:
        """Silence half of each layer's neurons in the copy, then cut them off it."""
        adapter = ModelAdapter(self._model, self._family)
        width = max(1, min(adapter.widths) // 2)
        generator = torch.Generator().manual_seed(2)
        cuts = []
        for layer, full in enumerate(adapter.widths):
            kept = torch.randperm(full, generator=generator)[:width].sort().values
            weight = adapter.down_weight(layer)
            silent = torch.ones(full, dtype=torch.bool)
            silent[kept] = False
            weight[:, silent] = 0.0
            cuts.append(MlpCut(kept, weight[:, kept].clone()))
        self._before, dense = self._logits(self._model), self._before
        for layer, cut in enumerate(cuts):
            adapter.cut(layer, cut)
        return is_close(self._logits(self._model), self._before) and not is_close(
            dense, self._before
        )

    def _reload(self) -> bool:
        """Save the cut copy, and load it by the stock class."""
        before = self._logits(self._model)
        with TemporaryDirectory() as folder, quiet_transformers():
            self._model.generation_config = GenerationConfig()
            self._model.save_pretrained(folder)
            loaded: Any = type(self._model).from_pretrained(Path(folder), local_files_only=True)
        widths = set(ModelAdapter(loaded, self._family).widths)
        if len(widths) != 1 or widths == set(self._family.widths(self._model.config)) - widths:
            raise FbnPruneError("the widths differ")
        return is_close(self._logits(loaded.eval()), before)


def is_close(one: Tensor, other: Tensor) -> bool:
    """Return whether logits are equal up to rounding; raise FbnPruneError if they are not finite."""
    if not bool(one.isfinite().all()):
        raise FbnPruneError("the logits are not finite")
    return bool((one - other).abs().max() <= _CLOSE * max(1e-3, float(other.abs().max())))
