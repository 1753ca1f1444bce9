"""Recognise what people often give in place of a checkpoint, and say how to get one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fbn_prune.errors import InvalidInput

if TYPE_CHECKING:
    from fbn_prune.model.shards import TensorInfo

_MERGE = "merge the adapters and save the inner model, with model.merge_and_unload().save_pretrained(FOLDER)"
_WRAPPERS = {
    "base_model.model.": ("PEFT's wrapper", _MERGE),
    ".base_layer.": ("a model with PEFT's adapters", _MERGE),
    ".modules_to_save.": ("a model with PEFT's adapters", _MERGE),
    "module.": ("DataParallel's wrapper", "save the inner model, model.module"),
    "_orig_mod.": ("torch.compile's wrapper", "save the inner model, model._orig_mod"),
    "_fsdp_wrapped_module.": ("FSDP's wrapper", "save the full state dict of the inner model"),
}


def without_config(path: Path) -> str:
    """Return why a folder without `config.json` is no checkpoint, and which folder is one, if that can be seen."""
    if (path / "adapter_config.json").is_file():
        return f"{path} has no config.json; this is an adapter: merge it into its base model first"
    if (snapshot := _snapshot(path)) is not None:
        return f"{path} is a model's place in the Hub's cache; give its snapshot {snapshot}"
    inside = sorted(file.parent for file in path.glob("*/config.json"))
    if len(inside) == 1:
        return f"{path} has no config.json; give the folder inside, {inside[0]}"
    if inside:
        shown = ", ".join(folder.name for folder in inside[:5])
        return f"{path} has no config.json; give one of the folders inside it ({shown})"
    return f"{path} has no config.json: copy it from the original model, or give another folder"


def _snapshot(path: Path) -> Path | None:
    """Return the snapshot of a repository's folder in the Hub's cache: that of `main`, or the only one."""
    folder = path if path.name == "snapshots" else path / "snapshots"
    if not folder.is_dir():
        return None
    found = sorted(one for one in folder.iterdir() if (one / "config.json").is_file())
    try:
        named = folder / (folder.parent / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        named = None
    if named in found:
        return named
    return found[0] if found else None


def refuse_ungathered(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse weights without elements, which DeepSpeed's ZeRO-3 leaves in place of those on other processes.

    Raises
    ------
    InvalidInput
        There are some; the first is named.
    """
    empty = [name for name, info in tensors.items() if info.parameters == 0]
    if empty:
        raise InvalidInput(
            f"{path}: {len(empty)} of {len(tensors)} tensors are empty (first {empty[0]}), as DeepSpeed ZeRO-3 saves "
            "them; gather the weights with zero_to_fp32.py of the training's checkpoint, or save again with "
            "stage3_gather_16bit_weights_on_model_save"
        )


def missing_tensor(names: Collection[str]) -> str:
    """Return what to do about a missing tensor, judged by the names of those that are there; begins with "; "."""
    return wrapped(names) or (
        "; if the files are incomplete, download them again, else take config.json and the weights from one model"
    )


def wrapped(names: Collection[str]) -> str | None:
    """Return how to save the model without what was wrapped around it, beginning with "; "; None without a wrapper."""
    for part, (wrapper, cure) in _WRAPPERS.items():
        found = next((name for name in names if part in name), None)
        if found is not None:
            return f"; {found} was saved from {wrapper}: {cure}"
    return None


def refuse_sentencepiece_without_library(path: Path) -> None:
    """Refuse a `tokenizer.model` alone where the packages that read it are not installed.

    transformers would take it for a file of tiktoken, and ask for a package that cannot read it either.

    Raises
    ------
    InvalidInput
        A package is missing; it is named.
    """
    model = path / "tokenizer.model"
    if (path / "tokenizer.json").is_file() or not model.is_file():
        return
    with model.open("rb") as file:
        is_protobuf = file.read(1) == b"\x0a"  # tiktoken's files are lines of base64
    packages = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
    missing = [package for module, package in packages.items() if not _installed(module)]
    if is_protobuf and missing:
        raise InvalidInput(
            f"{path} has its tokenizer only as tokenizer.model: pip install {' '.join(missing)} to read it, "
            "or copy tokenizer.json from the original model"
        )


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False
