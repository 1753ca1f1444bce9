"""Settle which of a checkpoint's stored tensors the model uses. Where the config contradicts them, the tensors count.

transformers decides the same: it uses a stored head that differs from the embedding, whatever the config says of tied
embeddings, and ignores tensors that belong to no parameter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from fbn_prune.errors import InvalidInput
from fbn_prune.model.building import skeleton, stock_class
from fbn_prune.model.family import Family, as_config
from fbn_prune.model.remedies import wrapped
from fbn_prune.model.shards import TensorInfo

TIED = "tie_word_embeddings"

_COMPARED_BYTES = 32 * 2**20
_SKIPPED = (r"rotary_emb\.inv_freq$", r"\.masked_bias$")
"""Buffers in old checkpoints that later versions of transformers compute; they are no sign of a fault."""


@dataclass(frozen=True)
class Settled:
    """A checkpoint's config and headers, made to agree.

    Attributes
    ----------
    config
        The object in `config.json`, with `tie_word_embeddings: false` if the stored head differs from the embedding.
    tensors
        The tensors of the model. A tied head is not among them.
    unused
        Stored tensors that belong to no parameter of the model.
    own_head
        Name of a head that differs from the embedding although the config says that they are tied; None without one.
    """

    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    unused: dict[str, TensorInfo]
    own_head: str | None = None


def settle(
    path: Path,
    config: dict[str, Any],
    family: Family,
    tensors: Mapping[str, TensorInfo],
    equal: Callable[[str, str], bool] | None = None,
) -> Settled:
    """Compare a checkpoint's headers with the parameters of its config's model.

    Weights are read only to compare a head that the config calls tied with the embedding.

    Parameters
    ----------
    path
        The checkpoint's folder.
    config
        The object in its `config.json`.
    family
        Its architecture.
    tensors
        Its headers by name.
    equal
        Compares the weights of two stored tensors. Default: as they are in the files.

    Raises
    ------
    InvalidInput
        A parameter is stored in another shape than the config gives it, or there is no head though the config says that
        it is not tied to the embedding.
    """
    own_head, found = None, dict(tensors)
    for head, embedding in _tied_parameters(config).items():
        stored_head = stored_name(family, found, head)
        stored_embedding = stored_name(family, found, embedding)
        if not as_config(config).tie_word_embeddings:
            if stored_head is None and stored_embedding is not None:
                cure = f': add "{TIED}": true to config.json if the model is tied'
                raise InvalidInput(
                    f"{path} has no {head}, though config.json does not say {TIED}{wrapped(found) or cure}"
                )
        elif stored_head is None:
            continue
        elif stored_embedding is None:  # the same tensor, stored once under the head's name
            info = found[stored_head]
            info = replace(info, stored=info.stored or stored_head, saved_as=None)
            found = {
                embedding if name == stored_head else name: info if name == stored_head else other
                for name, other in found.items()
            }
        elif (
            _equal(path, found, stored_head, stored_embedding)
            if equal is None
            else equal(stored_head, stored_embedding)
        ):
            del found[stored_head]
        else:
            config, own_head = {**config, TIED: False}, stored_head
    parameters, leftovers, buffers = stored_parameters(config, family)
    missing = False
    used = {stored for name in buffers if (stored := stored_name(family, found, name)) is not None}
    for name, shape in parameters.items():
        stored = stored_name(family, found, name)
        if stored is None:
            missing = True
            continue
        used.add(stored)
        if found[stored].shape != shape:
            cure = "take config.json and the weights from one model"
            rows = found[stored].shape[0]
            if shape[0] == family.vocab_size(config) and found[stored].shape[1:] == shape[1:]:
                cure = f'write "vocab_size": {rows} into config.json if the weights are right'
            raise InvalidInput(
                f"{path}: {stored} has shape {list(found[stored].shape)}, the model needs {list(shape)}: {cure}"
            )
    # If parameters are missing, transformers may know other names for them: nothing can be called unused then.
    unused = {
        name: info
        for name, info in found.items()
        if not missing and name not in used and not any(re.search(one, name) for one in leftovers)
    }
    kept = {name: info for name, info in found.items() if name not in unused}
    return Settled(config, kept, unused, own_head)


def stored_name(family: Family, names: Container[str], parameter: str) -> str | None:
    """Return a checkpoint's name for a parameter of the live model; None if the checkpoint does not have it.

    Checkpoints saved from the base model omit the first component, and transformers renames some on loading.
    """
    candidates = [parameter, parameter.removeprefix(family.layers.partition(".")[0] + ".")]
    if (other := family.stored_as) is not None:
        candidates.append(parameter.replace(*other))
    return next((name for name in candidates if name in names), None)


def disagreement(
    own_head: str | None, unused: Mapping[str, TensorInfo], family: Family, layers: int
) -> list[str]:
    """Return one line for a head of its own, and one for unused tensors of a model with so many layers."""
    lines = []
    if own_head is not None:
        lines.append(
            f"config.json says {TIED}: true, but {own_head} differs from the embedding: the stored head is used, and "
            f"whatever is written says {TIED}: false"
        )
    if unused:
        count, first = len(unused), next(iter(unused))
        tensors = "1 tensor is" if count == 1 else f"{count} tensors are"
        merge = ""
        if any("lora_" in name for name in unused):
            merge = "; these are adapters: merge them into the model first if they should count"
        stored = {family.layer_of(name) for name in unused}
        if beyond := {layer for layer in stored if layer is not None and layer >= layers}:
            merge = (
                f"; config.json says {layers} layers, but {max(beyond) + 1} are stored: correct it if they belong to "
                "the model"
            )
        lines.append(
            f"{tensors} not part of the model, first {first}: not used, and left out of what is written "
            f"(a run's keep_unused_tensors: true keeps them){merge}"
        )
    return lines


def _tied_parameters(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the parameters that a tied model shares: the name of the embedding by that of the head."""
    tied = stock_class(as_config(config))._tied_weights_keys
    return dict(tied) if isinstance(tied, Mapping) else {}


