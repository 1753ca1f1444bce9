"""Write the pruned checkpoint, streamed from its source: one tensor at a time is read, cut and written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fbn_prune.errors import FbnPruneError, InvalidInput
from fbn_prune.export.directory import disk_errors
from fbn_prune.export.shards import write_json, write_shards
from fbn_prune.model import modeling_ragged
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.depth import Depth
from fbn_prune.model.family import Family, Location
from fbn_prune.model.folder import COMPANION_FILES, TOKENIZER_FILES, VOCABULARY_FILES, read_config
from fbn_prune.model.head_groups import layer_facts
from fbn_prune.model.header_checks import widths_by_tensors
from fbn_prune.model.headers import read_object
from fbn_prune.model.shards import TensorInfo
from fbn_prune.model.stock_names import with_stock_names
from fbn_prune.model.streaming import check_tensors
from fbn_prune.model.surgery import (
    MlpCut,
    cut_config,
    cut_of,
    cut_shape,
    cut_tensor,
    is_removed,
    require_bias,
    with_own_code,
)
from fbn_prune.model.vocabulary import VocabularyCut
from fbn_prune.store import Store


def write_checkpoint(
    source: Checkpoint,
    cuts: Sequence[MlpCut],
    directory: Path,
    *,
    trained: Mapping[str, Tensor] | None = None,
    vocabulary: VocabularyCut | None = None,
    depth: Depth | None = None,
    keep_unused: bool = False,
    max_shard_size: int | str = "5GB",
    progress: Callable[[int], None] | None = None,
    store: Store | None = None,
) -> None:
    """Write the cut model with its config, generation config, tokenizer and licence.

    If layers differ in width or in their heads, the code file that the config names is written too, see
    :func:`fbn_prune.model.surgery.cut_config`.

    Parameters
    ----------
    source
        The checkpoint that is cut.
    cuts
        One cut for each layer; none at all if the layers stay as they are.
    vocabulary
        The tokens that are kept; all by default.
    depth
        The layers that are kept; all by default.
    trained
        Tensors, by their names in the checkpoint, that replace those of the source and the cuts.
    keep_unused
        Also write the stored tensors that the model does not use, as they are.
    directory
        An existing folder, normally from :func:`fbn_prune.export.directory.atomic_directory`.
    max_shard_size
        Largest shard, in bytes or as "2GB"; a larger tensor gets a shard of its own.
    progress
        Called with the number of bytes written since the last call.
    store
        Holds finished shards, see :func:`fbn_prune.export.shards.write_shards`.

    Raises
    ------
    InvalidInput
        A cut adds a bias, and the architecture does not support one.
    FbnPruneError
        A new weight is too large for the stored dtype, or the disk cannot be written.
    """
    config = _config(source, cuts, depth)
    if vocabulary is not None:
        config = vocabulary.config(config)
    plan = _plan(source, cuts, vocabulary)
    names = {name: name if depth is None else depth.name(source.family, name) for name in plan}
    plan = {name: plan[name] for name, new in names.items() if new is not None}
    if keep_unused:
        plan |= source.unused
    produce = _producer(source, plan, cuts, trained or {}, vocabulary)
    saved = {source.saved_name(names.get(name) or name): name for name in plan}
    with disk_errors(directory):
        write_shards(
            {name: plan[own] for name, own in saved.items()},
            lambda name: produce(saved[name]),
            directory,
            max_shard_size=max_shard_size,
            progress=progress,
            store=store,
        )
        write_json(directory / "config.json", config)
        copy_companions(source, directory)
        if vocabulary is not None:
            write_tokenizer(source, vocabulary, directory)
        copy_own_code(source.family, config, directory)


def copy_own_code(family: Family, config: Mapping[str, Any], directory: Path) -> None:
    """Copy the code file that the config names if the layers differ in size; it is this package's own."""
    if layer_facts(family, config):
        code = Path(modeling_ragged.__file__)
        shutil.copyfile(code, directory / code.name)


def copy_companions(source: Checkpoint, directory: Path) -> None:
    """Copy generation config, tokenizer, chat templates and licence, but no code and no pickle files.

    The README is not copied, because the pruned model gets its own model card.
    """
    patterns = (*TOKENIZER_FILES, *(name for name in COMPANION_FILES if name != "README.md"))
    for file in sorted({file for pattern in patterns for file in source.folder.glob(pattern)}):
        target = directory / file.relative_to(source.folder)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
    tokenizer_config = directory / "tokenizer_config.json"
    if tokenizer_config.is_file() and not source.trust_remote_code:
        # The tokenizer loaded without its code, which is not copied; with trust_remote_code a loader would look for it.
        settings = json.loads(tokenizer_config.read_text(encoding="utf-8"))
        if settings.pop("auto_map", None) is not None:
            write_json(tokenizer_config, settings)


