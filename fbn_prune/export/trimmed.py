"""Write a checkpoint with a smaller vocabulary and the same layers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from fbn_prune.data.examples import RECORD_NAME
from fbn_prune.export.card import source_license
from fbn_prune.export.directory import disk_errors
from fbn_prune.export.writer import verify_export, write_checkpoint
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.kept_neurons import KEPT_FILE
from fbn_prune.model.vocabulary import VocabularyCut
from fbn_prune.store import Store

_STILL_TRUE = (RECORD_NAME, KEPT_FILE, "networks.safetensors")
"""Files of a pruned checkpoint that say the same of it whatever its vocabulary is."""


def write_trimmed(
    source: Checkpoint,
    vocabulary: VocabularyCut,
    directory: Path,
    *,
    max_shard_size: int | str = "5GB",
    progress: Callable[[int], None] | None = None,
    store: Store | None = None,
) -> None:
    """Write the checkpoint with the kept tokens, and check that it loads.

    Parameters
    ----------
    source
        The checkpoint, pruned or not.
    vocabulary
        The tokens that are kept.
    directory
        An existing folder, normally from :func:`fbn_prune.export.directory.atomic_directory`.
    max_shard_size, progress, store
        See :func:`fbn_prune.export.writer.write_checkpoint`.

    Raises
    ------
    FbnPruneError
        The disk cannot be written, or the result does not load.
    """
    write_checkpoint(
        source,
        (),
        directory,
        vocabulary=vocabulary,
        max_shard_size=max_shard_size,
        progress=progress,
        store=store,
    )
    with disk_errors(directory):
        for name in _STILL_TRUE:
            if (source.folder / name).is_file():
                shutil.copyfile(source.folder / name, directory / name)
        (directory / "README.md").write_text(_card(source, vocabulary), encoding="utf-8")
    verify_export(directory)


def _card(source: Checkpoint, vocabulary: VocabularyCut) -> str:
    """Return a card with the source's licence keys, its name, and what has changed."""
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **source_license(source.folder / "README.md"),
    }
    if source.hub_id is not None:
        metadata["base_model"] = source.hub_id
    name = (source.hub_id or source.path.resolve().name).rpartition("/")[2]
    front = yaml.safe_dump(metadata, sort_keys=True, allow_unicode=True)
    removed = f"{vocabulary.total - len(vocabulary.kept):,} of its {vocabulary.total:,} tokens"
    return f"""---
{front}---

# {name}, with fewer tokens

Made from `{name}` by removing {removed}; the layers are the same. A text whose tokens were all kept gets the same
pieces, under new ids, and the logits of kept tokens are the same. Other text is spelled by smaller pieces.
"""
