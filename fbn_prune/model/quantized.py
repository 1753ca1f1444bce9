"""Open a quantized checkpoint as if it were plain: its tensors are dequantized when they are read."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from fbn_prune.errors import InvalidInput
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.config_checks import ConfigWarning
from fbn_prune.model.families import family_of
from fbn_prune.model.family import Family
from fbn_prune.model.folder import find_folder, read_config
from fbn_prune.model.gguf_file import open_gguf
from fbn_prune.model.gguf_parts import find_gguf
from fbn_prune.model.head_groups import layer_facts
from fbn_prune.model.header_checks import PACKED, WEIGHT_DTYPES, widths_by_tensors
from fbn_prune.model.quantization import CONFIG_KEYS, known_method, quantization_of
from fbn_prune.model.quantized_formats import stored_weights
from fbn_prune.model.quantized_values import Stored, plain, rounded
from fbn_prune.model.shards import TensorInfo, read_headers
from fbn_prune.model.stored_tensors import disagreement, settle
from fbn_prune.model.streaming import check_tensors
from fbn_prune.model.surgery import with_own_code

PLAIN_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""Dtypes to which weights can be dequantized, by their names in config.json."""

_ACTIVATIONS = re.compile(
    r"\.((input|output|act|activation|prob|kv|[qkv])_(global_)?(scale|zero_point)(_inv)?)$"
)
"""Suffixes of tensors that quantize activations or the key-value cache; a plain checkpoint does not have them."""


@dataclass(frozen=True, eq=False)
class QuantizedCheckpoint(Checkpoint):
    """A quantized checkpoint whose `config` and `tensors` are those of its plain form; see :func:`open_quantized`.

    Tensors are dequantized when they are read. To load the model with transformers, write the plain checkpoint first.

    Attributes
    ----------
    method
        The quantization method.
    stored
        The quantized weights by their plain names.
    stored_tensors
        The headers of the files.
    transposed
        Whether the quantized matrices are the transposes of the plain ones.
    """

    method: str = ""
    stored: Mapping[str, Stored] = field(default_factory=dict)
    stored_tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    transposed: bool = False

    @property
    def quantized_weights(self) -> int:
        """Number of weights that are stored quantized."""
        return len(self.stored) if self.gguf is None else self.gguf.quantized

    def tensor(self, name: str) -> Tensor:
        """Return a tensor in its plain dtype, mapped from its file where it is stored in that form.

        Raises
        ------
        FbnPruneError
            A value is not finite, or too large for the dtype.
        """
        if self.gguf is not None:
            return super().tensor(name)
        dtype, source = self.tensors[name].dtype, self.tensors[name].stored or name
        if (stored := self.stored.get(source)) is not None:
            values = plain(name, stored, self._stored_tensor, dtype)
            return values.T.contiguous() if self.transposed else values
        tensor = self._stored_tensor(source)
        return tensor if tensor.dtype == dtype else rounded(name, tensor, dtype)

    def read(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return a tensor on `device` in `dtype`."""
        return self.tensor(name).to(device, dtype)

    def load_model(
        self,
        device: str | torch.device,
        dtype: torch.dtype,
        device_map: Mapping[str, str] | None = None,
    ) -> PreTrainedModel:
        """Raise InvalidInput: transformers would load the quantized weights in the folder."""
        raise InvalidInput(f"{self.path} is quantized ({self.method}): dequantize it first")

    def _stored_tensor(self, name: str) -> Tensor:
        return _mapped(self.path, self.stored_tensors, name)


def open_quantized(
    path_or_hub_id: str | Path, dtype: torch.dtype | None = None
) -> QuantizedCheckpoint:
    """Find a quantized checkpoint and check its headers and tokenizer.

    Parameters
    ----------
    path_or_hub_id
        A folder, a Hub id to download from, or a GGUF file, which need not be quantized.
    dtype
        The dtype of all floating-point tensors. By default quantized weights get the config's dtype (bfloat16 if that
        is not in `PLAIN_DTYPES`), and other tensors keep theirs.

    Raises
    ------
    InvalidInput
        The model is not quantized, its quantization cannot be undone, or :meth:`Checkpoint.open` would refuse it.
    """
    if (file := find_gguf(path_or_hub_id)) is not None:
        gguf = open_gguf(file, dtype)
        model, types = gguf.model, ", ".join(gguf.types)
        opened = QuantizedCheckpoint(
            file, model.config, model.family, gguf.tensors, gguf=gguf, method=f"GGUF ({types})"
        )
        opened.check()
        return opened
    path, hub_id = find_folder(path_or_hub_id, _plain_family)
    config = read_config(path)
    family = _plain_family(config)
    quantization = quantization_of(config)
    method = known_method(quantization)
    headers = read_headers(path)
    target = dtype or PLAIN_DTYPES.get(_named_dtype(config), torch.bfloat16)
    try:
        stored = stored_weights(headers, quantization, lambda name: _mapped(path, headers, name))
        # bitsandbytes transposes the matrices of Conv1D without recording it.
        transposed = method == "bitsandbytes" and family.is_conv1d
        tensors = _plain_tensors(headers, stored, target, dtype, transposed)
    except InvalidInput as error:
        raise InvalidInput(
            f"{path}: {error}; download it again, or give the unquantized model"
        ) from error
    bare = {key: value for key, value in config.items() if key not in CONFIG_KEYS}
    bare, other = widths_by_tensors(family, bare, tensors)
    if other is not None:
        warnings.warn(other, ConfigWarning, stacklevel=2)
    checkpoint = QuantizedCheckpoint(
        path,
        plain_config(bare, target),
        family,
        tensors,
        hub_id,
        method=method,
        stored=stored,
        stored_tensors=headers,
        transposed=transposed,
    )
    checkpoint.check()
    checkpoint = _settled(checkpoint)
    check_tensors(checkpoint)
    return checkpoint


def _settled(checkpoint: QuantizedCheckpoint) -> QuantizedCheckpoint:
    """Return the checkpoint with a config that says whether its head is tied; tensors without a use stay in it."""

    def equal(one: str, other: str) -> bool:
        return torch.equal(checkpoint.tensor(one), checkpoint.tensor(other))

    found = settle(checkpoint.path, checkpoint.config, checkpoint.family, checkpoint.tensors, equal)
    for line in disagreement(found.own_head, {}, checkpoint.family, 0):
        warnings.warn(line, ConfigWarning, stacklevel=3)
    tensors = {**found.tensors, **found.unused}
    return replace(checkpoint, config=found.config, tensors=tensors, own_head=found.own_head)


def plain_config(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return the `config.json` object of the plain checkpoint with weights in `dtype`."""
    result = copy.deepcopy({key: value for key, value in config.items() if key not in CONFIG_KEYS})
    result.pop("auto_map", None)  # names code files that are not copied
    if layer_facts(family := family_of(result), result):
        result = with_own_code(result, family)
    key = "torch_dtype" if "torch_dtype" in result and "dtype" not in result else "dtype"
    return result | {key: str(dtype).removeprefix("torch.")}


