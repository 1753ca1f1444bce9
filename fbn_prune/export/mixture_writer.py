"""Write a cut mixture of experts: its tensors as transformers stores them, and the companions of the source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fbn_prune.errors import FbnPruneError, InvalidInput
from fbn_prune.export.directory import disk_errors
from fbn_prune.export.shards import write_json, write_shards
from fbn_prune.export.writer import copy_companions
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.mixture_adapter import MixtureAdapter
from fbn_prune.model.mixture_checkpoint import StoredForm, open_mixture
from fbn_prune.model.mixture_family import MixtureFamily
from fbn_prune.model.shards import TensorInfo
from fbn_prune.model.stock_names import with_stock_names
from fbn_prune.store import Store


def write_mixture(
    source: Checkpoint,
    adapter: MixtureAdapter,
    size: tuple[int, int],
    directory: Path,
    *,
    max_shard_size: int | str = "5GB",
    progress: Callable[[int], None] | None = None,
    store: Store | None = None,
) -> None:
    """Write a cut mixture as a checkpoint that stock classes load.

    Parameters
    ----------
    source
        The checkpoint that was cut. A tensor is written in the dtype that it has there.
    adapter
        The cut model.
    size
        The number of its experts and their width.
    directory
        An existing folder, normally from :func:`fbn_prune.export.directory.atomic_directory`.
    max_shard_size, progress, store
        See :func:`fbn_prune.export.shards.write_shards`.

    Raises
    ------
    FbnPruneError
        The disk cannot be written, or what was written is not what its config says.
    """
    family = source.family
    assert isinstance(family, MixtureFamily)
    count, width = size
    config = with_stock_names(family.with_experts(source.config, count, width))
    stored, common = StoredForm(adapter, config), source.storage_dtype

    def dtype(name: str, tensor: Tensor) -> torch.dtype:
        if name in source.tensors:
            return source.tensors[name].dtype
        return common if tensor.is_floating_point() else tensor.dtype

    plan = {
        name: TensorInfo("", tuple(tensor.shape), dtype(name, tensor))
        for name, tensor in stored.tensors.items()
    }
    with disk_errors(directory):
        write_shards(
            plan,
            lambda name: stored.tensor(name).detach().to("cpu", plan[name].dtype),
            directory,
            max_shard_size=max_shard_size,
            progress=progress,
            store=store,
        )
        write_json(directory / "config.json", config)
        copy_companions(source, directory)
    verify_mixture(directory, count, width)


def verify_mixture(directory: Path, count: int, width: int) -> None:
    """Check that transformers finds all tensors of a written mixture, in the shapes of its config.

    Raises
    ------
    FbnPruneError
        It does not, or the config says another number of experts or another width.
    """
    try:
        written = open_mixture(directory)
        written.load_model("meta", torch.float32)
    except InvalidInput as error:
        raise FbnPruneError(f"the written checkpoint does not load: {error}") from error
    family = written.family
    assert isinstance(family, MixtureFamily)
    if (family.count, family.expert_width) != (count, width):
        raise FbnPruneError(
            f"the written config says {family.count} experts of {family.expert_width} neurons instead of {count} of "
            f"{width}"
        )
