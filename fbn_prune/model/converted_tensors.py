"""Read a checkpoint whose tensors transformers converts on loading, one parameter at a time.

Mixtures store each expert apiece or all of them fused, in either orientation. transformers' own tables say which
stored tensors make a parameter and how; the same tables are used here, on a few experts at a time where a table only
puts experts beside one another, so that memory holds hardly more than the parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from fbn_prune.errors import InvalidInput
from fbn_prune.model import remedies
from fbn_prune.model.checkpoint import SLICE_BYTES, Checkpoint


class ConvertedTensors:
    """The parameters and stored buffers of a model, as transformers makes them from a checkpoint.

    Parameters
    ----------
    checkpoint
        The checkpoint.
    model
        Its skeleton on the meta device. It is told which conversions the checkpoint uses, as on loading, so that
        transformers can name the tensors as this checkpoint does.

    Raises
    ------
    InvalidInput
        A tensor of the model is missing from the checkpoint, or has another shape there.
    """

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
        self._checkpoint, self._model = checkpoint, model
        own = model.state_dict()
        tables = get_model_conversion_mapping(model)
        renamings = [table for table in tables if isinstance(table, WeightRenaming)]
        converters = [table for table in tables if isinstance(table, WeightConverter)]
        by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
        self._converters: dict[str, WeightConverter] = {}
        self._sources: dict[str, dict[str, list[str]]] = {}
        prefix = model.base_model_prefix
        for name in sorted(checkpoint.tensors, key=dot_natural_key):
            made, pattern = rename_source_key(name, renamings, converters, prefix, own)
            if made not in own and name in own:
                made, pattern = name, None
            if made not in own:
                continue  # not used by the model
            if pattern is not None:
                self._converters[made] = by_pattern[pattern]
            self._sources.setdefault(made, {}).setdefault(pattern or name, []).append(name)
        used: Any = [table for table in tables if table.was_used()]
        model._weight_conversions = used
        self._of: dict[str, str] = {}
        for first in self._sources:
            for name, value in self._made(first, self._without_values).items():
                self._of[name] = first
                self._check(name, value, own)

    def __contains__(self, name: str) -> bool:
        return name in self._of

    def names(self, prefixes: tuple[str, ...]) -> list[str]:
        """Return the names in the model that begin with one of these, in the order of the checkpoint."""
        return [name for name in self._of if name.startswith(prefixes)]

    def read(self, names: list[str], device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """Yield parameters and buffers by name, on a device, in the dtypes of the skeleton."""
        own = self._model.state_dict()
        for first in dict.fromkeys(self._of[name] for name in names):
            dtype = own[first].dtype

            def source(name: str, dtype: torch.dtype = dtype) -> Tensor:
                return self._checkpoint.read(name, device, dtype)

            if self._apiece(first):
                made = {first: self._stacked(first, own[first], source, device)}
            else:
                made = self._made(first, source)
            yield from ((name, value) for name, value in made.items() if name in names)

    def _stacked(
        self,
        first: str,
        like: Tensor,
        source: Callable[[str], Tensor],
        device: torch.device,
    ) -> Tensor:
        """Convert a few experts at a time into the tensor of all."""
        whole = torch.empty(like.shape, dtype=like.dtype, device=device)
        count = len(whole)
        each = whole[0].numel() * whole.element_size()
        step = max(1, min(count, SLICE_BYTES // max(1, each)))
        for start in range(0, count, step):
            part = slice(start, min(start + step, count))
            whole[part] = self._made(first, source, part)[first]
        return whole

    def _apiece(self, first: str) -> bool:
        """Whether a parameter is experts that are stored apiece, one after another."""
        if first not in self._converters:
            return False
        counts = {len(names) for names in self._sources[first].values()}
        shape = self._model.state_dict()[first].shape
        if counts == {1} or counts != {*shape[:1]}:
            return False
        some = self._made(first, self._without_values, slice(0, 1))
        return {n: v.shape for n, v in some.items()} == {first: (1, *shape[1:])}

    def _without_values(self, name: str) -> Tensor:
        info = self._checkpoint.tensors[name]
        return torch.empty(info.shape, dtype=info.dtype, device="meta")

    def _made(
        self, first: str, source: Callable[[str], Tensor], part: slice = slice(None)
    ) -> dict[str, Tensor]:
        """Return what transformers makes of the sources of a parameter, or of a part of each list of them."""
        patterns = self._sources[first]
        if first not in self._converters:
            ((name,),) = patterns.values()
            return {first: source(name)}
        converter = deepcopy(self._converters[first])
        for pattern, names in patterns.items():
            for name in names[part]:
                converter.add_tensor(first, name, pattern, cast(Any, source(name)))
        made = converter.convert(first, model=self._model, config=self._model.config)
        return {n: value[0] if isinstance(value, list) else value for n, value in made.items()}

    def _check(self, name: str, value: Tensor, own: dict[str, Tensor]) -> None:
        path, expected = self._checkpoint.path, own.get(name)
        if expected is None or value.shape != expected.shape:
            needs = "does not have it" if expected is None else f"needs {list(expected.shape)}"
            raise InvalidInput(
                f"{path}: {name} has shape {list(value.shape)}, the model {needs}; take config.json and the weights "
                "from one model"
            )

    def require(self, names: list[str]) -> None:
        """Refuse a checkpoint that lacks one of these parameters.

        Raises
        ------
        InvalidInput
            It does.
        """
        for name in names:
            if name not in self._of:
                raise InvalidInput(
                    f"{self._checkpoint.path}: the model's {name} is not in the checkpoint"
                    f"{remedies.missing_tensor(self._checkpoint.tensors)}"
                )
