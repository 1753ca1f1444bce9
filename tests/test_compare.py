"""Claims about comparing criteria: the figures of single runs, from one pass, resumed where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from tiny_models import save_tiny

from fbn_prune import comparison
from fbn_prune.cli.main import _exit_code


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(
        "".join(f"{i} apples cost {i * 3} pence, and {i % 7} pears. " for i in range(400))
    )
    return path


def arguments(model: Path, text: Path) -> list[str]:
    small = "--tokens 1000 --network-tokens 600 --networks 6 --context 48 --width-multiple 4"
    return ["--model", str(model), "--calibration", str(text), *small.split()]


def shown(capsys: pytest.CaptureFixture[str], command: list[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert _exit_code([*command, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_a_comparison_gives_what_single_runs_give(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = shown(capsys, ["compare", *arguments(tiny, text), "--kept", "0.67,0.5"])
    assert [budget["kept"] for budget in result["budgets"]] == [0.67, 0.5]
    for criterion in ("networks", "flap", "membership", "random"):
        output = tmp_path / criterion
        more = ["--criterion", criterion, "--sparsity", "0.5", "--output", str(output)]
        alone = shown(capsys, [*arguments(tiny, text), *more])
        cell = result["budgets"][1]
        assert cell["perplexity"][criterion] == pytest.approx(alone["perplexity_after"], rel=1e-5)
        assert cell["widths"] == alone["widths"]
        assert result["dense"] == pytest.approx(alone["perplexity_before"], rel=1e-6)


def test_a_comparison_goes_on_where_it_stopped(
    tiny: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "table.json"
    command = ["compare", *arguments(tiny, text), "--kept", "0.5", "--output-path", str(path)]
    whole = shown(capsys, [*command[:-1], str(tmp_path / "whole.json")])
    measured = []
    measure = comparison._perplexity

    def fails_at_the_third(*args: Any) -> float:
        measured.append(1)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(comparison, "_perplexity", fails_at_the_third)
    assert _exit_code(command) == 130
    assert len(json.loads(path.read_text())["budgets"][0]["perplexity"]) == 2
    again = shown(capsys, command)
    # Two were measured and the third was stopped; the rest are done now, and none of it again.
    assert len(measured) == 1 + len(whole["budgets"][0]["perplexity"])
    assert again == whole
    assert shown(capsys, command) == whole
    assert len(measured) == 1 + len(whole["budgets"][0]["perplexity"])


def test_another_comparisons_file_is_not_mixed_in(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "table.json"
    more = ["--kept", "0.5", "--criteria", "magnitude", "--output-path", str(path)]
    shown(capsys, ["compare", *arguments(tiny, text), *more])
    content = path.read_text()
    assert _exit_code(["compare", *arguments(tiny, text), *more, "--seed", "1"]) == 2
    assert "another model, calibration or seed" in capsys.readouterr().err
    assert path.read_text() == content
    path.write_text("[]")
    assert _exit_code(["compare", *arguments(tiny, text), *more]) == 2
    assert "is no comparison" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--kept", "1.5"], "between 0 and 1"),
        (["--kept", "7"], "7 networks: there are 6"),
        (["--kept", "0.5", "--output-path", "table.svg"], "name a .json file"),
        (["--kept", "half"], "write shares"),
        (["--criteria", "luck"], "luck"),
        (["--output-path", "/nowhere/at/all.json"], "no folder"),
    ],
)
def test_compare_refuses_in_one_line(
    more: list[str], message: str, tiny: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _exit_code(["compare", *arguments(tiny, text), *more]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_the_table_names_every_criterion(
    tiny: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", *arguments(tiny, text), "--kept", "0.5", "--criteria", "flap,random"]
    assert _exit_code(command) == 0
    output = capsys.readouterr().out
    assert "flap" in output
    assert "random" in output
    assert "50%" in output


def test_the_plot_stands_beside_the_results_and_is_drawn_the_same_again(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "table.json"
    more = ["--kept", "0.67,0.5", "--criteria", "networks,random", "--output-path", str(path)]
    shown(capsys, ["compare", *arguments(tiny, text), *more])
    plot = (tmp_path / "table.svg").read_text()
    root = ElementTree.fromstring(plot)
    assert root.tag.endswith("svg")
    words = {"".join(element.itertext()).strip() for element in root.iter()}
    assert {"networks", "random", "dense", "perplexity"} <= words
    shown(capsys, ["compare", *arguments(tiny, text), *more])
    assert (tmp_path / "table.svg").read_text() == plot
    assert {file.name for file in tmp_path.iterdir()} == {"table.json", "table.svg"}


def test_a_budget_of_networks_is_that_of_a_run_that_keeps_them(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = shown(
        capsys, ["compare", *arguments(tiny, text), "--kept", "2,0.5", "--criteria", "networks"]
    )
    more = ["--keep-networks", "2", "--output", str(tmp_path / "out")]
    alone = shown(capsys, [*arguments(tiny, text), *more])
    (by_networks,) = [budget for budget in result["budgets"] if budget["networks"] == 2]
    assert by_networks["widths"] == alone["widths"]
    assert by_networks["perplexity"]["networks"] == pytest.approx(
        alone["perplexity_after"], rel=1e-5
    )
    assert [budget["networks"] for budget in result["budgets"] if budget["kept"] == 0.5] == [None]
