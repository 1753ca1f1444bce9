"""A quantised checkpoint, seen as the plain one that it stands for."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from fbn_prune.errors import InvalidInput
from fbn_prune.model.checkpoint import PACKED, WEIGHT_DTYPES, Checkpoint
from fbn_prune.model.families import family_of
from fbn_prune.model.family import Family
from fbn_prune.model.folder import find_folder, read_config
from fbn_prune.model.quantization import CONFIG_KEYS, known_method, quantization_of
from fbn_prune.model.quantized_formats import stored_weights
from fbn_prune.model.quantized_values import Stored, plain, rounded
from fbn_prune.model.shards import TensorInfo, read_headers
from fbn_prune.model.streaming import check_tensors

PLAIN_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
"""Types that weights are dequantised to, by their names in config.json."""

_ACTIVATIONS = re.compile(
    r"\.((input|output|act|activation|prob|kv|[qkv])_(global_)?(scale|zero_point)(_inv)?)$"
)
"""Ends of the names of what quantises activations and the key-value cache: no weights."""


@dataclass(frozen=True, eq=False)
class QuantizedCheckpoint(Checkpoint):
    """A checkpoint whose `config` and `tensors` are those that it has when plain; made by `open_quantized`.

    Its tensors are computed when they are asked for. transformers does not load it: write it first.

    Attributes
    ----------
    method : how it was quantised.
    stored : the quantised weights by their plain names.
    stored_tensors : the headers of the files.
    transposed : its quantised matrices lie the other way round than the plain ones.
    """

    method: str = ""
    stored: Mapping[str, Stored] = field(default_factory=dict)
    stored_tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    transposed: bool = False

    def tensor(self, name: str) -> Tensor:
        """One tensor in its plain dtype; a stored one is mapped from its file where nothing is to be computed.

        Raises
        ------
        FbnPruneError
            A value is not finite, or too large for the dtype.
        """
        dtype = self.tensors[name].dtype
        if (stored := self.stored.get(name)) is not None:
            values = plain(name, stored, self._stored_tensor, dtype)
            return values.T.contiguous() if self.transposed else values
        tensor = self._stored_tensor(name)
        return tensor if tensor.dtype == dtype else rounded(name, tensor, dtype)

    def read(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """One tensor in another place or type."""
        return self.tensor(name).to(device, dtype)

    def load_model(
        self,
        device: str | torch.device,
        dtype: torch.dtype,
        device_map: Mapping[str, str] | None = None,
    ) -> PreTrainedModel:
        """Refuses: what lies in the folder is not what this stands for."""
        raise InvalidInput(f"{self.path} is quantized ({self.method}): dequantize it first")

    def _stored_tensor(self, name: str) -> Tensor:
        return _mapped(self.path, self.stored_tensors, name)


def open_quantized(
    path_or_hub_id: str | Path, dtype: torch.dtype | None = None
) -> QuantizedCheckpoint:
    """Find a quantised checkpoint and check it, reading headers, the tokenizer and what says how weights are stored.

    Parameters
    ----------
    path_or_hub_id : a folder, or a Hub id whose files are downloaded.
    dtype : of all floating-point tensors. By default quantised weights get the type that the config names (bfloat16 if
        that is none of `PLAIN_DTYPES`), and the others keep theirs.

    Raises
    ------
    InvalidInput
        It is not quantised, or in a way that cannot be undone; or what `Checkpoint.open` refuses.
    """
    path, hub_id = find_folder(path_or_hub_id, _plain_family)
    config = read_config(path)
    family = _plain_family(config)
    quantization = quantization_of(config)
    method = known_method(quantization)
    headers = read_headers(path)
    target = dtype or PLAIN_DTYPES.get(_named_dtype(config), torch.bfloat16)
    try:
        stored = stored_weights(headers, quantization, lambda name: _mapped(path, headers, name))
        # bitsandbytes turns the matrices of Conv1D round, and says so nowhere.
        transposed = method == "bitsandbytes" and family.is_conv1d
        tensors = _plain_tensors(headers, stored, target, dtype, transposed)
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from error
    checkpoint = QuantizedCheckpoint(
        path,
        plain_config(config, target),
        family,
        tensors,
        hub_id,
        method=method,
        stored=stored,
        stored_tensors=headers,
        transposed=transposed,
    )
    checkpoint.check()
    check_tensors(checkpoint)
    return checkpoint


def plain_config(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The `config.json` object of the plain checkpoint, whose weights are of that type."""
    result = copy.deepcopy({key: value for key, value in config.items() if key not in CONFIG_KEYS})
    result.pop("auto_map", None)  # names code files that are not taken along
    key = "torch_dtype" if "torch_dtype" in result and "dtype" not in result else "dtype"
    return result | {key: str(dtype).removeprefix("torch.")}


def _plain_family(config: Mapping[str, Any]) -> Family:
    """The family of the plain model, if the quantised one's method can be undone."""
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
    """The plain checkpoint's headers, in the order of the files; refuses what is quantised and in no weight's parts."""
    plain_names = {weight.weight: name for name, weight in stored.items()}
    parts = {part for weight in stored.values() for part in weight.parts}
    tensors: dict[str, TensorInfo] = {}
    for name, info in headers.items():
        if name in plain_names:
            plain_name = plain_names[name]
            shape = stored[plain_name].shape
            if plain_name in headers and plain_name != name:
                raise InvalidInput(f"{name} and {plain_name} are both there")
            tensors[plain_name] = TensorInfo(
                info.file, shape[::-1] if transposed else shape, target
            )
        elif name not in parts and not _ACTIVATIONS.search(name):
            if PACKED.search(name):
                raise InvalidInput(f"{name} belongs to no quantized weight")
            if name.endswith(".weight") and info.dtype not in WEIGHT_DTYPES:
                raise InvalidInput(
                    f"{name} is stored as {info.dtype}, which its config does not explain"
                )
            floating = info.dtype.is_floating_point and info.dtype.itemsize > 1
            dtype = others if others is not None and floating else info.dtype
            tensors[name] = TensorInfo(info.file, info.shape, dtype)
    return tensors


def _mapped(path: Path, headers: Mapping[str, TensorInfo], name: str) -> Tensor:
    with safe_open(path / headers[name].file, framework="pt") as shard:
        tensor: Tensor = shard.get_tensor(name)
        return tensor
