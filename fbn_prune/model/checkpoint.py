"""A checkpoint on disk, checked by its headers before a run starts.

Only safetensors, GGUF and JSON are read, each tensor on request, so a checkpoint may be larger than the machine's
memory. Nothing writes into the checkpoint's folder.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fbn_prune.errors import InvalidInput, counted
from fbn_prune.model import remedies
from fbn_prune.model.building import (
    building,
    check_companions,
    loadable_folder,
    named,
    quiet_transformers,
    repaired,
    skeleton,
    stock_class,
)
from fbn_prune.model.config_checks import ConfigWarning, oddities
from fbn_prune.model.families import family_of, refusal
from fbn_prune.model.family import Family, as_config
from fbn_prune.model.folder import find_folder, read_config
from fbn_prune.model.found_family import FoundFamily
from fbn_prune.model.gguf_file import GgufFile, load_model, open_gguf
from fbn_prune.model.gguf_parts import find_gguf
from fbn_prune.model.head_groups import layer_facts
from fbn_prune.model.header_checks import check_mlps, refuse_quantized, widths_by_tensors
from fbn_prune.model.headers import one_line
from fbn_prune.model.identities import failed_step
from fbn_prune.model.modeling_ragged import ragged_class
from fbn_prune.model.module_names import by_module_name
from fbn_prune.model.shards import TensorInfo, read_headers
from fbn_prune.model.stored_tensors import disagreement, settle, stored_name, stored_parameters
from fbn_prune.model.tokenizer_checks import ENDLESS, check_tokenizer

SLICE_BYTES = 32 * 2**20
"""A tensor whose dtype or device changes on reading is converted in slices of this size."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A local folder with safetensors, config and tokenizer, or a GGUF file; :meth:`open` checks and returns one.

    Attributes
    ----------
    path
        The folder, or the GGUF file.
    config
        The object in `config.json`.
    family
        The architecture.
    tensors
        File, shape and dtype of each tensor of the model, by name.
    hub_id
        The Hub id that the user gave; None for a local folder.
    trust_remote_code
        Whether the tokenizer may be code from the checkpoint.
    repairs
        What `config` changes in `config.json`, see :func:`fbn_prune.model.building.repaired`.
    gguf
        The open GGUF file; None for a folder.
    unused, own_head
        See :class:`fbn_prune.model.stored_tensors.Settled`.
    """

    path: Path
    config: dict[str, Any]
    family: Family
    tensors: Mapping[str, TensorInfo]
    hub_id: str | None = None
    trust_remote_code: bool = False
    repairs: tuple[str, ...] = ()
    gguf: GgufFile | None = None
    unused: Mapping[str, TensorInfo] = field(default_factory=dict)
    own_head: str | None = None

    @classmethod
    def open(cls, path_or_hub_id: str | Path, *, trust_remote_code: bool = False) -> Checkpoint:
        """Find a checkpoint and check its headers and tokenizer; no weights are read but a head that should be tied.

        Parameters
        ----------
        path_or_hub_id
            A folder, a GGUF file, or a Hub id to download from (never pickles; Python files only with
            `trust_remote_code`).
        trust_remote_code
            Allow the tokenizer to be code from the checkpoint. Model code from a checkpoint never runs.

        Raises
        ------
        InvalidInput
            A file is missing, damaged or not supported, or files contradict each other.

        Warns
        -----
        ConfigWarning
            The configs contain values that the model cannot use or that contradict the tensors, see :meth:`oddities`.
        """
        if (file := find_gguf(path_or_hub_id)) is not None:
            checkpoint = cls.of_gguf(open_gguf(file))
        else:
            path, hub_id = find_folder(path_or_hub_id, family_of, trust_remote_code)
            config, repairs = repaired(read_config(path))
            tensors = read_headers(path)
            family = family_of(config)
            if isinstance(family, FoundFamily):
                with building(path):
                    tensors = by_module_name(skeleton(config, family, torch.float32), tensors)
            config, other = widths_by_tensors(family, config, tensors)
            made = (*repairs, *([] if other is None else [other]))
            checkpoint = cls(path, config, family, tensors, hub_id, trust_remote_code, made)
        checkpoint.check()
        if checkpoint.gguf is None:
            checkpoint = replace(checkpoint, **vars(settle(path, config, family, tensors)))
        if (odd := checkpoint.oddities()) is not None:
            warnings.warn(odd, ConfigWarning, stacklevel=2)
        return checkpoint

    @classmethod
    def of_gguf(cls, gguf: GgufFile) -> Checkpoint:
        """Return the checkpoint that an open GGUF file is."""
        model = gguf.model
        return cls(gguf.path, model.config, model.family, gguf.tensors, gguf=gguf)

    @classmethod
    def of_model(cls, model: PreTrainedModel) -> Checkpoint:
        """Return the headers that a checkpoint of this live model would have; its tensors cannot be read.

        The layers' widths are those of the weights: a model that was cut in memory keeps its old config.

        Raises
        ------
        InvalidInput
            The architecture is not supported.
        """
        config = model.config.to_dict()
        family = family_of(config)
        tensors = {
            name: TensorInfo("", tuple(parameter.shape), parameter.dtype)
            for name, parameter in model.named_parameters()  # tied embeddings once
        }
        path = Path(model.name_or_path or type(model).__name__)  # for messages: nothing is read
        found = family.stored_widths({name: info.shape for name, info in tensors.items()})
        if len(found) == family.num_layers(config) and found != family.widths(config):
            config = family.with_widths(config, found)
        return cls(path, config, family, tensors)

    def check(self) -> None:
        """Check that the headers and the tokenizer agree with the config, and that transformers builds its model.

        Raises
        ------
        InvalidInput
            The weights are quantized, the MLP tensors do not match the config, the config describes no model, or the
            tokenizer is unusable.
        """
        self.check_architecture()
        self.check_weights()
        check_companions(self.path)
        with building(self.path):
            stored_parameters(self.config, self.family)
        vocabulary = self.family.vocab_size(self.config)
        check_tokenizer(self.path, self.folder, self.load_tokenizer, vocabulary)

    def check_architecture(self) -> None:
        """Try out on a tiny random copy what was found of the architecture; a declared one is known to be right.

        Raises
        ------
        InvalidInput
            A step fails; it is named.
        """
        if isinstance(self.family, FoundFamily):
            reason = failed_step(self.family, as_config(self.config))
            if reason is not None:
                raise refusal(self.family.name, reason)

    def check_weights(self) -> None:
        """Check that the weights are plain and that the MLPs are those that the config implies.

        Raises
        ------
        InvalidInput
            They are not; the first offending tensor is named.
        """
        remedies.refuse_ungathered(self.path, self.tensors)
        refuse_quantized(self.path, self.tensors)
        check_mlps(self.path, self.family, self.config, self.tensors)

    def oddities(self) -> str | None:
        """One line on config values that the model cannot use, and on tensors that it does not use; or None."""
        wrong = oddities(self.folder, self.config, self.family.vocab_size(self.config))
        lines = [*self.repairs, *([] if wrong is None else [wrong])]
        layers = self.family.num_layers(self.config)
        lines += disagreement(self.own_head, self.unused, self.family, layers)
        return "; ".join(lines) or None

    @property
    def folder(self) -> Path:
        """The folder with the config and the tokenizer; for a GGUF file a temporary one."""
        return self.path if self.gguf is None else self.gguf.folder

    @property
    def weight_files(self) -> list[Path]:
        """The files with the weights; none for the headers of a live model."""
        if self.gguf is not None:
            return list(self.gguf.parts)
        return [self.path / file for file in sorted({i.file for i in self.tensors.values()} - {""})]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    @property
    def total_parameters(self) -> int:
        """Number of stored elements; tied embeddings count once."""
        return sum(info.parameters for info in self.tensors.values())

    @property
    def total_bytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def storage_dtype(self) -> torch.dtype:
        """The most frequent dtype of the MLPs' output weights; pruning rounds the new weights to it.

        Where none is stored apart, as in a mixture of experts, that of most numbers in the checkpoint.
        """
        counts = Counter(
            info.dtype
            for name, info in self.tensors.items()
            if (location := self.family.locate(name))
            and location.projection is self.family.output
            and location.part == "weight"
        )
        for info in self.tensors.values() if not counts else ():
            counts[info.dtype] += info.parameters
        return counts.most_common(1)[0][0]

    def stored_name(self, parameter: str) -> str | None:
        """Return the checkpoint's name for a parameter of the live model; None if the checkpoint does not have it."""
        return stored_name(self.family, self.tensors, parameter)

    def saved_name(self, name: str) -> str:
        """Return the name that a tensor, or a bias that is added to one, has in a written checkpoint."""
        if name in self.tensors or name in self.unused:
            info = self.tensors[name] if name in self.tensors else self.unused[name]
            return info.saved_as or name
        weight = self.tensors.get(f"{name.removesuffix('bias')}weight")
        if weight is None or weight.saved_as is None:
            return name
        return f"{weight.saved_as.removesuffix('weight')}bias"

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def tensor(self, name: str) -> Tensor:
        """Return a tensor mapped from its file: the data is read on first use and must not be modified."""
        if self.gguf is not None:
            return self.gguf.tensor(name)
        info = self.tensors[name] if name in self.tensors else self.unused[name]
        with safe_open(self.path / info.file, framework="pt") as shard:
            tensor: Tensor = shard.get_tensor(info.stored or name)
            return tensor

    def read(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return a tensor on `device` in `dtype`, converted in slices of rows so that memory holds only one copy."""
        info = self.tensors[name]
        if self.gguf is not None:
            return self.gguf.tensor(name).to(device, dtype)
        result = torch.empty(info.shape, dtype=dtype, device=device)
        if not info.shape:
            return result.copy_(self.tensor(name))
        rows = max(1, SLICE_BYTES * info.shape[0] // max(info.nbytes, 1))
        for start in range(0, info.shape[0], rows):
            with safe_open(self.path / info.file, framework="pt") as shard:
                stored = shard.get_slice(info.stored or name)
                result[start : start + rows] = stored[start : start + rows]
        return result

    def load_model(
        self,
        device: str | torch.device,
        dtype: torch.dtype,
        device_map: Mapping[str, str] | None = None,
    ) -> PreTrainedModel:
        """Load the model in evaluation mode, without a key-value cache; code from the folder never runs.

        Parameters
        ----------
        device
            The model's device. "meta" runs the same loading code without reading weights.
        dtype
            The dtype of the weights.
        device_map
            The device of each module, see :func:`fbn_prune.model.placement.device_map`; accelerate's hooks then move
            the modules' inputs between devices.

        Raises
        ------
        InvalidInput
            A tensor of the model is missing from the checkpoint, or has another shape there.
        """
        if self.gguf is not None:
            model = load_model(self.gguf, self.tensor, torch.device(device), dtype, device_map)
            model.config.use_cache = False
            return model
        model_class: Any = stock_class(as_config(self.config))
        extra: dict[str, Any] = {}
        places: Any = "meta" if torch.device(device).type == "meta" else None
        if device_map is not None:
            places = dict(device_map)
        if facts := layer_facts(self.family, self.config):
            extra["config"] = as_config(self.config | facts)
            model_class = ragged_class(stock_class(extra["config"]))
        with (
            quiet_transformers(),
            building(self.path),
            loadable_folder(self.path, self.config) as folder,
        ):
            loaded: Any = model_class.from_pretrained(
                folder,
                **extra,
                dtype=dtype,
                device_map=places,
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # refused below, with the tensor's name
                output_loading_info=True,
            )
        model, report = loaded
        named(model, self.path)
        if missing := sorted(report["missing_keys"]):
            raise InvalidInput(
                f"{self.path}: the checkpoint lacks {counted(len(missing), 'tensor')} of the model, first {missing[0]}"
                f"{remedies.missing_tensor(self.tensors)}"
            )
        if mismatched := sorted(report["mismatched_keys"]):
            name, stored, expected = mismatched[0]
            raise InvalidInput(
                f"{self.path}: {name} has shape {list(stored)}, the model needs {list(expected)}; "
                "take config.json and the weights from one model"
            )
        model.config.use_cache = False
        if device_map is None:
            model.to(device)
        model.eval()
        return model

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer; raise InvalidInput if that fails or needs untrusted code."""
        try:
            # transformers reads config.json for the class of the tokenizer.
            repaired_config = {"config": as_config(self.config)} if self.repairs else {}
            return AutoTokenizer.from_pretrained(
                self.folder,
                trust_remote_code=self.trust_remote_code,
                local_files_only=True,
                **repaired_config,
            )
        except Exception as error:  # the tokenizers library raises bare Exceptions
            if isinstance(error, RecursionError):
                raise InvalidInput(f"{self.path}: {ENDLESS}") from error
            if "custom code" in str(error) and not self.trust_remote_code:
                raise InvalidInput(
                    f"{self.path}: the tokenizer needs code from the checkpoint: allow it with --trust-remote-code"
                ) from error
            raise InvalidInput(
                f"{self.path}: the tokenizer cannot be loaded ({one_line(error)}); "
                "copy its files from the original model"
            ) from error
