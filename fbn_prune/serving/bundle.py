"""Write and read bundles: folders with one unpruned checkpoint and the tasks that it serves.

config.json, model.safetensors, ...     the unpruned model, which every loader opens; absent if linked
bundle.json                             the place of the model, the tasks in order, the size of each
tasks/NAME/kept_neurons.safetensors     the kept neurons, one bit for each neuron
tasks/NAME/down.safetensors             the task's own output weights, if it has any
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fbn_prune.data.text_files import require_readable
from fbn_prune.errors import InvalidInput
from fbn_prune.export.directory import atomic_directory, disk_errors
from fbn_prune.export.shards import write_shards
from fbn_prune.export.writer import copy_companions, copy_own_code, write_json
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.headers import INDEX_FILE, one_line, read_object
from fbn_prune.model.kept_neurons import KEPT_FILE, KeptNeurons
from fbn_prune.model.shards import save_tensors
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.serving.attachment import Served, attach
from fbn_prune.serving.tasks import (
    FullDown,
    LowRankDown,
    OwnDown,
    Refit,
    TaskSet,
    task_of_pruned,
)

BUNDLE_FILE = "bundle.json"
DOWN_FILE = "down.safetensors"

_FORMAT_VERSION = 1
_NAME = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True)
class TaskSource:
    """The source of a task.

    Attributes
    ----------
    name
        The name of the task.
    path
        A pruned checkpoint, a file of kept neurons, or a file of functional networks.
    networks
        The networks whose members are kept; empty for the other two sources.
    """

    name: str
    path: Path
    networks: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str) -> TaskSource:
        """Parse `name=folder`, `name=kept_neurons.safetensors` or `name=networks.safetensors:2,5,21`.

        Raises
        ------
        InvalidInput
            The text has another form, or the name holds other characters than letters, digits, `.`, `_` and `-`.
        """
        name, equals, rest = text.partition("=")
        if not equals or not rest or not _NAME.fullmatch(name):
            raise InvalidInput(
                f"{text!r}: write NAME=PATH; the name may have letters, digits, . _ and -"
            )
        listed = re.fullmatch(r"(.+\.safetensors):(\d+(?:,\d+)*)", rest)
        if listed is None:
            return cls(name, Path(rest).expanduser())
        numbers = tuple(int(one) for one in listed[2].split(","))
        return cls(name, Path(listed[1]).expanduser(), numbers)


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk: the checkpoint, and the tasks by name, in order."""

    base: Checkpoint
    tasks: dict[str, TaskSet]

    @classmethod
    def open(cls, folder: Path) -> Bundle:
        """Read a bundle's tasks and check its model, without loading the weights.

        Raises
        ------
        InvalidInput
            The folder is not a bundle, or a file is missing, damaged or of another version.
        """
        if not (folder / BUNDLE_FILE).is_file():
            raise InvalidInput(
                f"{folder} is not a bundle: it has no {BUNDLE_FILE}; `fbn-prune bundle` makes one"
            )
        content = read_object(folder / BUNDLE_FILE)
        if content.get("format") != _FORMAT_VERSION:
            raise InvalidInput(
                f"{folder / BUNDLE_FILE}: format {content.get('format')!r}, "
                f"this version reads {_FORMAT_VERSION}: make the bundle again"
            )
        names, base = content.get("order"), content.get("base")
        if not isinstance(names, list) or not names or not (base is None or isinstance(base, str)):
            raise InvalidInput(
                f"{folder / BUNDLE_FILE}: lacks its tasks or its model: make the bundle again"
            )
        for name in names:
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise InvalidInput(
                    f"{folder / BUNDLE_FILE}: {name!r} is not a valid task name: make the bundle again"
                )
        checkpoint = Checkpoint.open(folder if base is None else base)
        tasks = {name: _read_task(folder / "tasks" / name) for name in names}
        return cls(checkpoint, tasks)

    def serve(self, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Served:
        """Load the model and attach the tasks.

        Parameters
        ----------
        dtype
            None for the dtype in which the checkpoint is stored.
        """
        model = self.base.load_model(device, dtype or self.base.storage_dtype)
        model.config.use_cache = True
        return attach(model, self.tasks)


def write_bundle(
    base: Checkpoint,
    sources: Sequence[TaskSource],
    output: Path,
    *,
    refit: Refit = "full",
    rank: int = 16,
    link: bool = False,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Write a bundle. If writing fails, nothing is left.

    Parameters
    ----------
    base
        The unpruned checkpoint.
    sources
        The tasks, the most used first.
    output
        The folder to write.
    refit, rank
        How much of a pruned checkpoint's output weights is kept; see :func:`task_of_pruned`.
    link
        Store the place of the model instead of a copy.
    overwrite
        Replace an existing output.
    progress
        Called with the number of bytes read since the last call.

    Returns
    -------
    dict
        The content of `bundle.json`, with `output` and `base_bytes`.

    Raises
    ------
    InvalidInput
        Two tasks have the same name, or a task does not belong to the model.
    FbnPruneError
        The output cannot be written.
    """
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise InvalidInput(f"two tasks have the same name: {', '.join(names)}")
    tasks = {one.name: _task_of(base, one, refit, rank, progress) for one in sources}
    linked = base.hub_id or str(base.path.resolve())
    with atomic_directory(output, overwrite) as folder, disk_errors(output):
        if not link:
            _copy_checkpoint(base, folder)
        for name, task in tasks.items():
            _write_task(task, folder / "tasks" / name)
        content = {
            "base": linked if link else None,
            "format": _FORMAT_VERSION,
            "order": list(tasks),
            "tasks": {name: _facts(base, task) for name, task in tasks.items()},
        }
        write_json(folder / BUNDLE_FILE, content)
    return {**content, "output": str(output), "base_bytes": base.total_bytes}


def _facts(base: Checkpoint, task: TaskSet) -> dict[str, Any]:
    return {
        "neurons_kept": task.neurons.count,
        "neurons_total": sum(task.neurons.widths),
        "set_bytes": task.neurons.nbytes,
        "correction_bytes": task.correction_parameters * base.storage_dtype.itemsize,
    }


def _task_of(
    base: Checkpoint,
    source: TaskSource,
    refit: Refit,
    rank: int,
    progress: Callable[[int], None] | None,
) -> TaskSet:
    if source.networks:
        networks = FunctionalNetworks.load(source.path)
        task = TaskSet.from_networks(networks, source.networks)
    elif source.path.is_file():
        task = TaskSet.plain(KeptNeurons.load(source.path))
    else:
        pruned = Checkpoint.open(source.path)
        return task_of_pruned(base, pruned, refit, rank, progress)
    widths = base.family.widths(base.config)
    if list(task.neurons.widths) != widths:
        raise InvalidInput(
            f"{source.path} is for layers of {list(task.neurons.widths)} neurons, "
            f"{base.path} has {widths}: give tasks of this model"
        )
    return task


def _copy_checkpoint(base: Checkpoint, folder: Path) -> None:
    if base.gguf is not None:
        write_shards(base.tensors, base.tensor, folder)
        write_json(folder / "config.json", base.config)
        copy_companions(base, folder)
        return
    weights = {info.file for info in base.tensors.values()}
    index = [INDEX_FILE] if (base.path / INDEX_FILE).is_file() else []
    for file in sorted({"config.json", *weights, *index}):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base.path / file, folder / file)
    # By its own config, other loaders would refuse the model, or drop its head.
    if base.repairs or base.own_head is not None:
        write_json(folder / "config.json", base.config)
    copy_companions(base, folder)
    copy_own_code(base.family, base.config, folder)


def _write_task(task: TaskSet, folder: Path) -> None:
    folder.mkdir(parents=True)
    task.neurons.save(folder / KEPT_FILE)
    tensors: dict[str, Tensor] = {}
    for layer, (down, bias) in enumerate(zip(task.own_down, task.own_bias, strict=True)):
        if isinstance(down, FullDown):
            tensors[f"layers.{layer}.down"] = down.weight.contiguous()
        elif down is not None:
            tensors[f"layers.{layer}.left"] = down.left.contiguous()
            tensors[f"layers.{layer}.right"] = down.right.contiguous()
        if bias is not None:
            tensors[f"layers.{layer}.bias"] = bias.contiguous()
    if tensors:
        save_tensors(tensors, folder / DOWN_FILE)


def _read_task(folder: Path) -> TaskSet:
    neurons = KeptNeurons.load(folder / KEPT_FILE)
    file = folder / DOWN_FILE
    if not file.is_file():
        return TaskSet.plain(neurons)
    require_readable(file)
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise InvalidInput(f"{file}: damaged ({one_line(error)}): make the bundle again") from error
    layers = range(len(neurons.widths))
    own_down = tuple(_read_down(file, tensors, layer, len(neurons.kept[layer])) for layer in layers)
    own_bias = tuple(tensors.get(f"layers.{layer}.bias") for layer in layers)
    return TaskSet(neurons, own_down, own_bias)


def _read_down(file: Path, tensors: dict[str, Tensor], layer: int, kept: int) -> OwnDown | None:
    full, left, right = (
        tensors.get(f"layers.{layer}.{part}") for part in ("down", "left", "right")
    )
    for one in (full, right):
        if one is not None and (one.ndim != 2 or one.shape[1] != kept):
            raise InvalidInput(
                f"{file}: layer {layer} has weights {list(one.shape)} for {kept} kept neurons: make the bundle again"
            )
    if full is not None:
        return FullDown(full)
    if left is None or right is None:
        return None
    if left.ndim != 2 or left.shape[1] != right.shape[0]:
        raise InvalidInput(
            f"{file}: layer {layer}: shapes {list(left.shape)} and {list(right.shape)} do not multiply: "
            "make the bundle again"
        )
    return LowRankDown(left, right)
