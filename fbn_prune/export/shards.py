"""Write safetensors shards and their index, with one tensor in memory at a time.

This allows checkpoints larger than RAM. The safetensors layout (header length, JSON header, data) is written here,
because the library's writer needs all tensors of a file at once. Finished shards can be kept in a
:class:`fbn_prune.store.Store`, so that a resumed run does not write them again.
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
from fbn_prune.model.headers import INDEX_FILE
from fbn_prune.model.shards import DTYPES, TensorInfo
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
    """Write tensors as safetensors shards with an index.

    A single file gets an index too: without one, vLLM reads every safetensors file of a folder as weights.

    Parameters
    ----------
    plan
        The shapes and dtypes of the tensors by name, in the order of the shards.
    produce
        Returns a tensor by name, on the CPU; called once for each tensor, shard by shard.
    directory
        An existing folder.
    max_shard_size
        Largest shard, in bytes or as "2GB"; a larger tensor gets a shard of its own.
    progress
        Called with the number of bytes written, or found in kept shards, since the last call.
    store
        Holds finished shards, including those of an earlier run, until all are finished.

    Raises
    ------
    InvalidInput
        `max_shard_size` is not a size.
    FbnPruneError
        A tensor differs from the plan, or the store cannot be written.
    OSError
        The directory cannot be written.
    """
    try:
        split = split_state_dict_into_shards_factory(
            dict(plan),
            get_storage_size=lambda info: info.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise InvalidInput(
            f"max_shard_size {max_shard_size!r} is not a size, write 5GB or 500MB: {error}"
        ) from error
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
        store.keep_only(SHARDS, kept)  # an earlier run may have used another shard size
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
    """Write a JSON object as transformers does, indented and with sorted keys."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class _Shard:
    """One safetensors file, with wide dtypes first for alignment."""

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
        """Write the whole file, one tensor at a time."""
        put(self.head)
        for name in self._order:
            tensor, info = self._produce(name), self._tensors[name]
            if tuple(tensor.shape) != info.shape or tensor.dtype != info.dtype:
                raise FbnPruneError(
                    f"{name} is {tensor.dtype} {list(tensor.shape)} instead of "
                    f"{info.dtype} {list(info.shape)}"
                )
            put(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            self.progress(info.nbytes)
