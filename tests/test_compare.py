"""Claims about comparing criteria: the figures of single runs, from one pass, resumed where it stopped."""

from __future__ import annotations

import copy
import gc
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import small_runs
import torch
from small_runs import refused, run_json

from fbn_prune.cli.main import _exit_code
from fbn_prune.model.surgery import MlpCut
from fbn_prune.pruning import cutting
from fbn_prune.runs import compare, memory
from fbn_prune.runs.study import Studied

TWO = ("--criteria", "flap,second-order")


def arguments(model: Path, text: Path, *more: str) -> list[str]:
    return small_runs.arguments(model, text, None, "--width-multiple", "4", *more)


def test_a_comparison_gives_what_single_runs_give(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    criteria = ("second-order", "membership", "random")
    flags = ["--kept", "0.67,0.5", "--criteria", ",".join(criteria)]
    result = run_json(capsys, "compare", *arguments(tiny, text), *flags)
    assert [budget["kept"] for budget in result["budgets"]] == [0.67, 0.5]
    for criterion in criteria:
        more = ["--criterion", criterion, "--sparsity", "0.5"]
        alone = run_json(
            capsys, *arguments(tiny, text, "--output", str(tmp_path / criterion)), *more
        )
        cell = result["budgets"][1]
        assert cell["perplexity"][criterion] == pytest.approx(alone["perplexity_after"], rel=1e-5)
        assert cell["widths"] == alone["widths"]
        assert result["dense"] == pytest.approx(alone["perplexity_before"], rel=1e-6)


def test_a_number_of_networks_takes_their_members_as_the_main_job_does(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = run_json(
        capsys, "compare", *arguments(tiny, text), "--kept", "1", "--criteria", "membership"
    )
    more = ["--criterion", "membership", "--keep-networks", "1"]
    alone = run_json(capsys, *arguments(tiny, text, "--output", str(tmp_path / "out")), *more)
    (budget,) = table["budgets"]
    assert budget["widths"] == alone["widths"]
    assert budget["perplexity"]["membership"] == pytest.approx(alone["perplexity_after"], rel=1e-5)


def test_a_comparison_goes_on_where_it_stopped(
    tiny: Path, text: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "table.json"
    command = ["compare", *arguments(tiny, text), "--kept", "0.5", "--output-path", str(path)]
    whole = run_json(capsys, *[*command[:-1], str(tmp_path / "whole.json")])
    measured = []
    measure = compare._perplexity

    def fails_at_the_third(*args: Any) -> float:
        measured.append(1)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(compare, "_perplexity", fails_at_the_third)
    assert _exit_code(command) == 130
    assert len(json.loads(path.read_text())["budgets"][0]["perplexity"]) == 2
    again = run_json(capsys, *command)
    # Two were measured and the third was stopped; the rest are done now, and none of it again.
    assert len(measured) == 1 + len(whole["budgets"][0]["perplexity"])
    assert again == whole
    assert run_json(capsys, *command) == whole
    assert len(measured) == 1 + len(whole["budgets"][0]["perplexity"])


class Watched:
    """What a comparison does to the model, and what it holds beside it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, interrupted_in: int | None = None) -> None:
        self.measured, self.beside, self._known = 0, [0], set()
        self._measure, self._interrupted_in = compare._perplexity, interrupted_in
        monkeypatch.setattr(compare, "_perplexity", self._watched)

    def _watched(self, on: Studied, *rest: Any) -> float:
        self.on, self.measured = on, self.measured + 1
        self._known = {id(each) for each in _parameters()}
        self.before = copy.deepcopy(on.adapter.model.state_dict()), on.adapter.config.to_dict()
        outputs = [on.adapter.output_module(layer) for layer in range(on.prepared.layers)]
        hooks = [output.register_forward_hook(self._look) for output in outputs]
        if self.measured == self._interrupted_in:
            hooks.append(outputs[-1].register_forward_hook(self._interrupt))
        try:
            return self._measure(on, *rest)
        finally:
            for hook in hooks:
                hook.remove()

    def _look(self, *_: Any) -> None:
        own = [each for each in _parameters() if id(each) not in self._known]
        self.beside.append(sum(each.nbytes for each in own))

    def _interrupt(self, *_: Any) -> None:
        raise KeyboardInterrupt

    def is_as_before(self) -> bool:
        model, (weights, config) = self.on.adapter.model, self.before
        now = model.state_dict()
        same = all(torch.equal(now[name], value) for name, value in weights.items())
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        return (
            same and now.keys() == weights.keys() and config == model.config.to_dict()
        ) and not hooked


def _parameters() -> list[torch.nn.Parameter]:
    """All that are alive in the process."""
    return [each for each in gc.get_objects() if type(each) is torch.nn.Parameter]


@pytest.mark.parametrize("interrupted_in", [None, 2])
def test_a_comparison_leaves_the_model_as_it_was_also_when_it_is_interrupted(
    interrupted_in: int | None, tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch, interrupted_in)
    command = ["compare", *arguments(tiny, text, "--kept", "0.5", *TWO)]
    assert _exit_code(command) == (0 if interrupted_in is None else 130)
    assert watched.measured == (interrupted_in or 2)
    assert watched.is_as_before()


def test_a_comparison_that_fails_leaves_the_model_as_it_was(
    tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    watched = Watched(monkeypatch)
    rounded = cutting.rounded_cut

    def infinite(cut: MlpCut, dtype: torch.dtype) -> MlpCut:
        return replace(rounded(cut, dtype), down_weight=cut.down_weight.fill_(torch.inf))

    monkeypatch.setattr(cutting, "rounded_cut", infinite)
    command = ["compare", *arguments(tiny, text, "--kept", "0.5", *TWO)]
    assert _exit_code(command) == 1
    assert "not finite" in capsys.readouterr().err
    assert watched.measured == 1
    assert watched.is_as_before()


def test_beside_the_model_a_comparison_holds_one_cut_layer(
    tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch)
    command = ["compare", *arguments(tiny, text, "--kept", "0.9", *TWO)]
    assert _exit_code(command) == 0
    adapter = watched.on.adapter
    of_the_mlp = sum(
        each.nbytes
        for projection in adapter.family.projections
        for each in adapter.module(0, projection).parameters()
    )
    assert watched.measured == 2
    assert len(watched.beside) == 1 + 2 * watched.on.prepared.layers
    assert 0 < max(watched.beside) <= of_the_mlp  # cut, with the biases that some criteria bring
    assert max(watched.beside) < sum(each.nbytes for each in adapter.model.parameters()) / 4


def test_a_comparison_on_a_disk_without_room_says_so_before_it_cuts(
    tiny: Path, text: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        "fbn_prune.export.directory.shutil.disk_usage", lambda _: usage._replace(free=10)
    )
    more = ["--kept", "0.5", "--output-path", str(tmp_path / "table.json")]
    message = f"folder of temporary files {tmp_path} needs"
    refused(capsys, ["compare", *arguments(tiny, text), *more], message)
    assert list(tmp_path.iterdir()) == []


def test_another_comparisons_file_is_not_mixed_in(
    tiny: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "table.json"
    more = ["--kept", "0.5", "--criteria", "magnitude", "--output-path", str(path)]
    command = ["compare", *arguments(tiny, text, *more)]
    run_json(capsys, *command)
    content = path.read_text()
    monkeypatch.setattr("fbn_prune.runs.stages.discover", None)  # refused before the work
    refused(capsys, [*command, "--seed", "1"], "another model, calibration or seed")
    assert path.read_text() == content
    path.write_text("[]")
    refused(capsys, command, "does not hold a comparison")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--kept", "1.5"], "between 0 and 1"),
        (["--kept", "7"], "7 networks: there are 6"),
        (["--kept", "0.5", "--output-path", "table.svg"], "give a .json file"),
        (["--kept", "half"], "give shares"),
        (["--criteria", "luck"], "luck"),
        (["--output-path", "/nowhere/at/all.json"], "no folder"),
    ],
)
def test_compare_refuses_in_one_line_before_it_looks_for_networks(
    more: list[str],
    message: str,
    tiny: Path,
    text: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fbn_prune.runs.stages.discover", None)
    refused(capsys, ["compare", *arguments(tiny, text), *more], message)


@pytest.mark.usefixtures("drawn")
def test_the_table_names_every_criterion_and_its_plot_is_drawn_the_same_again(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "table.json"
    more = ["--kept", "0.67,0.5", "--criteria", "second-order,random", "--output-path", str(path)]
    command = ["compare", *arguments(tiny, text, *more)]
    assert _exit_code(command) == 0
    output = capsys.readouterr().out
    assert all(word in output for word in ("second-order", "random", "50%"))
    plot = (tmp_path / "table.svg").read_text()
    root = ElementTree.fromstring(plot)
    assert root.tag.endswith("svg")
    words = {"".join(element.itertext()).strip() for element in root.iter()}
    assert {"second-order", "random", "dense", "perplexity"} <= words
    run_json(capsys, *command)
    assert (tmp_path / "table.svg").read_text() == plot
    assert {file.name for file in tmp_path.iterdir()} == {"table.json", "table.svg"}


def test_a_budget_of_networks_is_that_of_a_run_that_keeps_them(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--kept", "2,0.5", "--criteria", "second-order"]
    result = run_json(capsys, "compare", *arguments(tiny, text, *flags))
    more = ["--keep-networks", "2", "--output", str(tmp_path / "out")]
    alone = run_json(capsys, *arguments(tiny, text, *more))
    (by_networks,) = [budget for budget in result["budgets"] if budget["networks"] == 2]
    assert by_networks["widths"] == alone["widths"]
    assert by_networks["perplexity"]["second-order"] == pytest.approx(
        alone["perplexity_after"], rel=1e-5
    )
    assert [budget["networks"] for budget in result["budgets"] if budget["kept"] == 0.5] == [None]


@pytest.mark.parametrize("command", ["compare", "rank", "ablate"])
def test_a_model_that_memory_does_not_hold_is_refused_where_it_must_be_whole(
    command: str, tiny: Path, text: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 0)
    given = small_runs.arguments(tiny, text)  # without a width multiple: only compare cuts
    refused(capsys, [command, *given], "needs the whole model in memory")
