"""Claims about the law of scaling: it finds the rates that made the times, and its page comes from one file."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("scipy")

import scaling
from bench_memory import PROGRAM, Shape

from fbn_prune.runs.cost import KINDS
from fbn_prune.runs.rates import BASES, FACTORS, seconds, seconds_of_each

ROOT = Path(__file__).parents[1]
PLANTED = {kind: factor * (1.5 if kind in BASES else 0.5) for kind, factor in FACTORS.items()}
RATES = {"product": 2e11, "float32": 2e11, "float64": 8e10, "memory": 2e10}
POINTS = [
    *scaling.GRID,
    ("30m", 131072, False),
    ("110m", 4096, True),
    ("350m", 65536, False),
]


def run(name: str, tokens: int, streamed: bool, noise: float = 0.0) -> dict[str, Any]:
    """A run as it would have been with the planted rates."""
    shape = scaling.SHAPES[name]
    made: dict[str, Any] = {
        "shape": name,
        "sizes": vars(shape),
        "tokens": tokens,
        "streamed": streamed,
        "parameters": 10**7,
        "calibration_tokens": tokens,
        "held_out_tokens": tokens // 9,
        "neurons_kept": shape.width * shape.layers // 2,
        "eigen_products": 8 + tokens % 5,
        "ica_iterations": 100 + tokens // 1000,
        "rates": RATES,
        "machine": {"cpus": 2, "threads": 2},
        "forward_seconds": 1.0,
        "peak_bytes": 10**9,
        "predicted_peak_bytes": 8 * 10**8,
    }
    drawn = random.Random(f"{name}{tokens}{streamed}")
    stages = {
        stage: took * (1 + noise * drawn.uniform(-1, 1))
        for stage, took in seconds(
            scaling.counted(made, known=True), seconds_of_each(RATES, PLANTED)
        ).items()
    }
    made["seconds"] = sum(stages.values())
    made["cpu_seconds"] = made["seconds"] * 1.5
    made["stages"] = {stage: took for stage, took in stages.items() if stage != "rest"}
    return made


def test_the_fit_finds_the_rates_that_made_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "PRIOR_WEIGHT", 0.03)  # else it draws what the runs tell exactly
    law = scaling.fit([run(*point) for point in POINTS])
    for kind in KINDS:
        if kind in ("forward", "double", "moved", "started"):
            assert law.factors[kind] == pytest.approx(PLANTED[kind], rel=0.02), kind
        elif kind in ("exchanged", "told"):  # no run has any
            assert law.factors[kind] == pytest.approx(scaling.PRIOR[kind])
    assert law.ratios == pytest.approx([1.0] * len(POINTS), rel=0.02)
    assert law.left_out == pytest.approx([1.0] * len(POINTS), rel=0.1)


def test_the_fit_of_disturbed_times_is_as_near_as_they_are() -> None:
    law = scaling.fit([run(*point, noise=0.2) for point in POINTS])
    assert all(1 / 1.2 < ratio < 1.2 for ratio in law.ratios)
    assert all(factor >= 0 for factor in law.factors.values())


def test_one_rate_for_everything_fits_worse() -> None:
    runs = [run(*point) for point in POINTS]
    assert scaling._worst(scaling.one_rate_ratios(runs)) > 1.05


@pytest.mark.parametrize("processes", [1, 8])
def test_predictions_grow_with_the_model_and_shrink_with_gpus(processes: int) -> None:
    small, large = (scaling.on_gpus(scaling.PAPER[name], processes)[0] for name in ("8B", "70B"))
    for stage in ("prune", "ica", "activations", "export"):
        assert large[stage] > small[stage] > 0
    alone = scaling.on_gpus(scaling.PAPER["70B"], 1)[0]
    assert sum(large.values()) <= sum(alone.values())
    assert ("exchange" in large) == (processes > 1)


def test_models_on_paper_have_the_sizes_that_their_names_say() -> None:
    for name, parameters in (("8B", 8.03e9), ("70B", 70.6e9)):
        checkpoint = scaling._on_paper(scaling.PAPER[name])
        assert checkpoint.total_parameters == pytest.approx(parameters, rel=0.005)
    assert scaling.on_gpus(scaling.PAPER["8B"], 1)[1].streamed is False
    plan = scaling.on_gpus(scaling.PAPER["70B"], 1)[1]
    assert plan.streamed
    assert plan.peak_bytes < scaling.GPU_BYTES


@pytest.fixture
def results(tmp_path: Path) -> Path:
    path = tmp_path / "scaling.json"
    runs = {str(point): run(*point, noise=0.1) for point in scaling.GRID}
    path.write_text(json.dumps({"runs": runs}))
    return path


def test_the_tables_go_between_their_markers_and_nowhere_else(
    results: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    text = (ROOT / "docs" / "scaling.md").read_text("utf-8")
    page.write_text(text, "utf-8")
    scaling.table(results=results, write=page)
    once = page.read_text("utf-8")
    scaling.table(results=results, write=page)
    assert page.read_text("utf-8") == once
    outside = re.compile(r"<!-- begin (.+?) -->.*?<!-- end \1 -->", re.DOTALL)
    assert outside.sub("", once) == outside.sub("", text)
    assert len(outside.findall(once)) == len(scaling.tables(scaling._runs(results)))
    assert "| 7m, 65,536 |" in once
    assert "| 350m, 1,024, streamed | 0.80 | 1.00 | 1.25 |" in once


def test_a_page_without_a_marker_is_left_alone(results: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing to fill", "utf-8")
    with pytest.raises(SystemExit, match="begin measured"):
        scaling.table(results=results, write=page)
    assert page.read_text("utf-8") == "nothing to fill"


def test_fitted_factors_replace_those_in_the_module(results: Path, tmp_path: Path) -> None:
    module = tmp_path / "rates.py"
    text = (ROOT / "fbn_prune" / "rates.py").read_text("utf-8")
    module.write_text(text, "utf-8")
    scaling.fit_command(results=results, write=module)
    names: dict[str, Any] = {"__name__": "rates"}
    exec(compile(module.read_text("utf-8"), str(module), "exec"), names)
    law = scaling.fit(scaling._runs(results))
    assert names["FACTORS"].keys() == FACTORS.keys()
    assert names["FACTORS"] == pytest.approx(law.factors, rel=0.01)
    before, after = (t.replace(t[t.index("FACTORS = {") : t.index("\n}\n", t.index("FACTORS = {"))], "")
                     for t in (text, module.read_text("utf-8")))  # fmt: skip
    assert before == after


def test_the_figure_names_every_run_and_repeats_itself(results: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"
    scaling.plot(results=results, out=first)
    scaling.plot(results=results, out=second)
    assert first.read_bytes() == second.read_bytes()
    words = set(re.findall(r">([^<>\n]+)<", first.read_text("utf-8")))
    assert {"7m, 65,536", "350m, 1,024, streamed", "ica", "prune"} <= words


def test_the_committed_page_is_what_the_committed_measurements_give(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    text = (ROOT / "docs" / "scaling.md").read_text("utf-8")
    page.write_text(text, "utf-8")
    scaling.table(results=scaling.RESULT_FILE, write=page)
    assert page.read_text("utf-8") == text


@pytest.mark.slow
@pytest.mark.parametrize("processor", [False, True])
def test_a_tiny_shape_is_measured_fitted_and_merged(
    processor: bool, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(scaling.SHAPES, "tiny", Shape(32, 64, 2, 2, 1, 2048))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = json.loads(results.read_text("utf-8"))["runs"]
    scaling.measure(tmp_path, shapes="tiny", most_tokens=2048, processor=processor, results=results)
    runs = json.loads(results.read_text("utf-8"))["runs"]
    assert len(runs) == len(before) + 1
    found = runs["tiny/1024/whole"]
    assert found["clock"] == ("processor" if processor else "wall")
    assert found["calibration_tokens"] >= 1024
    assert found["neurons_kept"] == 64
    assert 0 < found["ica_iterations"] <= 1000
    assert found["peak_bytes"] > 10**8
    assert sum(scaling.measured_stages(found).values()) == pytest.approx(found["seconds"])
    assert found["stages"].keys() == found["predicted_stages"].keys() - {"rest"}
    assert not (tmp_path / "pruned").exists()
    assert scaling.fit([found]).factors.keys() == FACTORS.keys()


def test_the_child_with_a_processor_clock_is_the_same_program() -> None:
    assert PROGRAM[0] == "-m"
    assert "main()" in scaling.BY_PROCESSOR[1]
    with scaling._clock(True):
        assert scaling.time.perf_counter is scaling.time.process_time
    assert scaling.time.perf_counter is not scaling.time.process_time