def _plain_family(config: Mapping[str, Any]) -> Family:
    """The family of the plain model; raises InvalidInput if the quantization cannot be undone."""
    family = family_of({key: value for key, value in config.items() if key not in CONFIG_KEYS})
    quantization = quantization_of(config)
    if quantization is None:
        raise InvalidInput("config.json names no quantization: there is nothing to dequantize")
    known_method(quantization)
    return family


def _named_dtype(config: Mapping[str, Any]) -> str:
    return str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")


def _plain_tensors(
    headers: Mapping[str, TensorInfo],
    stored: Mapping[str, Stored],
    target: torch.dtype,
    others: torch.dtype | None,
    transposed: bool,
) -> dict[str, TensorInfo]:
    """The plain checkpoint's headers in file order; refuses quantized tensors that belong to no weight."""
    plain_names = {weight.weight: name for name, weight in stored.items()}
    parts = {part for weight in stored.values() for part in weight.parts}
    tensors: dict[str, TensorInfo] = {}
    for name, info in headers.items():
        if name in plain_names:
            plain_name = plain_names[name]
            shape = stored[plain_name].shape
            if plain_name in headers and plain_name != name:
                raise InvalidInput(f"the checkpoint has both {name} and {plain_name}: remove one")
            tensors[plain_name] = TensorInfo(
                info.file, shape[::-1] if transposed else shape, target
            )
        elif name not in parts and not _ACTIVATIONS.search(name):
            if PACKED.search(name):
                raise InvalidInput(f"{name} belongs to no quantized weight")
            if name.endswith(".weight") and info.dtype not in WEIGHT_DTYPES:
                raise InvalidInput(f"{name} is {info.dtype}, which its config does not explain")
            floating = info.dtype.is_floating_point and info.dtype.itemsize > 1
            dtype = others if others is not None and floating else info.dtype
            tensors[name] = TensorInfo(info.file, info.shape, dtype)
    return tensors


def _mapped(path: Path, headers: Mapping[str, TensorInfo], name: str) -> Tensor:
    with safe_open(path / headers[name].file, framework="pt") as shard:
        tensor: Tensor = shard.get_tensor(name)
        return tensor
