"""What a run says about a cut that few people would want."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fbn_prune.progress import SilentDisplay, StageClock
from fbn_prune.pruning.prediction import GOOD, WORTH_A_WARNING, advice
from fbn_prune.recipe import build_recipe
from fbn_prune.runs.main_job import run_prune


class Notes(SilentDisplay):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)


@given(st.floats(WORTH_A_WARNING, 1e6), st.floats(0.05, 0.99), st.booleans())
def test_the_advice_is_a_smaller_cut(multiple: float, removed: float, recovered: bool) -> None:
    said = advice(multiple, removed, recovered=recovered)
    assert said is not None
    sparsity = float(said.split("--sparsity ")[1].split()[0])
    assert 0 < sparsity < removed
    assert ("--recover" in said) != recovered
    assert f"{GOOD:g} times" in said


def test_a_small_rise_needs_no_advice() -> None:
    assert advice(WORTH_A_WARNING - 0.01, 0.5, recovered=False) is None
    assert advice(0.9, 0.5, recovered=True) is None


def test_a_bad_cut_is_said_on_terminal_and_card(
    tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights lose little: the limit is lowered for them."""
    monkeypatch.setattr("fbn_prune.pruning.prediction.WORTH_A_WARNING", 1 + 1e-9)
    notes = Notes()
    values = {"model": str(tiny), "calibration": [str(text)], "sparsity": 0.6, "tokens": 2000}
    recipe = build_recipe(values | {"output": tmp_path / "out", "criterion": "magnitude"})
    result = run_prune(recipe, StageClock(notes))
    worse = result.perplexity_after > result.perplexity_before
    card = (tmp_path / "out" / "README.md").read_text()
    for words in (result.warning or "", card, " ".join(notes.lines)):
        assert ("times the dense model's" in words) == worse