def write_tokenizer(source: Checkpoint, vocabulary: VocabularyCut, directory: Path) -> None:
    """Replace the copied tokenizer and generation config by those of the kept tokens.

    `tokenizer.json` alone has the pieces; other files with them, such as `vocab.json`, are removed.
    """
    for pattern in (*VOCABULARY_FILES, "merges.txt", "added_tokens.json"):
        for file in directory.glob(pattern):
            file.unlink()
    text = json.dumps(vocabulary.tokenizer, ensure_ascii=False, indent=2)
    (directory / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    for name in ("tokenizer_config.json", "generation_config.json"):
        if (directory / name).is_file():
            settings = read_object(directory / name)
            write_json(directory / name, vocabulary.renumbered(settings))


def verify_export(directory: Path) -> None:
    """Check that a written checkpoint has the tensors that transformers expects for its config.

    Only headers are read, because loading maps all shards, which may exceed a limit on address space.

    Raises
    ------
    FbnPruneError
        A tensor is missing or has a wrong shape, or the tokenizer does not load.
    """
    try:
        written = Checkpoint.open(directory)
        check_tensors(written)
        _, other = widths_by_tensors(written.family, read_config(directory), written.tensors)
        if other is not None:  # which opening corrects, but other loaders do not
            raise InvalidInput(other)
    except InvalidInput as error:
        raise FbnPruneError(f"the written checkpoint does not load: {error}") from error


def _producer(
    source: Checkpoint,
    plan: Mapping[str, TensorInfo],
    cuts: Sequence[MlpCut],
    trained: Mapping[str, Tensor],
    vocabulary: VocabularyCut | None,
) -> Callable[[str], Tensor]:
    """Return the function that makes each tensor of the plan, under the source's name and in its dtype."""

    def produce(name: str) -> Tensor:
        if vocabulary is not None and name in vocabulary.tensors:
            return vocabulary.rows(source, name)
        if name in trained:
            return trained[name].to("cpu", plan[name].dtype)
        if name in source.unused:
            return source.tensor(name)
        if name in source.tensors:
            tensor = source.tensor(name)
        else:  # a bias that the cuts add
            tensor = torch.zeros(plan[name].shape, dtype=plan[name].dtype)
            if (at := source.family.locate(name)) and at.projection is not source.family.output:
                return tensor
        cut = cut_of(source.family, name, cuts)
        return (
            tensor if cut is None else cut_tensor(source.family, source.config, name, tensor, cut)
        )

    return produce


def _config(source: Checkpoint, cuts: Sequence[MlpCut], depth: Depth | None) -> dict[str, Any]:
    if not cuts:
        return _whole_config(source)
    if depth is None:
        return cut_config(source.config, source.family, cuts)
    staying = [cuts[layer] for layer in depth.staying]
    return cut_config(depth.config(source.config), source.family, staying)


def _whole_config(source: Checkpoint) -> dict[str, Any]:
    """Return the config of layers that stay as they are, without the names of code files that are not exported."""
    if layer_facts(source.family, source.config):
        return with_own_code(source.config, source.family)
    return with_stock_names(source.config)


def _plan(
    source: Checkpoint, cuts: Sequence[MlpCut], vocabulary: VocabularyCut | None
) -> dict[str, TensorInfo]:
    """Return every tensor of the cut model, in the source's order, with its shape after the cut."""
    family, config = source.family, source.config
    if cuts and len(cuts) != family.num_layers(config):
        raise ValueError(f"{len(cuts)} cuts for {family.num_layers(config)} layers")
    adds_bias = any(cut.down_bias is not None for cut in cuts) and not family.has_bias(config)
    if adds_bias:
        require_bias(family, config)
    plan: dict[str, TensorInfo] = {}
    for name, info in source.tensors.items():
        if is_removed(family, name, cuts):
            continue
        cut = cut_of(family, name, cuts)
        if vocabulary is not None and name in vocabulary.tensors:
            plan[name] = TensorInfo("", vocabulary.shape(info), info.dtype)
            continue
        if cut is None:
            plan[name] = info
            continue
        plan[name] = TensorInfo("", cut_shape(family, config, name, info.shape, cut), info.dtype)
        location = family.locate(name)
        if adds_bias and location is not None:
            bias = Location(location.layer, location.projection, "bias")
            shape = family.tensor_shape(bias, family.hidden_size(config), cut.width)
            plan[name.removesuffix("weight") + "bias"] = TensorInfo("", shape, info.dtype)
    return plan
