"""Claims about structure: what connectivity, driving tokens and recurrence say of networks built for the purpose."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import run_json
from torch import Tensor

from fbn_prune.cli.main import _exit_code
from fbn_prune.errors import InvalidInput
from fbn_prune.networks.cards import network_cards
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.networks.recurrence import (
    connectivity,
    driving_tokens,
    recurrence,
    recurrence_between_starts,
)

WIDTHS = [300, 200]


def sparse_maps(count: int, neurons: int, seed: int) -> Tensor:
    """Heavy-tailed maps, z-scored: most weights near 0, few large."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(count, neurons, generator=generator).pow(3)
    return (maps - maps.mean(1, keepdim=True)) / maps.std(1, correction=0, keepdim=True)


def artifact(maps: Tensor, matrix: Tensor | None = None) -> FunctionalNetworks:
    count, neurons = maps.shape
    return FunctionalNetworks(
        maps=maps,
        widths=WIDTHS,
        mean=torch.zeros(neurons),
        std=torch.ones(neurons),
        explained_variance=torch.full((count,), 0.1, dtype=torch.float64),
        engagement=torch.ones(count, dtype=torch.float64),
        connectivity=matrix,
    )


@given(st.integers(0, 1000), st.integers(2, 6), st.integers(3, 40))
@settings(max_examples=20, deadline=None)
def test_connectivity_is_a_correlation_matrix_that_scale_and_offset_do_not_change(
    seed: int, networks: int, tokens: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    courses = torch.randn(tokens, networks, generator=generator, dtype=torch.float64)
    matrix = connectivity(courses)
    assert torch.equal(matrix.diagonal(), torch.ones(networks, dtype=torch.float64))
    torch.testing.assert_close(matrix, torch.corrcoef(courses.T))
    torch.testing.assert_close(connectivity(courses * 7 - 3), matrix)
    assert torch.linalg.eigvalsh(matrix).min() > -1e-9
    courses[:, 0] = 2.0  # what never changes is connected with nothing
    assert not connectivity(courses)[0, 1:].any()


def test_the_token_that_always_moves_a_network_drives_it() -> None:
    tokens = torch.arange(60) % 6
    generator = torch.Generator().manual_seed(0)
    courses = 0.1 * torch.randn(60, 2, generator=generator)
    courses[tokens == 4, 0] += 3
    courses[tokens == 1, 1] -= 3
    first, second = driving_tokens(courses, tokens, 3)
    assert (first[0]["token"], first[0]["count"]) == (4, 10)
    assert first[0]["activity"] > 1
    assert second[0]["token"] == 1
    assert second[0]["activity"] < -1


def test_a_token_seen_once_or_twice_drives_nothing() -> None:
    tokens = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    courses = torch.tensor([0.0, 0.1, 0.0, 0.1, 9.0, 9.0, -9.0])[:, None]
    assert [entry["token"] for entry in driving_tokens(courses, tokens, 5)[0]] == [0]


def test_planted_maps_come_back_from_every_start_and_noise_does_not() -> None:
    neurons = 4000
    planted = sparse_maps(3, neurons, 0)
    noise = torch.randn(3, neurons, generator=torch.Generator().manual_seed(1))
    mixed = torch.cat([planted, noise]).double()
    mixed -= mixed.mean(1, keepdim=True)
    root = torch.linalg.inv(torch.linalg.cholesky(mixed @ mixed.T / neurons))
    white = (
        root @ mixed
    ).float()  # the first three stay near the planted maps, the rest are any basis of the noise
    result = recurrence_between_starts(white, [slice(0, neurons)], range(1, 6))
    assert set(result) == {"shared_seeds", "correlation_seeds", "iou_seeds"}
    assert result["shared_seeds"][:3] == [1.0, 1.0, 1.0]
    assert min(result["correlation_seeds"][:3]) > 0.95
    assert max(result["shared_seeds"][3:]) < 1.0
    assert all(0 <= value <= 1 for values in result.values() for value in values)


def test_layer_wise_networks_are_looked_for_in_their_own_layer() -> None:
    maps = torch.zeros(4, 4000)
    maps[:2, :2000], maps[2:, 2000:] = sparse_maps(2, 2000, 0), sparse_maps(2, 2000, 1)
    spans = [slice(0, 2000), slice(2000, 4000)]
    assert recurrence_between_starts(maps, spans, [5])["shared_seeds"] == [1.0] * 4


def test_networks_in_another_order_and_of_other_sign_are_the_same_networks() -> None:
    a = sparse_maps(5, 500, 0)
    matrix = connectivity(torch.randn(40, 5, generator=torch.Generator().manual_seed(2)))
    order, signs = torch.tensor([3, 0, 4, 1, 2]), torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0])
    turned = matrix[order][:, order] * signs[:, None] * signs
    found = recurrence(artifact(a, matrix), artifact(a[order] * signs[:, None], turned.double()))
    assert order[found.partner].tolist() == list(range(5))
    assert found.overlap.tolist() == [1.0] * 5
    assert bool(found.recurs.all())
    assert found.connectivity == pytest.approx(1.0)
    assert found.to_json()["same"] == 5


