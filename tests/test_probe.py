"""Few features tell labels; the controls describe the same activity in other bases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fbn_prune.api import probe
from fbn_prune.cli.main import _exit_code
from fbn_prune.data.labels import read_labels
from fbn_prune.errors import InvalidInput
from fbn_prune.networks.controls import (
    basis_maps,
    control_bases,
    principal_basis,
    random_rotation,
    temporal_basis,
)
from fbn_prune.networks.probe import choose, halves, pooled
from fbn_prune.networks.probe import probe as probed
from fbn_prune.recipe import build_recipe


def labelled(features: int = 12, texts: int = 80) -> tuple[Any, Any]:
    """Features of which number 3 tells the label almost alone, and 7 what 3 leaves; 5 repeats 3."""
    rng = np.random.default_rng(0)
    labels = np.arange(texts) % 2
    x = rng.normal(size=(texts, features))
    x[:, 3] += 3 * labels
    x[:, 5] = 2 * x[:, 3] + 0.001 * rng.normal(size=texts)
    x[:, 7] += 2 * labels
    return x, labels


def test_the_feature_that_tells_most_is_chosen_and_its_repetition_is_not() -> None:
    x, labels = labelled()
    chosen = choose(x, labels, 3)
    assert chosen[0] in (3, 5)
    assert chosen[1] == 7
    assert len({3, 5} & set(chosen)) == 1


def test_scales_and_constants_do_not_matter() -> None:
    x, labels = labelled()
    constant = np.concatenate([x * np.geomspace(1e-3, 1e3, x.shape[1]), np.ones((80, 2))], 1)
    assert choose(constant, labels, 5) == choose(x, labels, 5)
    assert choose(np.ones((80, 3)), labels, 2) == []


def test_what_is_chosen_on_one_half_is_judged_on_the_other() -> None:
    x, labels = labelled()
    train, test = halves(labels, 0)
    assert not set(train) & set(test)
    assert labels[train].sum() == labels[test].sum() == 20
    found = probed(x, labels, train, test)
    assert found[2].accuracy > 0.85
    noise = np.random.default_rng(1).normal(size=(80, 12))
    assert probed(noise, labels, train, test)[5].accuracy < 0.8


def test_pooling_is_a_mean_or_a_root_mean_square() -> None:
    values = torch.tensor([[3.0], [-4.0], [2.0]])
    assert pooled(values, [2, 1], "mean").flatten().tolist() == [-0.5, 2.0]
    assert pooled(values, [2, 1]).flatten().tolist() == pytest.approx([12.5**0.5, 2.0])


def test_controls_are_bases_of_the_same_space() -> None:
    generator = torch.Generator().manual_seed(0)
    sources = torch.rand(2000, 4, generator=generator).double().log()  # exponential: not normal
    courses = sources @ torch.randn(4, 4, generator=generator).double()
    rotation = random_rotation(4, 0)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(4).double())
    components = courses @ principal_basis(courses)
    moment = components.T @ components
    assert float((moment - moment.diag().diag()).abs().max()) < 1e-6 * float(moment.max())
    found = (courses - courses.mean(0)) @ temporal_basis(courses)
    match = torch.corrcoef(torch.cat([found, sources], 1).T)[:4, 4:].abs()
    assert float(match.amax(1).min()) > 0.95
    maps = torch.randn(4, 50, generator=generator)
    for name, bases in control_bases(courses).items():
        turned = basis_maps(maps, bases[0])
        span = torch.linalg.lstsq(maps.T, turned.T).solution.T @ maps
        torch.testing.assert_close(span, turned, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a", "label": 1}] * 8, "1 labels"),
        ([{"text": "a", "label": 1}, {"text": "a"}], "give a text and a label"),
        ([{"text": "a", "label": 1}] * 8 + [{"text": "b", "label": 2}], "has 1 texts"),
    ],
)
def test_labels_that_cannot_be_used_are_refused(
    rows: list[dict[str, Any]], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InvalidInput, match=message):
        read_labels(path)


def test_a_probe_of_a_model_tells_numbers_from_words(
    tiny: Path, text: Path, tmp_path: Path
) -> None:
    rows = [{"text": f"{i} {i * 7} {i + 13}", "label": "numbers"} for i in range(12)]
    rows += [{"text": "apples and pears " * (1 + i % 3), "label": "words"} for i in range(12)]
    labels = tmp_path / "labels.jsonl"
    labels.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = build_recipe(
        {"model": str(tiny), "calibration": str(text), "tokens": 600, "network_tokens": 300}
        | {"networks": 6, "keep_networks": 1, "context": 32}
    )
    result = probe(recipe, labels, splits=2).to_json()
    assert result["texts"] == {"numbers": 12, "words": 12}
    assert result["descriptions"]["networks"]["5"]["mean"] > 0.7
    assert len(result["descriptions"]) == 6
    assert result["chosen"][0]["splits"] == 2


def test_labels_that_are_not_there_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code(["probe", "--labels", "nowhere.jsonl"]) == 2
    assert "nowhere.jsonl" in capsys.readouterr().err
