"""The names of a checkpoint's tensors in the live model, by transformers' own tables.

For some architectures the files have other names than the modules, such as a text model's prefix inside a multimodal
checkpoint. transformers renames on loading by a table for each type; the same table is used here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from fbn_prune.errors import InvalidInput
from fbn_prune.model.shards import TensorInfo


def module_names(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """Return for each stored name the name of its parameter or buffer in the model, or the name itself if it has none.

    Parameters
    ----------
    model
        The model, or its skeleton on the meta device.
    stored
        The names in the checkpoint's files.

    Raises
    ------
    InvalidInput
        transformers computes a parameter from stored tensors instead of taking it as it is.
    """
    tables = get_model_conversion_mapping(model)
    renamings = [table for table in tables if isinstance(table, WeightRenaming)]
    converters = [table for table in tables if isinstance(table, WeightConverter)]
    own, prefix = model.state_dict(), model.base_model_prefix
    names = {}
    for name in stored:
        renamed, computed = rename_source_key(name, renamings, converters, prefix, own)
        if renamed not in own and name in own:
            renamed, computed = name, None
        if computed is not None and renamed in own:
            raise InvalidInput(
                f"transformers computes {renamed} from {name} and others on loading, which is not supported"
            )
        names[name] = renamed if renamed in own else name
    return names


def by_module_name(
    model: PreTrainedModel, tensors: Mapping[str, TensorInfo]
) -> dict[str, TensorInfo]:
    """Return a checkpoint's headers by the names that the model has for the tensors.

    Raises
    ------
    InvalidInput
        As :func:`module_names`, or two tensors have the same name in the model.
    """
    names = module_names(model, tensors)
    found: dict[str, TensorInfo] = {}
    for stored, name in names.items():
        if name in found:
            raise InvalidInput(
                f"{stored} and {found[name].stored} are the same tensor of the model"
            )
        found[name] = replace(tensors[stored], stored=stored, saved_as=stored)
    return found
