"""Cut a model to some of its tokens: rows of the embedding and the head, and every token id in its configs.

Kept tokens are numbered in their old order. A kept row is copied as it is, so the logits of kept tokens do not change.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fbn_prune.data.pieces import Content
from fbn_prune.errors import InvalidInput
from fbn_prune.model.checkpoint import SLICE_BYTES, Checkpoint
from fbn_prune.model.shards import TensorInfo
from fbn_prune.model.streaming import skeleton

_ID_KEY = re.compile(r"\w*token_(id|ids|index)|(begin_)?suppress_tokens|(bad|force)_words_ids")
"""Config keys whose value is a token id, a list of them, or a list of such lists."""
_BY_NAME = ("lang_to_id", "task_to_id")
"""Config keys with a token id for each name."""


@dataclass(frozen=True, eq=False)
class VocabularyCut:
    """The tokens that a model keeps.

    Attributes
    ----------
    kept
        int64 [n]: the old ids of the kept tokens, ascending; the position is the new id.
    beyond
        Old ids of kept tokens for which the model has no row; they come after those with a row.
    total
        Number of tokens before: the rows of the embedding.
    tensors
        Names of the checkpoint's tensors that have one row for each token.
    tokenizer
        The content of the new `tokenizer.json`.
    """

    kept: Tensor
    beyond: tuple[int, ...]
    total: int
    tensors: frozenset[str]
    tokenizer: Content

    @property
    def ids(self) -> list[int]:
        """The old ids of all kept tokens; the position is the new id."""
        return [*self.kept.tolist(), *self.beyond]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the kept ids."""
        return hashlib.sha256(repr(self.ids).encode()).hexdigest()

    def shape(self, info: TensorInfo) -> tuple[int, ...]:
        """Return the shape of one of `tensors` after the cut."""
        return (len(self.kept), *info.shape[1:])

    def removed_parameters(self, checkpoint: Checkpoint) -> int:
        """Return the number of parameters that the cut removes."""
        return sum(self._removed(checkpoint.tensors[name]) for name in self.tensors)

    def removed_bytes(self, checkpoint: Checkpoint) -> int:
        """Return the number of bytes that the cut removes."""
        infos = [checkpoint.tensors[name] for name in self.tensors]
        return sum(self._removed(info) * info.dtype.itemsize for info in infos)

    def _removed(self, info: TensorInfo) -> int:
        return info.parameters // self.total * (self.total - len(self.kept))

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the `config.json` object with the new size of the vocabulary and the new ids."""
        return {**self.renumbered(config), "vocab_size": len(self.kept)}

    def renumbered(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return a config, generation config or tokenizer config with the new id of each token that it names.

        Ids outside the vocabulary, such as -1 for none, stay as they are.
        """
        new = {old: index for index, old in enumerate(self.ids)}
        changed = _with_ids(settings, lambda old: new.get(old, old))
        if isinstance(decoder := changed.get("added_tokens_decoder"), dict):
            changed["added_tokens_decoder"] = {
                str(new.get(int(old), int(old))): token for old, token in decoder.items()
            }
        return changed

    def rows(self, checkpoint: Checkpoint, name: str) -> Tensor:
        """Return the kept rows of one of `tensors`; the tensor is read in blocks of rows."""
        info = checkpoint.tensors[name]
        result = torch.empty(self.shape(info), dtype=info.dtype)
        block = max(1, SLICE_BYTES * self.total // max(info.nbytes, 1))
        for start in range(0, self.total, block):
            first, last = torch.searchsorted(self.kept, torch.tensor([start, start + block]))
            if first < last:
                # Mapped anew each time, so that the pages of the blocks before can be freed.
                stored = checkpoint.tensor(name)[start : start + block]
                result[first:last] = stored[self.kept[first:last] - start]
        return result


def named_ids(settings: Mapping[str, Any], vocabulary: int) -> set[int]:
    """Return all token ids that a config names and that are in the vocabulary."""
    found: set[int] = set()

    def note(old: int) -> int:
        found.add(old)
        return old

    _with_ids(settings, note)
    return {old for old in found if 0 <= old < vocabulary}


def vocabulary_tensors(checkpoint: Checkpoint) -> frozenset[str]:
    """Return the names of the checkpoint's tensors that have one row for each token.

    Raises
    ------
    InvalidInput
        One of them has another number of rows than the config says.
    """
    model = skeleton(checkpoint, checkpoint.storage_dtype)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    names = set()
    for path, module in model.named_modules():
        if any(module is end for end in ends):
            for part in ("weight", "bias"):
                stored = checkpoint.stored_name(f"{path}.{part}")
                names |= set() if stored is None else {stored}
    total = checkpoint.family.vocab_size(checkpoint.config)
    for name in names:
        if checkpoint.shape(name)[0] != total:
            raise InvalidInput(
                f"{checkpoint.path}: {name} has {checkpoint.shape(name)[0]} rows, but config.json says {total} tokens"
            )
    return frozenset(names)


def _with_ids(settings: Mapping[str, Any], change: Callable[[int], int]) -> dict[str, Any]:
    """Return a config with all token ids changed, in its nested configs too."""
    return {key: _with_id(key, value, change) for key, value in settings.items()}


def _with_id(key: str, value: Any, change: Callable[[int], int]) -> Any:
    if _ID_KEY.fullmatch(key):
        return _each(value, change)
    if key in _BY_NAME and isinstance(value, Mapping):
        return {name: _each(old, change) for name, old in value.items()}
    if key == "forced_decoder_ids" and isinstance(value, list):  # (position, id) each
        return [[place, _each(old, change)] for place, old in value]
    if key == "sequence_bias" and isinstance(value, list):  # (ids, bias) each
        return [[_each(ids, change), bias] for ids, bias in value]
    if isinstance(value, Mapping) and key != "added_tokens_decoder":
        return _with_ids(value, change)
    return value


def _each(value: Any, change: Callable[[int], int]) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return change(value)
    if isinstance(value, list):
        return [_each(one, change) for one in value]
    if isinstance(value, Mapping):
        return {key: _each(one, change) for key, one in value.items()}
    return value