def test_unrelated_networks_do_not_overlap_more_than_chance() -> None:
    a, b = sparse_maps(8, 500, 0), sparse_maps(8, 500, 1)
    found = recurrence(artifact(a), artifact(b))
    assert int(found.recurs.sum()) <= 1
    assert found.to_json()["same"] == 0
    assert found.connectivity is None
    b[4] = a[2]  # one that was kept among changed ones is found
    found = recurrence(artifact(a), artifact(b))
    assert int(found.partner[2]) == 4
    assert bool(found.recurs[2])
    assert found.to_json()["same"] == 1


def test_networks_of_models_of_other_shape_are_refused() -> None:
    a = artifact(sparse_maps(3, 500, 0))
    other = dataclasses.replace(a, widths=[250, 250])
    with pytest.raises(InvalidInput, match="2 x 250"):
        recurrence(a, other)
    with pytest.raises(InvalidInput, match="discover as many"):
        recurrence(a, artifact(sparse_maps(4, 500, 0)))


def test_connectivity_is_kept_in_the_artifact_and_named_on_cards(tmp_path: Path) -> None:
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[0, 2] = matrix[2, 0] = -0.7
    matrix[0, 1] = matrix[1, 0] = 0.2
    artifact(sparse_maps(3, 500, 0), matrix).save(tmp_path / "networks.safetensors")
    loaded = FunctionalNetworks.load(tmp_path / "networks.safetensors")
    assert loaded.connectivity is not None
    assert torch.equal(loaded.connectivity, matrix)
    first = network_cards(loaded)[0]["connected"]
    assert [tie["id"] for tie in first] == [2, 1]
    assert first[0]["correlation"] == -0.7


def test_inspect_compares_artifacts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = sparse_maps(4, 500, 0)
    for name, maps in (("a", a), ("same", a), ("other", sparse_maps(4, 500, 1))):
        artifact(maps).save(tmp_path / name / "networks.safetensors")
    against = ["--against", str(tmp_path / "same"), "--against", str(tmp_path / "other")]
    same, other = run_json(capsys, "inspect", tmp_path / "a", *against)["against"]
    assert (same["same"], other["same"]) == (4, 0)
    assert [entry["partner"] for entry in same["networks"]] == [0, 1, 2, 3]
    assert _exit_code(["inspect", str(tmp_path / "a"), *against]) == 0
    assert "4 of 4 networks overlap more than chance" in " ".join(capsys.readouterr().out.split())


def test_hostile_text_is_shown_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "[red]x[/red]"
    context = {"before": "[/]" * 9, "token": hostile, "after": "[bold]", "activity": 1.0}
    header = {
        "contexts": [[context]],
        "driving_tokens": [[{"token": hostile, "activity": 1.0, "count": 3}]],
    }
    one = dataclasses.replace(artifact(sparse_maps(1, 500, 0)), header=header)
    one.save(tmp_path / "networks.safetensors")
    assert _exit_code(["inspect", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("[red]") >= 1
