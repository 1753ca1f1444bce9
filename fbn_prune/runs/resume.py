"""Which unfinished work belongs to a run: a fingerprint of everything that decides the bytes of its result."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from fbn_prune.distributed import is_first
from fbn_prune.runs.result import tool_version
from fbn_prune.runs.setup import Prepared
from fbn_prune.store import Store, default_place, fingerprint, store_in

PLACES = frozenset({"output", "overwrite", "work_dir", "max_shard_size", "memory_budget"})
"""Recipe keys that say where and how to write, and not what."""


@contextmanager
def store_of(prepared: Prepared) -> Iterator[Store]:
    """The store of a prepared run, in its work directory; a run without an output keeps nothing.

    Of several processes on one job the first keeps it; what it reads goes to the others.

    Raises
    ------
    InvalidInput
        The same run is at work there.
    FbnPruneError
        The work directory cannot be written to.
    """
    recipe = prepared.recipe
    if recipe.output is None or not is_first():
        yield Store()
        return
    place = default_place(recipe.output) if recipe.work_dir is None else recipe.work_dir
    about = {"model": recipe.model, "output": str(recipe.output.expanduser().resolve())}
    named = recipe.work_dir is not None
    with store_in(
        place.expanduser(), fingerprint(facts(prepared)), about, keep_place=named
    ) as store:
        yield store


def facts(prepared: Prepared) -> dict[str, Any]:
    """All that decides a run's bytes beside its calibration text, as JSON."""
    recipe = prepared.recipe
    device = str(prepared.device)
    if prepared.device.type == "cuda":
        used: list[torch.device | int] = [prepared.device, *(prepared.memory.placement or ())]
        device = ", ".join(sorted({torch.cuda.get_device_name(one) for one in used}))
    return {
        "versions": [tool_version(), torch.__version__, transformers.__version__],
        "machine": [platform.machine(), device, torch.get_num_threads()],
        "computed": [str(prepared.dtype), prepared.context, prepared.width_multiple],
        "memory": [prepared.memory.streamed, prepared.memory.batch_tokens],
        "recipe": recipe.model_dump(mode="json", exclude=set(PLACES)),
        "checkpoint": _checkpoint(prepared),
        "networks": None if recipe.networks_from is None else _digest(recipe.networks_from),
    }


def _checkpoint(prepared: Prepared) -> list[Any]:
    """Headers, and what changes when a file's data do: sizes and times."""
    checkpoint = prepared.checkpoint
    files = sorted({info.file for info in checkpoint.tensors.values()})
    stats = [(file, (checkpoint.path / file).stat()) for file in files]
    return [
        checkpoint.config,
        [
            [name, info.file, info.shape, str(info.dtype)]
            for name, info in checkpoint.tensors.items()
        ],
        [[file, stat.st_size, stat.st_mtime_ns] for file, stat in stats],
    ]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
