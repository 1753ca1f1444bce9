"""A GGUF file, or the parts of a split one, read as a checkpoint: each tensor is dequantized when it is read.

Config and tokenizer, which other checkpoints have as files, are written into a temporary folder; nothing is written
beside the file.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import dispatch_model, init_empty_weights
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from fbn_prune.errors import InvalidInput
from fbn_prune.model.family import as_config
from fbn_prune.model.gguf_config import GgufModel, model_of
from fbn_prune.model.gguf_header import GgufHeader, GgufTensor, read_header
from fbn_prune.model.gguf_parts import parts_of
from fbn_prune.model.gguf_weights import (
    FLOATS,
    Source,
    dequantized,
    dtype_of,
    package_gguf,
    require_dequantization,
    sources_of,
)
from fbn_prune.model.headers import one_line
from fbn_prune.model.shards import TensorInfo


@dataclass(frozen=True, eq=False)
class GgufFile:
    """An open GGUF file; :func:`open_gguf` makes one.

    Attributes
    ----------
    path
        The file, or the first part of a split one.
    parts
        All its files.
    model
        The model that it holds.
    tensors
        Shape and dtype of each parameter as it is read; the file is `path`.
    types
        Names of the quantization types of its tensors, the most frequent first.
    quantized
        Number of tensors that are quantized.
    sources
        Where the values of each parameter come from.
    holder
        Removes `folder` when nothing refers to it any more.
    """

    path: Path
    parts: tuple[Path, ...]
    model: GgufModel
    tensors: Mapping[str, TensorInfo]
    types: tuple[str, ...]
    quantized: int
    sources: Mapping[str, Source]
    holder: tempfile.TemporaryDirectory[str]

    @property
    def folder(self) -> Path:
        """The temporary folder with config and tokenizer; it is removed with this object."""
        return Path(self.holder.name)

    def tensor(self, name: str) -> Tensor:
        """Return a parameter's values, rounded to its dtype in `tensors`.

        Raises
        ------
        FbnPruneError
            A value is not finite, or too large for the dtype.
        """
        source, dtype = self.sources[name], self.tensors[name].dtype
        values = dequantized(source.tensor, dtype, source.offset)
        if source.transposed:
            values = values.T.contiguous()
        return values if source.order is None else source.order(values)


def open_gguf(path: Path, dtype: torch.dtype | None = None) -> GgufFile:
    """Check the header of a GGUF file and write its config and tokenizer into a temporary folder.

    Parameters
    ----------
    path
        The file, or the first part of a split one.
    dtype
        The dtype of all weights. By default that of the file's matrices if they are not quantized, otherwise float16,
        or bfloat16 for models that float16 is too narrow for.

    Raises
    ------
    InvalidInput
        The file is incomplete, a part is missing, or its architecture, a quantization type or its tokenizer cannot be
        read.
    """
    package = package_gguf()
    sizes = {int(kind): size for kind, size in package.GGML_QUANT_SIZES.items()}
    parts, header = _read_parts(path, sizes)
    require_dequantization(path, header)

    def divisors(name: str) -> Tensor:
        return dequantized(header.tensors[name], torch.float32, 0)

    model = model_of(path, header, divisors)
    sources = sources_of(path, header, model, package)
    dtype = dtype or dtype_of(header, model)
    config = {**model.config, "dtype": str(dtype).removeprefix("torch.")}
    tensors = {name: TensorInfo("", shape, dtype) for name, (_, shape) in sources.items()}
    kinds = [package.GGMLQuantizationType(one.kind).name for one in header.tensors.values()]
    plain = {package.GGMLQuantizationType(kind).name for kind in FLOATS}
    return GgufFile(
        path,
        parts,
        GgufModel(model.arch, model.family, model.layout, config),
        tensors,
        tuple(sorted(set(kinds), key=lambda kind: (-kinds.count(kind), kind))),
        sum(kind not in plain for kind in kinds),
        {name: source for name, (source, _) in sources.items()},
        _companions(path, header.metadata, config),
    )


def load_model(
    file: GgufFile,
    read: Callable[[str], Tensor],
    device: torch.device,
    dtype: torch.dtype,
    device_map: Mapping[str, str] | None = None,
) -> PreTrainedModel:
    """Load the model of a GGUF file in evaluation mode, one tensor after another.

    Parameters
    ----------
    file
        The file.
    read
        Returns a parameter in the dtype of the file.
    device, dtype, device_map
        As for :meth:`fbn_prune.model.checkpoint.Checkpoint.load_model`.
    """
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            as_config(file.model.config), dtype=dtype, trust_remote_code=False
        )
    if device.type == "meta":
        return model.eval()
    places = dict(device_map or {"": str(device)})
    for name in file.tensors:
        holders = [place for place in places if place == "" or f"{name}.".startswith(f"{place}.")]
        place = places[max(holders, key=len)]
        module, _, attribute = name.rpartition(".")
        value = nn.Parameter(read(name).to(place, dtype))
        setattr(model.get_submodule(module), attribute, value)
    model.tie_weights()
    model.config.name_or_path = str(file.path)
    model.generation_config = GenerationConfig.from_pretrained(file.folder)
    if device_map is not None:
        dispatch_model(model, dict(device_map))
    return model.eval()


# The files


def _read_parts(
    path: Path, sizes: Mapping[int, tuple[int, int]]
) -> tuple[tuple[Path, ...], GgufHeader]:
    """All files of a model, and its header with the tensors of all of them."""
    parts = parts_of(path)
    for part in parts:
        if not part.is_file():
            raise InvalidInput(f"{part} is missing: the model is split into {len(parts)} files")
    headers = [read_header(part, sizes) for part in parts]
    count = headers[0].metadata.get("split.count", 1)
    if count not in (0, 1, len(parts)):
        raise InvalidInput(
            f"{path} is one of {count} parts of a split file; give the first with its name as llama.cpp wrote it "
            f"(NAME-00001-of-{count:0>5}.gguf), and all parts beside it"
        )
    tensors: dict[str, GgufTensor] = {}
    for part, header in zip(parts, headers, strict=True):
        if twice := tensors.keys() & header.tensors.keys():
            raise InvalidInput(f"{part} has {min(twice)}, which another part has too")
        tensors |= header.tensors
    return tuple(parts), GgufHeader(headers[0].metadata, tensors)


def _companions(
    path: Path, metadata: Mapping[str, Any], config: Mapping[str, Any]
) -> tempfile.TemporaryDirectory[str]:
    """Write config, generation config, tokenizer and licence of a file into a temporary folder."""
    holder = tempfile.TemporaryDirectory(prefix="fbn-prune-gguf-")
    folder = Path(holder.name)
    with tempfile.TemporaryDirectory(prefix="fbn-prune-gguf-") as alone:
        link = Path(alone, "model.gguf")  # no tokenizer file beside the model has a say
        link.symlink_to(path.resolve())
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(
                alone, gguf_file=link.name, local_files_only=True
            )
            tokenizer.save_pretrained(folder)
            _drop_foreign_tokens(folder / "tokenizer.json", metadata["tokenizer.ggml.tokens"])
        except Exception as error:  # the tokenizers library raises bare Exceptions
            raise InvalidInput(
                f"{path}: its tokenizer cannot be read: {one_line(error)}"
            ) from error
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only", "name_or_path"):
        settings.pop(key, None)
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "config.json", config)
    GenerationConfig.from_model_config(as_config(config)).save_pretrained(folder)
    if isinstance(name := metadata.get("general.license"), str):
        front = yaml.safe_dump({"license": name})
        (folder / "README.md").write_text(f"---\n{front}---\n", encoding="utf-8")
    return holder


def _drop_foreign_tokens(path: Path, count: int) -> None:
    """Drop the special tokens that transformers adds by default, which the model has no embedding for."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content["added_tokens"] = [one for one in content["added_tokens"] if one["id"] < count]
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
