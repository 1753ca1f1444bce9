"""The pruned checkpoint on disk, streamed from its source: each tensor is read, cut and written before the next."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fbn_prune.errors import FbnPruneError, InvalidInput
from fbn_prune.export.directory import atomic_directory, check_output, disk_errors
from fbn_prune.export.shards import write_json, write_shards
from fbn_prune.model.checkpoint import COMPANION_FILES, TOKENIZER_FILES, Checkpoint
from fbn_prune.model.families import Family, Location
from fbn_prune.model.heads import HeadCut, HeadLocation, cut_heads, head_tensor_shape
from fbn_prune.model.shards import TensorInfo
from fbn_prune.model.streaming import check_tensors
from fbn_prune.model.surgery import (
    MlpCut,
    cut_tensor,
    kept_head_groups,
    pruned_config,
    require_bias,
)
from fbn_prune.store import Store

__all__ = [
    "atomic_directory",
    "check_output",
    "copy_companions",
    "verify_export",
    "write_checkpoint",
    "write_json",
    "write_tensors",
]


def write_checkpoint(
    source: Checkpoint,
    family: Family,
    cuts: Sequence[MlpCut],
    directory: Path,
    *,
    trained: Mapping[str, Tensor] | None = None,
    max_shard_size: int | str = "5GB",
    progress: Callable[[int], None] | None = None,
    store: Store | None = None,
) -> None:
    """Write the cut model with its config, generation config, tokenizer and licence.

    Parameters
    ----------
    cuts : one a layer, all of one width.
    trained : tensors that take the place of what the source and the cuts give, by name.
    directory : an existing folder, normally from `atomic_directory`.
    max_shard_size : largest shard, in bytes or as "2GB"; a larger single tensor gets its own.
    progress : called with the number of bytes written since the last call.
    store : keeps finished shards, see :func:`fbn_prune.export.shards.write_shards`.

    Raises
    ------
    InvalidInput
        If the layers have different widths, or a bias is needed where the family has none.
    FbnPruneError
        If a new weight does not fit the stored dtype, or the disk cannot be written.
    """
    widths = sorted({cut.width for cut in cuts})
    if len(widths) != 1:
        raise InvalidInput(
            f"the stock config has one width for all layers, found {widths[0]} to {widths[-1]}; "
            "use uniform widths, or write_ragged_checkpoint"
        )
    needs_bias = any(cut.down_bias is not None for cut in cuts)
    config = pruned_config(source.config, family, widths[0], needs_bias, kept_head_groups(cuts))
    with disk_errors(directory):
        write_tensors(
            source,
            family,
            cuts,
            directory,
            trained=trained,
            max_shard_size=max_shard_size,
            progress=progress,
            store=store,
        )
        write_json(directory / "config.json", config)
        copy_companions(source, directory)


def write_tensors(
    source: Checkpoint,
    family: Family,
    cuts: Sequence[MlpCut],
    directory: Path,
    *,
    trained: Mapping[str, Tensor] | None = None,
    max_shard_size: int | str = "5GB",
    progress: Callable[[int], None] | None = None,
    store: Store | None = None,
) -> None:
    """Write the safetensors alone, and their index.

    The layers may have different widths. Names and dtypes are the source's; nothing is added but the
    biases that the cuts bring.
    """
    plan = _plan(source, family, cuts)

    def produce(name: str) -> Tensor:
        if trained is not None and name in trained:
            return trained[name].to("cpu", plan[name].dtype)
        if name not in source.tensors:
            return _new_bias(family, cuts, name, plan[name])
        tensor = source.tensor(name)
        if (found := _head_cut(family, cuts, name)) is not None:
            return cut_heads(found[0], tensor, found[1], family.head_shape(source.config))
        location = _cut_location(family, cuts, name)
        if location is None:
            return tensor
        return cut_tensor(family, location, tensor, cuts[location.layer])

    write_shards(
        plan,
        produce,
        directory,
        max_shard_size=max_shard_size,
        progress=progress,
        store=store,
    )


def copy_companions(source: Checkpoint, directory: Path) -> None:
    """Copy generation config, tokenizer, chat templates and licence. Never code, never pickle.

    The source's README stays behind: a model card of the pruned model takes its place.
    """
    patterns = (*TOKENIZER_FILES, *(name for name in COMPANION_FILES if name != "README.md"))
    for file in sorted({file for pattern in patterns for file in source.path.glob(pattern)}):
        target = directory / file.relative_to(source.path)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
    tokenizer_config = directory / "tokenizer_config.json"
    if tokenizer_config.is_file() and not source.trust_remote_code:
        # It loaded without its code; whoever trusts code later would look for files not copied.
        settings = json.loads(tokenizer_config.read_text(encoding="utf-8"))
        if settings.pop("auto_map", None) is not None:
            write_json(tokenizer_config, settings)


def verify_export(directory: Path) -> None:
    """Hold a written checkpoint against the architecture that transformers makes of its config.

    From the headers alone: loading maps all shards at once, for which a limited process may have no room.

    Raises
    ------
    FbnPruneError
        If a tensor is missing, has a shape other than the config's, or the tokenizer is unusable.
    """
    try:
        written = Checkpoint.open(directory, ragged=True)
        check_tensors(written)
    except InvalidInput as error:
        raise FbnPruneError(f"the written checkpoint does not load: {error}") from error


def _cut_location(family: Family, cuts: Sequence[MlpCut], name: str) -> Location | None:
    """Where a tensor sits in the MLPs that are cut. Layers beyond the model's own are left alone."""
    location = family.locate(name)
    return location if location is not None and location.layer < len(cuts) else None


