"""Refuse what can be refused without torch and transformers, so that a wrong path is told at once.

The API calls these checks before it imports the modules that do the work. They read file names, JSON and the headers
of safetensors; :func:`fbn_prune.runs.setup.prepare` calls the same functions, and checks the rest.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from fbn_prune.data.text_files import GENERATED, require_source
from fbn_prune.errors import InvalidInput
from fbn_prune.export.directory import check_output, check_room, on_one_disk
from fbn_prune.model.families import refuse_obstacles
from fbn_prune.model.folder import local_folder, read_config
from fbn_prune.model.gguf_parts import find_gguf
from fbn_prune.model.headers import read_stored
from fbn_prune.recipe import Recipe
from fbn_prune.runs.second_run import refuse_second_run
from fbn_prune.runs.unfinished import shard_bytes
from fbn_prune.store import default_place

TASK_SUFFIXES = (".jsonl", ".txt", ".yaml", ".yml")
"""Suffixes of names of tasks that are files; all other names are those of the harness."""


def check_recipe(recipe: Recipe, *, mixtures: bool = False) -> None:
    """Check the files and folders that a recipe names.

    Parameters
    ----------
    recipe
        The recipe.
    mixtures
        Whether the command works on mixtures of experts.

    Raises
    ------
    InvalidInput
        The model, its config or its weights, a calibration source, a file of the task or the output cannot be used.
    """
    folder, total_bytes = None, 0
    if recipe.model != "builtin":
        folder = _local(recipe.model)
    if folder is not None:
        refuse_obstacles(read_config(folder), mixtures=mixtures)
        total_bytes = sum(tensor.nbytes for tensor in read_stored(folder).values())
    for source in (*recipe.calibration, *recipe.vocabulary_texts, *recipe.recover_text):
        if source != GENERATED:
            require_source(source)
    task = recipe.task
    if task is not None and not task.startswith(("lm_eval:", "builtin:")):
        _require_file(Path(task), "task")
    if recipe.task_test is not None:
        _require_file(recipe.task_test, "task_test")
    if recipe.networks_from is not None:
        _require_file(recipe.networks_from, "networks_from")
    if recipe.forget is not None:
        _require_file(recipe.forget, "forget")
    check_places(recipe, folder, total_bytes)


def check_models(models: Sequence[str], texts: Sequence[str] = ()) -> None:
    """Check that the models on this machine have a readable config, and that the sources of text exist.

    Parameters
    ----------
    models
        Folders, GGUF files, Hub ids or "builtin".
    texts
        Sources as for calibration.

    Raises
    ------
    InvalidInput
        A folder or a source does not exist, or a folder has no readable config.
    """
    for model in models:
        if model != "builtin" and (folder := _local(model)) is not None:
            read_config(folder)
    for source in texts:
        require_source(source)


def check_measured(texts: Sequence[str], tasks: Sequence[str] = ()) -> None:
    """Check the texts and the task files that a model is to be measured on.

    Parameters
    ----------
    texts
        `NAME=SOURCE` or `SOURCE`, as for :class:`fbn_prune.runs.ablate.AblationPlan`.
    tasks
        Files of tasks, or names that only the harness knows.

    Raises
    ------
    InvalidInput
        A source or a file does not exist.
    """
    for text in texts:
        require_source(named_text(text)[1])
    for task in tasks:
        if Path(task).suffix in TASK_SUFFIXES and not Path(task).exists():
            raise InvalidInput(f"task file {task} does not exist: give one that does")


def check_labels(path: Path) -> None:
    """Check that a file of labelled texts exists.

    Raises
    ------
    InvalidInput
        It does not.
    """
    _require_file(path, "labels")


def named_text(text: str) -> tuple[str, str]:
    """Return the name and the source of `NAME=SOURCE` or `SOURCE`; what exists is a source, with or without a "="."""
    name, equals, source = text.partition("=")
    if equals and not Path(text).exists():
        return name, source
    return Path(text).stem, text


def check_bundle_tasks(tasks: Sequence[str]) -> None:
    """Check that the files and folders of a bundle's tasks, `NAME=PATH` or `NAME=PATH:NETWORKS`, exist.

    Raises
    ------
    InvalidInput
        One does not.
    """
    for task in tasks:
        place = re.sub(r"(?<=\.safetensors):[\d,]+$", "", task.partition("=")[2])
        if place.endswith(".safetensors"):
            _require_file(Path(place), "task")
        elif place:
            _local(place)


def check_results(path: Path | None) -> None:
    """Check that a file of results can be made: its folder exists.

    Raises
    ------
    InvalidInput
        It does not.
    """
    if path is not None and not path.expanduser().resolve().parent.is_dir():
        raise InvalidInput(f"{path}: there is no folder {path.resolve().parent}: make it first")


def check_places(recipe: Recipe, model: Path | None, total_bytes: int) -> None:
    """Check the output, the work directory and their disk space; shards of an unfinished run need no space again.

    Parameters
    ----------
    model
        The model's folder, which must not be overwritten; None if it is not known yet.
    total_bytes
        Bytes of the model's tensors.

    Raises
    ------
    InvalidInput
        The output cannot be written, or a disk has too little space.
    """
    output = recipe.output
    if output is None:
        return
    place = default_place(output) if recipe.work_dir is None else recipe.work_dir
    refuse_second_run(output, recipe.work_dir)
    missing = max(0, total_bytes - shard_bytes(place.expanduser(), output))
    one_disk = on_one_disk(place, output)
    needed = missing if one_disk else total_bytes
    check_output(output, recipe.overwrite, model, needed_bytes=needed)
    if not one_disk:
        check_room(place, missing, "work directory")


def _local(model: str) -> Path | None:
    if find_gguf(model) is not None:  # its reader checks it
        return None
    return local_folder(model)


def _require_file(path: Path, key: str) -> None:
    if not path.expanduser().exists():
        raise InvalidInput(f"{key} = {path}: there is no such file")
