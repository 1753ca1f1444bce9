"""Open the checkpoint of a mixture of experts, and name its tensors as checkpoints do.

Checkpoints store experts apiece or fused, transposed or not. transformers' own tables map the stored tensors to those
of its modules when it loads a model, and back when one is written: this package maps nothing itself.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from fbn_prune.errors import InvalidInput
from fbn_prune.model import remedies
from fbn_prune.model.building import building, check_companions, quiet_transformers, repaired
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
from fbn_prune.model.shards import read_headers
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


def open_any(path_or_hub_id: str | Path) -> Checkpoint:
    """Open the checkpoint of a mixture of experts or of another model.

    Raises
    ------
    InvalidInput
        As :func:`open_mixture` and :meth:`Checkpoint.open`.
    """
    if is_mixture(str(path_or_hub_id)):
        return open_mixture(path_or_hub_id)
    return Checkpoint.open(path_or_hub_id)


def load_mixture(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> MixtureAdapter:
    """Load a mixture into memory.

    Raises
    ------
    InvalidInput
        A tensor is missing or has another shape, or the model cannot run.
    """
    family = checkpoint.family
    assert isinstance(family, MixtureFamily)
    model = checkpoint.load_model(device, dtype)
    with building(checkpoint.path, "run"), torch.inference_mode():
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=device), use_cache=False)
    return MixtureAdapter(model, family)


def stored_tensors(adapter: MixtureAdapter) -> dict[str, Tensor]:
    """Return a live mixture's tensors under the names, and in the form, of a checkpoint, without tied ones."""
    model = adapter.model
    with quiet_transformers():
        state = remove_tied_weights_from_state_dict(model.state_dict(), model)
        found: dict[str, Tensor] = revert_weight_conversion(model, state)
    return found
