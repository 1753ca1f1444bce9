"""Write a quantised checkpoint as a plain one, streamed tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from fbn_prune.export.card import source_license
from fbn_prune.export.directory import disk_errors
from fbn_prune.export.shards import write_json, write_shards
from fbn_prune.export.writer import copy_companions, copy_own_code, verify_export
from fbn_prune.model.quantized import QuantizedCheckpoint
from fbn_prune.model.stock_names import with_stock_names


def write_dequantized(
    source: QuantizedCheckpoint,
    directory: Path,
    *,
    max_shard_size: int | str = "5GB",
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write the dequantised weights with config, tokenizer, licence and a card, and check that they load.

    Parameters
    ----------
    source
        The quantised checkpoint.
    directory
        An existing folder, normally from :func:`fbn_prune.export.directory.atomic_directory`.
    max_shard_size
        Largest shard, in bytes or as "2GB"; a larger tensor gets a shard of its own.
    progress
        Called with the number of bytes written since the last call.

    Raises
    ------
    FbnPruneError
        A weight is not finite or does not fit its dtype, the disk cannot be written, or the result does not load.
    """
    with disk_errors(directory):
        write_shards(
            source.tensors,
            source.tensor,
            directory,
            max_shard_size=max_shard_size,
            progress=progress,
        )
        write_json(directory / "config.json", with_stock_names(source.config))
        copy_companions(source, directory)
        copy_own_code(source.family, source.config, directory)
        (directory / "README.md").write_text(_card(source), encoding="utf-8")
    verify_export(directory)


def _card(source: QuantizedCheckpoint) -> str:
    """Return a card with the source's licence keys, from which later cards copy them, and its name."""
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

Made from `{name}`, which was quantized by {source.method}: {len(source.stored):,} weights were computed from its
stored integers and scales, and rounded to {dtype}. This does not restore the precision lost by quantizing.
"""
