"""Opening a run, which every command begins with: the recipe checked, its texts tokenized, its model loaded.

A run that writes an output has a store beside it, in a folder named by a fingerprint of all that decides the bytes of
the result: the same command finds what an earlier, unfinished run of it has left.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from fbn_prune.data.calibration import CalibrationData, calibration_data
from fbn_prune.data.given import GivenData
from fbn_prune.distributed import is_first
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.networks.task_matching import TaskCalibration, task_calibration
from fbn_prune.progress import StageClock
from fbn_prune.runs.result import tool_version
from fbn_prune.runs.setup import Prepared
from fbn_prune.store import Store, default_place, fingerprint, store_in

PLACES = frozenset({"output", "overwrite", "work_dir", "max_shard_size", "memory_budget"})
"""Recipe keys that say where and how to write, and not what."""


@dataclass(frozen=True)
class OpenRun:
    """A prepared run with its text and its model, and the clock that times its stages.

    Attributes
    ----------
    data
        The calibrating and the held-out blocks, without those that hold a test question of the task.
    task
        The task's own blocks; None without a task.
    dense
        A second copy of the model for a recovery to aim at; None where it is loaded when it is needed.
    """

    prepared: Prepared
    tokenizer: Any
    data: CalibrationData
    task: TaskCalibration | None
    adapter: ModelAdapter
    clock: StageClock
    dense: ModelAdapter | None = None

    @property
    def texts(self) -> str:
        """Fingerprints of all text that is read: for calibration, held out, and the task's examples and test."""
        blocks = [self.data.calibrating, self.data.held_out]
        if self.task is not None:
            blocks += [self.task.examples]
            blocks += [] if self.task.test is None else [self.task.test]
        return " ".join(each.fingerprint for each in blocks)


def open_run(prepared: Prepared, clock: StageClock, *, whole: bool = False) -> OpenRun:
    """Read a prepared run's texts and load its model.

    Parameters
    ----------
    whole
        Have the whole model in memory, whatever the memory plan says.

    Raises
    ------
    InvalidInput
        A text cannot be read or is too short, see :func:`fbn_prune.data.calibration.calibration_data`.
    """
    tokenizer = prepared.checkpoint.load_tokenizer()
    with clock.stage("calibration"):
        data, task = read_texts(prepared, tokenizer)
    with clock.stage("load"):
        adapter = prepared.load_whole_model() if whole else prepared.load_model()
    return OpenRun(prepared, tokenizer, data, task, adapter, clock)


def read_texts(
    prepared: Prepared, tokenizer: Any, sources: Sequence[str | GivenData] | None = None
) -> tuple[CalibrationData, TaskCalibration | None]:
    """Read the calibrating and held-out blocks of a prepared run, and its task's blocks, or None without a task.

    Parameters
    ----------
    sources
        In the place of those that the recipe names.
    """
    recipe = prepared.recipe
    vocabulary = prepared.family.vocab_size(prepared.checkpoint.config)
    data = calibration_data(
        recipe.calibration if sources is None else sources,
        tokenizer,
        tokens=recipe.tokens,
        context=prepared.context,
        held_out=recipe.held_out,
        seed=recipe.seed,
        vocabulary=vocabulary,
    )
    if prepared.task is None:
        return data, None
    task = task_calibration(
        prepared.task, data, tokenizer, context=prepared.context, vocabulary=vocabulary
    )
    return task.data, task


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
