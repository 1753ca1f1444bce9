"""A small file that lists the neurons kept in each layer.

A pruned checkpoint has it beside its weights. Together with the dense model it describes the cut except for the new
output weights. The safetensors file holds one bit for each neuron of a layer (eight in a byte, the first neuron in the
highest bit) and, in its metadata, the layers' widths.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fbn_prune.data.text_files import require_readable
from fbn_prune.errors import InvalidInput
from fbn_prune.model.headers import one_line
from fbn_prune.model.shards import save_tensors

KEPT_FILE = "kept_neurons.safetensors"

_METADATA_KEY = "fbn_prune.kept_neurons"
_AGAIN = "prune again, or take the file from the run's output"
_FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class KeptNeurons:
    """The neurons kept in each layer.

    Attributes
    ----------
    widths
        Neurons of each layer of the dense model.
    kept
        For each layer int64 [n > 0]: the neurons that are kept, ascending.

    Raises
    ------
    InvalidInput
        The two disagree, or a layer's neurons are not ascending.
    """

    widths: tuple[int, ...]
    kept: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        if len(self.kept) != len(self.widths):
            raise InvalidInput(f"{len(self.kept)} sets of neurons for {len(self.widths)} layers")
        for layer, (kept, width) in enumerate(zip(self.kept, self.widths, strict=True)):
            if kept.dtype != torch.int64 or kept.ndim != 1 or not len(kept):
                raise InvalidInput(
                    f"layer {layer}: kept neurons must be int64 [n > 0], found {kept.dtype} {list(kept.shape)}"
                )
            if kept[0] < 0 or kept[-1] >= width or bool((kept[1:] <= kept[:-1]).any()):
                raise InvalidInput(f"layer {layer}: kept neurons must ascend and be below {width}")

    @classmethod
    def from_masks(cls, masks: Sequence[Tensor]) -> KeptNeurons:
        """Make the object from one bool mask [neurons] for each layer, true for kept neurons."""
        return cls(
            tuple(len(mask) for mask in masks),
            tuple(torch.nonzero(mask).flatten() for mask in masks),
        )

    @property
    def count(self) -> int:
        """Neurons kept in all layers together."""
        return sum(len(kept) for kept in self.kept)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors in the file."""
        return sum(-(-width // 8) for width in self.widths)

    def save(self, path: Path) -> None:
        """Write the file; equal objects give equal bytes."""
        tensors = {}
        for layer, (kept, width) in enumerate(zip(self.kept, self.widths, strict=True)):
            mask = np.zeros(width, dtype=bool)
            mask[kept.numpy()] = True
            tensors[f"layers.{layer}.kept"] = torch.from_numpy(np.packbits(mask))
        content = {"format": _FORMAT_VERSION, "widths": list(self.widths)}
        save_tensors(tensors, path, {_METADATA_KEY: json.dumps(content, sort_keys=True)})

    @classmethod
    def load(cls, path: Path) -> KeptNeurons:
        """Read a file that :meth:`save` wrote.

        Raises
        ------
        InvalidInput
            The file is missing, damaged, inconsistent, or of another kind or version.
        """
        if not path.is_file():
            raise InvalidInput(f"{path}: no such file; prune again to write it beside the weights")
        require_readable(path)
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = (file.metadata() or {}).get(_METADATA_KEY, "null")
                packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            content = json.loads(metadata)
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise InvalidInput(f"{path}: damaged ({one_line(error)}); {_AGAIN}") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT_VERSION:
            raise InvalidInput(
                f"{path}: not a file of kept neurons, or of another version; {_AGAIN}"
            )
        widths = content.get("widths")
        if not isinstance(widths, list) or any(type(one) is not int or one < 1 for one in widths):
            raise InvalidInput(f"{path}: its header lacks the layers' widths; {_AGAIN}")
        masks = []
        for layer, width in enumerate(widths):
            bits = packed.get(f"layers.{layer}.kept")
            if bits is None or bits.dtype != np.uint8 or bits.shape != (-(-width // 8),):
                raise InvalidInput(
                    f"{path}: layer {layer} is missing or not {width} bits; {_AGAIN}"
                )
            masks.append(torch.from_numpy(np.unpackbits(bits, count=width).astype(bool)))
        try:
            return cls.from_masks(masks)
        except InvalidInput as error:
            raise InvalidInput(f"{path}: {error}; {_AGAIN}") from error
