"""The plain checkpoint that a quantised one stands for, streamed from it tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from fbn_prune.export.card import source_license
from fbn_prune.export.directory import disk_errors
from fbn_prune.export.shards import write_json, write_shards
from fbn_prune.export.writer import copy_companions, verify_export
from fbn_prune.model.quantized import QuantizedCheckpoint


def write_dequantized(
    source: QuantizedCheckpoint,
    directory: Path,
    *,
    max_shard_size: int | str = "5GB",
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write the plain weights with config, generation config, tokenizer, licence and a card, and check that they load.

    Parameters
    ----------
    directory : an existing folder, normally from `atomic_directory`.
    max_shard_size : largest shard, in bytes or as "2GB"; a larger single tensor gets its own.
    progress : called with the number of bytes written since the last call.

    Raises
    ------
    FbnPruneError
        A weight is not finite or does not fit its type, the disk cannot be written, or the result does not load.
    """
    with disk_errors(directory):
        write_shards(
            source.tensors,
            source.tensor,
            directory,
            max_shard_size=max_shard_size,
            progress=progress,
        )
        write_json(directory / "config.json", source.config)
        copy_companions(source, directory)
        (directory / "README.md").write_text(_card(source), encoding="utf-8")
    verify_export(directory)


def _card(source: QuantizedCheckpoint) -> str:
    """The source's licence keys, which later cards take from here, and where the weights come from."""
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **source_license(source.path / "README.md"),
    }
    if source.hub_id is not None:
        metadata["base_model"] = source.hub_id
    name = source.hub_id or source.path.resolve().name
    front = yaml.safe_dump(metadata, sort_keys=True, allow_unicode=True)
    dtype = str(source.storage_dtype).removeprefix("torch.")
    return f"""---
{front}---

# {name.rpartition("/")[2]}, dequantized

Made from `{name}`, which was quantized by {source.method}: {len(source.stored):,} weights were computed from the
numbers and scales that it stores, and rounded to {dtype}. What quantizing lost is not brought back.
"""
