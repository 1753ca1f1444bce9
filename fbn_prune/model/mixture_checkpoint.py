"""Open the checkpoint of a mixture of experts, and name its tensors as checkpoints do.

Checkpoints store experts apiece or fused, transposed or not. transformers' own tables map the stored tensors to those
of its modules when it loads a model, and back when one is written: this package maps nothing itself.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from fbn_prune.errors import InvalidInput
from fbn_prune.model import remedies
from fbn_prune.model.building import (
    check_companions,
    quiet_transformers,
    repaired,
    skeleton,
)
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.experts import mixture
from fbn_prune.model.families import family_of, refusal
from fbn_prune.model.family import as_config
from fbn_prune.model.folder import find_folder, read_config
from fbn_prune.model.gguf_parts import find_gguf
from fbn_prune.model.header_checks import refuse_quantized
from fbn_prune.model.mixture_adapter import MixtureAdapter
from fbn_prune.model.mixture_family import MixtureFamily, mixture_family
from fbn_prune.model.mixture_identities import failed_mixture_step
from fbn_prune.model.shards import TensorInfo, read_headers
from fbn_prune.model.tokenizer_checks import check_tokenizer


def is_mixture(path_or_hub_id: str, *, trust_remote_code: bool = False) -> bool:
    """Whether a model's config says that it is a mixture of experts; a model of the Hub is downloaded for that.

    Raises
    ------
    InvalidInput
        There is no such model, or it can be pruned neither as a mixture nor otherwise.
    """
    if path_or_hub_id == "builtin" or find_gguf(path_or_hub_id) is not None:
        return False

    def accept(config: dict[str, object]) -> object:
        return mixture_family(config) if _says_so(config) else family_of(config)

    path, _ = find_folder(path_or_hub_id, accept, trust_remote_code)
    return _says_so(read_config(path))


def _says_so(config: dict[str, object]) -> bool:
    if mixture(config) is not None:
        return True
    try:  # the number of experts may be the type's default
        return mixture(as_config(config).to_dict()) is not None
    except InvalidInput:
        return False


def open_mixture(path_or_hub_id: str | Path, *, trust_remote_code: bool = False) -> Checkpoint:
    """Find a mixture's checkpoint and check its headers and tokenizer; no weights are read.

    Raises
    ------
    InvalidInput
        A file is missing, damaged or not supported, or the architecture is.
    """
    path, hub_id = find_folder(path_or_hub_id, mixture_family, trust_remote_code)
    config, repairs = repaired(read_config(path))
    tensors = read_headers(path)
    family = mixture_family(config)
    remedies.refuse_ungathered(path, tensors)
    refuse_quantized(path, tensors)
    check_companions(path)
    if (reason := failed_mixture_step(as_config(config))) is not None:
        raise refusal(family.name, reason)
    checkpoint = Checkpoint(
        path, config, family, tensors, hub_id, trust_remote_code, tuple(repairs)
    )
    vocabulary = family.vocab_size(config)
    check_tokenizer(path, path, checkpoint.load_tokenizer, vocabulary)
    return checkpoint


def open_any(path_or_hub_id: str | Path, *, trust_remote_code: bool = False) -> Checkpoint:
    """Open the checkpoint of a mixture of experts or of another model.

    Raises
    ------
    InvalidInput
        As :func:`open_mixture` and :meth:`Checkpoint.open`.
    """
    of_experts = is_mixture(str(path_or_hub_id), trust_remote_code=trust_remote_code)
    opened = open_mixture if of_experts else Checkpoint.open
    return opened(path_or_hub_id, trust_remote_code=trust_remote_code)


def headers_of(model: PreTrainedModel) -> Checkpoint:
    """Return the headers that a checkpoint of a live model of any kind would have; its tensors cannot be read.

    Raises
    ------
    InvalidInput
        The architecture is not supported, or what was found of it fails on a tiny copy.
    """
    fields = {**model.config.to_dict(), "model_type": model.config.model_type}
    if mixture(fields) is None:
        headers = Checkpoint.of_model(model)
        headers.check_architecture()
        headers.check_weights()
        return headers
    family = mixture_family(fields)
    if (reason := failed_mixture_step(model.config)) is not None:
        raise refusal(family.name, reason)
    tensors = {
        name: TensorInfo("", tuple(parameter.shape), parameter.dtype)
        for name, parameter in model.named_parameters()  # tied embeddings once
    }
    return Checkpoint(Path(model.name_or_path or type(model).__name__), fields, family, tensors)


class StoredForm:
    """The tensors of a mixture, cut or not, under the names and in the form of its checkpoint, without tied ones.

    The tensors of one decoder layer are converted together, and held until one of another is asked for.

    Parameters
    ----------
    adapter
        The mixture.
    config
        Its `config.json` object.

    Attributes
    ----------
    tensors
        The tensors on the meta device, by name.
    """

    def __init__(self, adapter: MixtureAdapter, config: dict[str, Any]) -> None:
        self._adapter = adapter
        self._held: tuple[str, dict[str, Tensor]] = "", {}
        self._parts: dict[str, list[str]] = {}
        for name in adapter.state_names():
            self._parts.setdefault(_part(adapter.mixture, name), []).append(name)
        shapes = skeleton(config, adapter.mixture, adapter.dtype).state_dict()
        self.tensors: dict[str, Tensor] = {}
        self._part_of: dict[str, str] = {}
        for part, names in self._parts.items():
            made = self._reverted({name: shapes[name].to("meta") for name in names})
            self.tensors |= made
            self._part_of |= dict.fromkeys(made, part)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor."""
        part = self._part_of[name]
        if self._held[0] != part:
            self._held = "", {}
            state = self._adapter.stored_state(part)
            self._held = part, self._reverted({name: state[name] for name in self._parts[part]})
        return self._held[1][name]

    def _reverted(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        with quiet_transformers():
            found: dict[str, Tensor] = revert_weight_conversion(self._adapter.model, state)
        return found


def _part(family: MixtureFamily, name: str) -> str:
    """What a tensor is converted together with: the beginning of the names of its decoder layer, or its own name."""
    match = re.match(rf"{re.escape(family.layers)}\.\d+\.", name)
    return name if match is None else match[0]