def _head_cut(
    family: Family, cuts: Sequence[MlpCut], name: str
) -> tuple[HeadLocation, HeadCut] | None:
    """Where a tensor sits in an attention that is cut, and the cut."""
    location = family.locate_heads(name)
    if location is None or location.layer >= len(cuts):
        return None
    cut = cuts[location.layer].heads
    return None if cut is None else (location, cut)


def _plan(source: Checkpoint, family: Family, cuts: Sequence[MlpCut]) -> dict[str, TensorInfo]:
    """Every tensor of the output, in the source's order, with its shape after the cut."""
    if len(cuts) != family.num_layers(source.config):
        raise ValueError(f"{len(cuts)} cuts for {family.num_layers(source.config)} layers")
    hidden = family.hidden_size(source.config)
    adds_bias = any(cut.down_bias is not None for cut in cuts)
    adds_bias = adds_bias and not family.has_bias(source.config)
    if adds_bias:
        require_bias(family, source.config)
    plan: dict[str, TensorInfo] = {}
    for name, info in source.tensors.items():
        if (found := _head_cut(family, cuts, name)) is not None:
            heads = family.head_shape(source.config)
            shape = head_tensor_shape(found[0], info.shape, len(found[1].kept), heads)
            plan[name] = TensorInfo("", shape, info.dtype)
            continue
        location = _cut_location(family, cuts, name)
        if location is None:
            plan[name] = info
            continue
        width = cuts[location.layer].width
        plan[name] = TensorInfo("", family.tensor_shape(location, hidden, width), info.dtype)
        if adds_bias:
            bias = Location(location.layer, location.projection, "bias")
            shape = family.tensor_shape(bias, hidden, width)
            plan[_bias_name(name)] = TensorInfo("", shape, info.dtype)
    return plan


def _bias_name(weight_name: str) -> str:
    return weight_name.removesuffix("weight") + "bias"


def _new_bias(family: Family, cuts: Sequence[MlpCut], name: str, info: TensorInfo) -> Tensor:
    """A bias the source has not: the cut's on the output, zeros where only the flag asks for one."""
    location = family.locate(name)
    assert location is not None
    zeros = torch.zeros(info.shape, dtype=info.dtype)
    if location.projection is not family.output:
        return zeros
    return cut_tensor(family, location, zeros, cuts[location.layer])
