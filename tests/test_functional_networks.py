"""The artifact answers questions on membership, comes back as it was, and refuses damage in one line."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fbn_prune.errors import InvalidInput
from fbn_prune.networks.functional_networks import METADATA_KEY, FunctionalNetworks


def networks(**changes: Any) -> FunctionalNetworks:
    """Two networks over layers of 3 and 2 neurons."""
    maps = torch.tensor([[2.0, -3.5, 0.1, 0.0, 1.9], [0.0, 0.0, 0.0, -2.5, 3.0]])
    parts: dict[str, Any] = {
        "maps": maps,
        "widths": [3, 2],
        "mean": torch.arange(5.0),
        "std": torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0]),
        "explained_variance": torch.tensor([0.2, 0.1], dtype=torch.float64),
        "engagement": torch.tensor([1.5, 0.7], dtype=torch.float64),
        "header": {"scope": "global", "seed": 0, "contexts": [["a"], ["ü"]], "tokens": 512},
    }
    return FunctionalNetworks(**{**parts, **changes})


def same(a: FunctionalNetworks, b: FunctionalNetworks) -> bool:
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a)]
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) else x == y
        for x, y in pairs
    )


def rewrite(
    path: Path, metadata: dict[str, str] | None = None, **tensors: torch.Tensor | None
) -> None:
    """Change metadata or tensors (None: drop) of a saved artifact."""
    saved = networks()
    saved.save(path)
    kept = {k: v for k, v in {**load_file(path), **tensors}.items() if v is not None}
    content = {"format": 1, "widths": saved.widths, "header": saved.header}
    save_file(kept, path, metadata=metadata or {METADATA_KEY: json.dumps(content)})


def refusal(path: Path) -> str:
    with pytest.raises(InvalidInput) as caught:
        FunctionalNetworks.load(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_members_have_a_z_score_of_2_or_more_either_way_and_hubs_of_3() -> None:
    assert networks().members(0).tolist() == [True, True, False, False, False]
    assert networks().members(0, z=1.9).tolist() == [True, True, False, False, True]
    assert networks().hubs(0).tolist() == [False, True, False, False, False]
    assert networks().hubs(1).tolist() == [False, False, False, False, True]


def test_layers_are_side_by_side_and_a_network_spans_those_that_hold_its_hubs() -> None:
    assert [networks().layer_slice(i) for i in range(2)] == [slice(0, 3), slice(3, 5)]
    assert networks().members_by_layer(0) == [2, 0]
    assert networks().members_by_layer(1) == [0, 2]
    assert networks().layers_spanned(0) == [0]
    assert networks().layers_spanned(1, z=0.0) == [0, 1]


def test_union_holds_the_members_of_any_of_the_networks() -> None:
    assert networks().union([0, 1]).tolist() == [True, True, False, True, True]
    assert networks().union([1]).tolist() == networks().members(1).tolist()
    assert not networks().union([]).any()


@pytest.mark.parametrize("index", [-1, 2])
def test_a_network_or_layer_that_is_not_there_is_refused(index: int) -> None:
    with pytest.raises(InvalidInput, match=f"no network {index}: there are 2"):
        networks().members(index)
    with pytest.raises(InvalidInput, match=f"no layer {index}: there are 2"):
        networks().layer_slice(index)


@pytest.mark.parametrize("energy", [None, torch.tensor([3.0, 4.0], dtype=torch.float64)])
def test_what_is_saved_comes_back(tmp_path: Path, energy: torch.Tensor | None) -> None:
    before = networks(energy=energy)
    before.save(tmp_path / "networks.safetensors")
    assert same(before, FunctionalNetworks.load(tmp_path / "networks.safetensors"))


def test_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    header = networks().header
    networks().save(tmp_path / "a")
    networks(header=dict(reversed(header.items()))).save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_save_replaces_the_file_whole_and_a_failed_one_leaves_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "networks.safetensors"
    networks(widths=[2, 3]).save(path)
    networks().save(path)
    assert FunctionalNetworks.load(path).widths == [3, 2], "the new one replaces it whole"

    def full(file: Path, data: bytes) -> int:
        with file.open("wb") as half:
            half.write(data[: len(data) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        networks(widths=[2, 3]).save(path)
    assert FunctionalNetworks.load(path).widths == [3, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["networks.safetensors"]


@pytest.mark.parametrize("header", [{"x": float("nan")}, {"x": Path()}])
def test_a_header_that_json_cannot_hold_is_refused(tmp_path: Path, header: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="header is not plain JSON"):
        networks(header=header).save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_what_is_no_file_of_networks_is_refused(tmp_path: Path) -> None:
    assert re.search("nowhere: no such file.*discover", refusal(tmp_path / "nowhere"))
    save_file({"weight": torch.ones(2)}, tmp_path / "model")
    assert "not one of functional networks" in refusal(tmp_path / "model")
    networks().save(tmp_path / "half")
    whole = (tmp_path / "half").read_bytes()
    for keep in (0, 7, 100, -1):
        (tmp_path / "half").write_bytes(whole[:keep])
        assert "half: damaged" in refusal(tmp_path / "half")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "format version None"),
        ('{"format": 2}', "format version 2, but this fbn-prune reads version 1"),
        ('{"format": 1, "widths": [3, 2]}', "the widths or the header are missing"),
        ('{"format": 1, "widths": [3, 3], "header": {}}', "6 neurons"),
        (
            '{"format": 1, "widths": [6, -1], "header": {}}',
            "not one number of neurons for each layer",
        ),
        (
            '{"format": 1, "widths": ["3", 2], "header": {}}',
            "not one number of neurons for each layer",
        ),
    ],
)
def test_damaged_metadata_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    rewrite(tmp_path / "a", metadata={METADATA_KEY: text})
    assert complaint in refusal(tmp_path / "a")


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ({"mean": torch.ones(4)}, "mean is torch.float32 (4,), not torch.float32 (5,)"),
        ({"std": torch.ones(5).half()}, "std is torch.float16"),
        ({"maps": torch.ones(5)}, "maps have shape (5,)"),
        ({"maps": torch.ones(0, 5)}, "maps have shape (0, 5)"),
        ({"maps": torch.full((2, 5), float("nan"))}, "maps holds NaN"),
        ({"engagement": torch.ones(3, dtype=torch.float64)}, "engagement is"),
        ({"engagement": None}, "engagement"),
        ({"stowaway": torch.ones(1)}, "stowaway"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    tmp_path: Path, tensors: dict[str, Any], complaint: str
) -> None:
    rewrite(tmp_path / "a", **tensors)
    assert complaint in refusal(tmp_path / "a")
