"""The artifact: functional networks of one model, found once, kept in one file.

A functional network is a z-scored map over the neurons of all layers (arXiv 2502.20408). The file is
safetensors: the tensors, and under one metadata key a JSON object with the layers' widths and a header
of facts (which model, which calibration text, how the search went). Same content, same bytes.
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
    """k networks over the N = sum(widths) MLP neurons of a model; checked when made.

    Attributes
    ----------
    maps
        [k, N] float32, layers side by side; z-scored over all neurons, or, for layer-wise networks,
        over their own layer and 0 outside it.
    widths
        Neurons of each layer.
    mean, std
        [N] float32; of the activations the networks were found on. A dead neuron has std 0.
    explained_variance
        [k] float64 in [0, 1]; share of the standardised activations' variance.
    engagement
        [k] float64; mean square of each time course.
    energy
        [k] float64; output energy, or None where it was not computed.
    connectivity
        [k, k] float64; correlation of every two time courses, or None where it was not computed.
    header
        JSON facts: model and calibration fingerprints, tokens, seed, scope, versions, convergence,
        top contexts and tokens by network, recurrence.

    Raises
    ------
    InvalidInput
        If shapes, dtypes or values do not fit together; from the methods, if there is no such network or layer.
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
        """Refuse what no method could work on."""
        if not self.widths or any(type(width) is not int or width < 0 for width in self.widths):
            raise InvalidInput(f"widths {self.widths} are not one size for each layer")
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
        """The columns of a layer's neurons among all N."""
        if not 0 <= layer < len(self.widths):
            raise InvalidInput(f"no layer {layer}: there are {len(self.widths)}, counted from 0")
        start = sum(self.widths[:layer])
        return slice(start, start + self.widths[layer])

    def by_layer(self, values: Tensor) -> list[Tensor]:
        """Split values over all neurons [..., N] into one tensor [..., neurons] for each layer."""
        return list(torch.split(values, self.widths, dim=-1))

    def members(self, network: int, z: float = MEMBER_Z) -> Tensor:
        """[N] bool: neurons with abs(z-score) of at least ``z`` in a network."""
        return self._map(network).abs() >= z

    def hubs(self, network: int) -> Tensor:
        """[N] bool: neurons with abs(z-score) of at least 3 in a network."""
        return self.members(network, HUB_Z)

    def members_by_layer(self, network: int, z: float = MEMBER_Z) -> list[int]:
        """The number of members that a network has in each layer."""
        return [int(part.sum()) for part in self.by_layer(self.members(network, z))]

    def layers_spanned(self, network: int, z: float = HUB_Z) -> list[int]:
        """Layers with at least one neuron whose abs(z-score) in a network is at least ``z``; hubs by default."""
        return [layer for layer, n in enumerate(self.members_by_layer(network, z)) if n > 0]

    def union(self, networks: Sequence[int], z: float = MEMBER_Z) -> Tensor:
        """[N] bool: neurons that are members of at least one of the ``networks``."""
        mask = torch.zeros(self.maps.shape[1], dtype=torch.bool, device=self.maps.device)
        for network in networks:
            mask |= self.members(network, z)
        return mask

    def save(self, path: str | Path) -> None:
        """Write the file whole or not at all. Same content, same bytes.

        Raises
        ------
        InvalidInput
            If the header is not plain JSON (strings, finite numbers, lists, dicts by string).
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
        """What :meth:`save` writes.

        Raises
        ------
        InvalidInput
            As there.
        """
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
        """What :meth:`to_bytes` gave, on the CPU."""
        tensors: dict[str, Any] = load(data)  # checks the header
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return cls(**tensors, **_described(header["__metadata__"][METADATA_KEY]))

    @classmethod
    def load(cls, path: str | Path) -> FunctionalNetworks:
        """Read what `save` wrote, on the CPU.

        Raises
        ------
        InvalidInput
            If the file is missing, damaged, of another kind or version, or does not fit together.
        """
        if not Path(path).is_file():
            raise InvalidInput(
                f"{path}: no such file; `fbn-prune discover` or a run with --report-networks writes it"
            )
        try:
            with safe_open(path, framework="pt") as file:
                metadata = (file.metadata() or {}).get(METADATA_KEY)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InvalidInput(
                f"{path}: damaged, or no safetensors file ({error}); discover the networks again"
            ) from error
        if metadata is None:
            raise InvalidInput(f"{path}: a safetensors file, but not one of functional networks")
        try:
            return cls(**tensors, **_described(metadata))
        except InvalidInput as error:
            raise InvalidInput(f"{path}: {error}") from error
        except TypeError as error:
            raise InvalidInput(f"{path}: holds {sorted(tensors)}: {error}") from error

    def _map(self, network: int) -> Tensor:
        if not 0 <= network < len(self.maps):
            raise InvalidInput(f"no network {network}: there are {len(self.maps)}, counted from 0")
        return self.maps[network]


def _described(metadata: str) -> dict[str, Any]:
    """Widths and header from the JSON text of the file."""
    try:
        content = json.loads(metadata)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"its header is not JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT_VERSION:
        version = content.get("format") if isinstance(content, dict) else None
        raise InvalidInput(
            f"format version {version}, but this fbn-prune reads {FORMAT_VERSION}; discover again"
        )
    widths, header = content.get("widths"), content.get("header")
    if not isinstance(widths, list) or not isinstance(header, dict):
        raise InvalidInput("its header lacks widths or facts")
    return {"widths": widths, "header": header}
