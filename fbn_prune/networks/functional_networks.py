"""The artifact: the functional networks of one model, found once and stored in one file.

A functional network is a z-scored map over the neurons of all layers (arXiv 2502.20408). The file is in safetensors
format: it holds the tensors and, under one metadata key, a JSON object with the layers' widths and a header of facts
(the model, the calibration text, the course of the search). Equal content gives equal bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from fbn_prune.data.text_files import require_readable
from fbn_prune.errors import InvalidInput
from fbn_prune.model.shards import packed

MEMBER_Z = 2.0
HUB_Z = 3.0

FORMAT_VERSION = 1
METADATA_KEY = "fbn_prune.functional_networks"
_ON_NEURONS = ("mean", "std")
_ON_NETWORKS = ("explained_variance", "engagement", "energy")


@dataclass(frozen=True, eq=False)
class FunctionalNetworks:
    """k networks over the N = sum(widths) MLP neurons of a model, checked on creation.

    Attributes
    ----------
    maps
        [k, N] float32, layers side by side. Each map is z-scored over all neurons; a layer-wise map is z-scored over
        the neurons of its own layer and 0 elsewhere.
    widths
        Number of neurons of each layer.
    mean, std
        [N] float32, of the activations in which the networks were found. A dead neuron has std 0.
    explained_variance
        [k] float64 in [0, 1]; share of the standardised activations' variance.
    engagement
        [k] float64; mean square of each time course.
    energy
        [k] float64; output energy, or None if not computed.
    connectivity
        [k, k] float64; correlation between the time courses, or None if not computed.
    header
        JSON facts: fingerprints of model and calibration text, tokens, seed, scope, versions, convergence, top
        contexts and tokens of each network, recurrence.

    Raises
    ------
    InvalidInput
        On creation, if shapes, dtypes or values are inconsistent; from the methods, if the network or layer does not
        exist.
    """

    maps: Tensor
    widths: list[int]
    mean: Tensor
    std: Tensor
    explained_variance: Tensor
    engagement: Tensor
    energy: Tensor | None = None
    connectivity: Tensor | None = None
    header: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.widths or any(type(width) is not int or width < 0 for width in self.widths):
            raise InvalidInput(f"widths {self.widths} are not one number of neurons for each layer")
        neurons = sum(self.widths)
        if self.maps.ndim != 2 or self.maps.shape[0] < 1 or self.maps.shape[1] != neurons:
            raise InvalidInput(
                f"maps have shape {tuple(self.maps.shape)}, not [networks, {neurons} neurons]"
            )
        self._check("maps", tuple(self.maps.shape), torch.float32)
        for name in _ON_NEURONS:
            self._check(name, (neurons,), torch.float32)
        for name in _ON_NETWORKS:
            self._check(name, (self.maps.shape[0],), torch.float64)
        self._check("connectivity", (self.maps.shape[0],) * 2, torch.float64)

    def _check(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        tensor: Tensor | None = getattr(self, name)
        if tensor is None:
            return
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise InvalidInput(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {shape}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidInput(f"{name} holds NaN or infinite values")

    def layer_slice(self, layer: int) -> slice:
        """Return the columns of a layer's neurons among all N."""
        if not 0 <= layer < len(self.widths):
            raise InvalidInput(f"no layer {layer}: there are {len(self.widths)}, counted from 0")
        start = sum(self.widths[:layer])
        return slice(start, start + self.widths[layer])

    def by_layer(self, values: Tensor) -> list[Tensor]:
        """Split values over all neurons [..., N] into one tensor [..., neurons] for each layer."""
        return list(torch.split(values, self.widths, dim=-1))

    def members(self, network: int, z: float = MEMBER_Z) -> Tensor:
        """Return a mask, bool [N], of the neurons whose abs(z-score) in a network is at least `z`."""
        return self._map(network).abs() >= z

    def hubs(self, network: int) -> Tensor:
        """Return a mask, bool [N], of the neurons whose abs(z-score) in a network is at least 3."""
        return self.members(network, HUB_Z)

    def members_by_layer(self, network: int, z: float = MEMBER_Z) -> list[int]:
        """Return the number of a network's members in each layer."""
        return [int(part.sum()) for part in self.by_layer(self.members(network, z))]

    def layers_spanned(self, network: int, z: float = HUB_Z) -> list[int]:
        """Return the layers that hold a member of a network at threshold `z`; by default, a hub."""
        return [layer for layer, n in enumerate(self.members_by_layer(network, z)) if n > 0]

    def union(self, networks: Sequence[int], z: float = MEMBER_Z) -> Tensor:
        """Return a mask, bool [N], of the neurons that are members of at least one of `networks`."""
        mask = torch.zeros(self.maps.shape[1], dtype=torch.bool, device=self.maps.device)
        for network in networks:
            mask |= self.members(network, z)
        return mask

    def save(self, path: str | Path) -> None:
        """Write the file atomically.

        Raises
        ------
        InvalidInput
            The header is not plain JSON (strings, finite numbers, lists, dicts with string keys).
        """
        data = self.to_bytes()
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def to_bytes(self) -> bytes:
        """Return the bytes that :meth:`save` writes; raises like it."""
        tensors = {
            name: tensor
            for name in ("maps", *_ON_NEURONS, *_ON_NETWORKS, "connectivity")
            if (tensor := getattr(self, name)) is not None
        }
        content = {"format": FORMAT_VERSION, "widths": self.widths, "header": self.header}
        try:
            metadata = {METADATA_KEY: json.dumps(content, sort_keys=True, allow_nan=False)}
        except (TypeError, ValueError) as error:
            raise InvalidInput(f"header is not plain JSON: {error}") from error
        return packed(tensors, metadata)

    @classmethod
    def from_bytes(cls, data: bytes) -> FunctionalNetworks:
        """Read the bytes of :meth:`to_bytes`, to the CPU."""
        tensors: dict[str, Any] = load(data)  # also checks the header that is read next
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return cls(**tensors, **_described(header["__metadata__"][METADATA_KEY]))

    @classmethod
    def load(cls, path: str | Path) -> FunctionalNetworks:
        """Read a file that :meth:`save` wrote, to the CPU.

        Raises
        ------
        InvalidInput
            The file is missing, damaged, of another kind or version, or inconsistent.
        """
        if not Path(path).is_file():
            raise InvalidInput(
                f"{path}: no such file; `fbn-prune discover` or a run with --report-networks writes it"
            )
        require_readable(Path(path))
        try:
            with safe_open(path, framework="pt") as file:
                metadata = (file.metadata() or {}).get(METADATA_KEY)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InvalidInput(
                f"{path}: damaged, or not a safetensors file ({error}); discover the networks again"
            ) from error
        if metadata is None:
            raise InvalidInput(
                f"{path}: a safetensors file, but not one of functional networks: give a networks.safetensors"
            )
        try:
            return cls(**tensors, **_described(metadata))
        except InvalidInput as error:
            raise InvalidInput(f"{path}: {error}; discover the networks again") from error
        except TypeError as error:
            raise InvalidInput(
                f"{path}: contains {sorted(tensors)}: {error}; discover the networks again"
            ) from error

    def _map(self, network: int) -> Tensor:
        if not 0 <= network < len(self.maps):
            raise InvalidInput(f"no network {network}: there are {len(self.maps)}, counted from 0")
        return self.maps[network]


def _described(metadata: str) -> dict[str, Any]:
    """Widths and header from the file's JSON metadata."""
    try:
        content = json.loads(metadata)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"the metadata is not JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT_VERSION:
        version = content.get("format") if isinstance(content, dict) else None
        raise InvalidInput(
            f"format version {version}, but this fbn-prune reads version {FORMAT_VERSION}; discover again"
        )
    widths, header = content.get("widths"), content.get("header")
    if not isinstance(widths, list) or not isinstance(header, dict):
        raise InvalidInput("the widths or the header are missing")
    return {"widths": widths, "header": header}
