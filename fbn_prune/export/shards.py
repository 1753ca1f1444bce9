"""Safetensors shards and their index from a plan of tensors, each tensor made, written and let go before the next.

So the memory needed is one tensor's, and a checkpoint larger than RAM can be written. That is why the safetensors
layout (header length, JSON header, data) is written here: the library's writer takes a whole file's tensors at once.
A finished shard can be kept in a :class:`fbn_prune.store.Store`, and stays as it is when the writing starts again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from fbn_prune.errors import FbnPruneError, InvalidInput
from fbn_prune.model.shards import DTYPES, INDEX_FILE, TensorInfo
from fbn_prune.store import SHARDS, Put, Store

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8


def write_shards(
    plan: Mapping[str, TensorInfo],
    produce: Callable[[str], Tensor],
    directory: Path,
    *,
    max_shard_size: int | str = "5GB",
    progress: Callable[[int], None] | None = None,
    store: Store | None = None,
) -> None:
    """Write tensors as safetensors with an index.

    The index is there for a single file too: without one, vLLM reads every safetensors file of a folder as weights.

    Parameters
    ----------
    plan : the tensors' names, shapes and dtypes, in the order in which shards take them.
    produce : gives a tensor by its name, on the CPU; called once for each, shard by shard.
    directory : an existing folder.
    max_shard_size : largest shard, in bytes or as "2GB"; a larger single tensor gets its own.
    progress : called with the number of bytes done since the last call, in kept shards too.
    store : where shards finished by an earlier run come from, and finished shards go until all are.

    Raises
    ------
    InvalidInput
        `max_shard_size` is not a size.
    FbnPruneError
        A tensor is not as planned, or the store cannot be written to.
    OSError
        The directory cannot be written to.
    """
    try:
        split = split_state_dict_into_shards_factory(
            dict(plan),
            get_storage_size=lambda info: info.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise InvalidInput(f"max_shard_size {max_shard_size!r} is not a size: {error}") from error
    shards = {
        file: _Shard({name: plan[name] for name in names}, produce, progress or (lambda done: None))
        for file, names in split.filename_to_tensors.items()
    }
    if store is None:
        for file, shard in shards.items():
            with (directory / file).open("wb") as handle:
                shard.write(handle.write)
    else:
        kept = {f"{SHARDS}{file}": shard for file, shard in shards.items()}
        store.keep_only(SHARDS, kept)  # an earlier run may have had another shard size
        for name, shard in kept.items():
            if store.holds(name, shard.head, len(shard.head) + shard.nbytes):
                shard.progress(shard.nbytes)
            else:
                store.write(name, shard.write)
        for name in kept:
            store.put(name, directory / name.removeprefix(SHARDS))
    index = {
        "metadata": {
            "total_parameters": sum(info.parameters for info in plan.values()),
            "total_size": sum(info.nbytes for info in plan.values()),
        },
        "weight_map": {
            name: file for file, names in split.filename_to_tensors.items() for name in names
        },
    }
    write_json(directory / INDEX_FILE, index)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object as transformers does: indented, keys sorted."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class _Shard:
    """One safetensors file; wide dtypes first, so that each is aligned."""

    def __init__(
        self,
        tensors: Mapping[str, TensorInfo],
        produce: Callable[[str], Tensor],
        progress: Callable[[int], None],
    ) -> None:
        self._tensors, self._produce, self.progress = tensors, produce, progress
        self._order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self.nbytes = 0
        for name in self._order:
            info = tensors[name]
            header[name] = {
                "dtype": _DTYPE_NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [self.nbytes, self.nbytes + info.nbytes],
            }
            self.nbytes += info.nbytes
        encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        encoded += b" " * (-len(encoded) % _ALIGNMENT)
        self.head = len(encoded).to_bytes(8, "little") + encoded

    def write(self, put: Put) -> None:
        """Put the whole file, a tensor at a time."""
        put(self.head)
        for name in self._order:
            tensor, info = self._produce(name), self._tensors[name]
            if tuple(tensor.shape) != info.shape or tensor.dtype != info.dtype:
                raise FbnPruneError(
                    f"{name} became {tensor.dtype} {list(tensor.shape)} instead of "
                    f"{info.dtype} {list(info.shape)}"
                )
            put(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            self.progress(info.nbytes)