def stored_parameters(
    config: Mapping[str, Any], family: Family
) -> tuple[dict[str, tuple[int, ...]], tuple[str, ...], tuple[str, ...]]:
    """Return what transformers' model of a `config.json` object loads, as built on the meta device.

    Returns
    -------
    shapes
        The shape of each parameter, without a tied head.
    skipped
        Patterns of stored buffers that transformers computes itself.
    buffers
        Names of the buffers that checkpoints hold.
    """
    return _parameters(family, json.dumps(config, sort_keys=True))


@lru_cache(maxsize=8)
def _parameters(
    family: Family, config: str
) -> tuple[dict[str, tuple[int, ...]], tuple[str, ...], tuple[str, ...]]:
    fields = json.loads(config)
    model = skeleton(fields, family, torch.float32)
    tied = _tied_parameters(fields) if model.config.tie_word_embeddings else {}
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if name not in tied
    }
    own = {name for name, _ in model.named_parameters()}
    buffers = tuple(name for name in model.state_dict() if name not in own and name not in tied)
    return shapes, (*(model._keys_to_ignore_on_load_unexpected or ()), *_SKIPPED), buffers


def _equal(path: Path, tensors: Mapping[str, TensorInfo], one: str, other: str) -> bool:
    """Return whether two stored tensors are equal, reading slices of rows up to the first difference."""
    first, second = tensors[one], tensors[other]
    if (first.shape, first.dtype) != (second.shape, second.dtype) or not first.shape:
        return False
    rows = max(1, _COMPARED_BYTES * first.shape[0] // max(first.nbytes, 1))
    with (
        safe_open(path / first.file, framework="pt") as left,
        safe_open(path / second.file, framework="pt") as right,
    ):
        mine = left.get_slice(first.stored or one)
        theirs = right.get_slice(second.stored or other)
        return all(
            torch.equal(mine[start : start + rows], theirs[start : start + rows])
            for start in range(0, first.shape[0], rows)
        )
