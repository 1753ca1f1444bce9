"""Commands that turn checkpoints into other files without running the model: convert, dequantize, bundle."""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fbn_prune import export
from fbn_prune.data import builtin
from fbn_prune.errors import InvalidInput
from fbn_prune.export.directory import atomic_directory, check_output
from fbn_prune.progress import Display, StageClock
from fbn_prune.recipe import parse_size
from fbn_prune.runs.early_checks import check_bundle_tasks, check_models

if TYPE_CHECKING:
    from fbn_prune.serving.tasks import Refit


def convert(
    model: str,
    output: Path,
    *,
    to: str = "gguf",
    dtype: str = "auto",
    verify: bool | None = None,
    overwrite: bool = False,
    display: Display | None = None,
) -> dict[str, Any]:
    """Write a checkpoint in another format, such as GGUF for llama.cpp.

    Each module `fbn_prune/export/to_NAME.py` with a function `write` is a format.

    Parameters
    ----------
    model
        Checkpoint folder or Hub id, pruned or not.
    output
        File to write.
    to
        The format.
    dtype
        Type of the matrices; "auto" keeps the checkpoint's.
    verify
        Run the file and compare its answers with those of transformers before it gets its name. By default where
        the package for it is installed.
    overwrite
        Replace an existing file.
    display
        Shows progress. Default: nothing is shown.

    Returns
    -------
    dict
        `output`, `format`, `architecture` (the format's name for it), `bytes`, and `notes`: how llama.cpp may tokenize
        rare text differently, and whether the file was verified.

    Raises
    ------
    InvalidInput
        If the output exists, the format is unknown, the checkpoint has no form in it, or a package is missing.
    FbnPruneError
        If the file cannot be written, or answers differently.
    """
    if output.exists() and not (overwrite and output.is_file()):
        raise InvalidInput(f"the output {output} exists; give another, or --overwrite")
    formats = [found.name for found in pkgutil.iter_modules(export.__path__)]
    if f"to_{to}" not in formats:
        known = ", ".join(name[3:] for name in formats if name.startswith("to_"))
        raise InvalidInput(f"--to {to}: no such format; known: {known}")
    check_models([model])
    from fbn_prune.model.checkpoint import Checkpoint  # loads torch

    write = import_module(f"{export.__name__}.to_{to}").write
    how: dict[str, Any] = {"dtype": dtype}
    if "verify" in signature(write).parameters:
        how["verify"] = verify
    elif verify:
        raise InvalidInput(f"--verify: files of the format {to} cannot be compared")
    source, notes = Checkpoint.open(builtin.path_or_id(model)), list[str]()
    with StageClock(display).stage("convert", source.total_bytes, "bytes") as advance:
        architecture = write(source, output, progress=advance, note=notes.append, **how)
    return {
        "output": str(output),
        "format": to,
        "architecture": architecture,
        "bytes": output.stat().st_size,
        "notes": notes,
    }


def dequantize(
    model: str,
    output: Path,
    *,
    dtype: Literal["bfloat16", "float16", "float32"] | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    display: Display | None = None,
) -> dict[str, Any]:
    """Write a quantized checkpoint (fp8, compressed-tensors, bitsandbytes) or a GGUF file as a plain checkpoint.

    Parameters
    ----------
    model
        Folder or Hub id of the quantized checkpoint, or a GGUF file.
    output
        Folder to write.
    dtype
        Type of all weights. Default: the config's type for weights that were quantized; the others keep theirs.
    max_shard_size
        Size of the largest weights file, such as "5GB".
    overwrite, display
        See :func:`convert`.

    Returns
    -------
    dict
        `output`, `method` (of the quantization), `dequantized` (number of weights), `dtype`, `parameters`, `bytes`.

    Raises
    ------
    InvalidInput
        If the checkpoint is not quantized by a known method, or the output exists or does not fit on the disk.
    FbnPruneError
        If the files cannot be written.
    """
    shard_bytes = parse_size(max_shard_size, "max_shard_size")
    check_models([model])
    check_output(output, overwrite, None)
    from fbn_prune.export.dequantized import write_dequantized  # loads torch
    from fbn_prune.model.quantized import PLAIN_DTYPES, open_quantized

    source = open_quantized(
        builtin.path_or_id(model), None if dtype is None else PLAIN_DTYPES[dtype]
    )
    check_output(output, overwrite, source.path, needed_bytes=source.total_bytes)
    with (
        StageClock(display).stage("dequantize", source.total_bytes, "bytes") as advance,
        atomic_directory(output, overwrite) as folder,
    ):
        write_dequantized(source, folder, max_shard_size=shard_bytes, progress=advance)
    return {
        "output": str(output),
        "method": source.method,
        "dequantized": source.quantized_weights,
        "dtype": str(source.storage_dtype).removeprefix("torch."),
        "parameters": source.total_parameters,
        "bytes": source.total_bytes,
    }


def write_bundle(
    model: str,
    tasks: Sequence[str],
    output: Path,
    *,
    refit: Refit = "full",
    refit_rank: int = 16,
    link: bool = False,
    overwrite: bool = False,
    display: Display | None = None,
) -> dict[str, Any]:
    """Write one whole model and the neuron sets of several tasks into a folder for :func:`fbn_prune.serving.load`.

    Parameters
    ----------
    model
        Folder or Hub id of the whole model, or "builtin".
    tasks
        One "NAME=PATH" per task, the most used first. PATH is a pruned checkpoint, its
        `kept_neurons.safetensors`, or `networks.safetensors:2,5,21` for the members of these networks.
    output
        Folder to write.
    refit, refit_rank
        How much of a task's refitted output weights to keep: all ("full"), a correction of rank `refit_rank`
        ("low-rank"), or nothing ("none").
    link
        Record where the model is instead of copying it.
    overwrite, display
        See :func:`convert`.

    Returns
    -------
    dict
        The content of `bundle.json`, plus `output` and `base_bytes`.

    Raises
    ------
    InvalidInput
        If a task is malformed, named twice or made from another model, or the output exists or does not fit.
    """
    check_models([model])
    check_output(output, overwrite, None)
    check_bundle_tasks(tasks)
    from fbn_prune.model.checkpoint import Checkpoint
    from fbn_prune.serving import bundle  # loads torch and the kernels

    sources = [bundle.TaskSource.parse(task) for task in tasks]
    base = Checkpoint.open(builtin.path_or_id(model))
    check_output(output, overwrite, base.path, needed_bytes=0 if link else base.total_bytes)
    total = base.total_bytes * len(sources)
    with StageClock(display).stage("bundle", total, "bytes") as advance:
        return bundle.write_bundle(
            base,
            sources,
            output,
            refit=refit,
            rank=refit_rank,
            link=link,
            overwrite=overwrite,
            progress=advance,
        )
