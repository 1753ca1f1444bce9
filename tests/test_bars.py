"""The bars of searches move within each measurement, and a search says what it will try and how long that takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from small_runs import arguments

from fbn_prune.cli import console
from fbn_prune.cli.main import _exit_code
from fbn_prune.progress import Advance, SilentDisplay


class Seen(SilentDisplay):
    """Keeps the notes, and of each stage the total and the steps by which its bar moved."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.totals: dict[str, int] = {}
        self.moves: dict[str, list[int]] = {}

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Advance]:  # type: ignore[override]
        self.totals[name] = total
        yield self.moves.setdefault(name, []).append

    def note(self, line: str) -> None:
        self.notes.append(line)


Run = Callable[..., Seen]


@pytest.fixture
def run(
    tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Runs a command whose clock goes seven seconds on at each look, in batches of one block."""

    def one(*command: str, model: Path = tiny) -> Seen:
        seen = Seen()
        clock = iter(range(0, 10**7, 7))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(console, "display", lambda: seen)
            patch.setattr(time, "perf_counter", lambda: float(next(clock)))
            patch.setattr("fbn_prune.runs.setup.Prepared.batch_tokens", 48)
            name, *flags = command
            code = _exit_code([name, *arguments(model, text), "--held-out", "0.4", *flags])
        assert code == 0, capsys.readouterr().err
        return seen

    return one


def moved_within(seen: Seen, stage: str, measurements: int) -> None:
    """The bar of a stage moved several times in each of its measurements, and to its end."""
    moves = seen.moves[stage]
    assert sum(moves) == seen.totals[stage]
    assert all(move > 0 for move in moves)
    assert max(moves) <= 48 < seen.totals[stage] / measurements
    assert len(moves) >= 4 * measurements


def test_compare_says_what_it_will_measure_and_its_bar_moves_within_a_model(run: Run) -> None:
    seen = run("compare", "--criteria", "magnitude,random", "--kept", "0.7,0.5")
    tried = "magnitude at 70%, random at 70%, magnitude at 50%, random at 50%"
    assert f"comparison of 4 models: {tried}" in seen.notes
    (timed,) = [line for line in seen.notes if " took " in line]
    assert timed.startswith("comparison: magnitude at 70% took ")
    assert timed.endswith("for the other 3")
    moved_within(seen, "comparison", 4)


def test_ablate_says_what_it_will_measure_and_its_bar_moves_within_a_set(run: Run) -> None:
    seen = run("ablate", "--draws", "3", "--grow", "2", "--components")
    sets = "6 networks, 2 growing sets, 9 random sets, 8 principal components"
    assert f"ablation: the unchanged model, {sets}, one at a time" in seen.notes
    (timed,) = [line for line in seen.notes if " took " in line]
    assert timed.startswith("ablation: the unchanged model took ")
    assert timed.endswith("for the other 25")
    moved_within(seen, "ablation", 26)


def test_knock_out_says_what_it_will_measure_and_its_bar_moves_within_a_network(run: Run) -> None:
    seen = run("rank", "--rank", "knockout")
    assert "rank: knock-out of 6 networks, one at a time" in seen.notes
    (timed,) = [line for line in seen.notes if " took " in line]
    assert timed.startswith("rank: the unchanged model took ")
    assert timed.endswith("for the other 6")
    moved_within(seen, "rank", 7)


def test_tasks_move_the_bar_of_an_ablation_with_each_forward_pass(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    questions = tmp_path / "lines.txt"
    questions.write_text("".join(f"{n} apples cost {3 * n} pence.\n" for n in range(40)))
    flags = ["--tasks", str(questions), "--batch-size", "4", "--draws", "1"]
    seen = run("ablate", *flags)
    moves = seen.moves["ablation"]
    assert sum(moves) == seen.totals["ablation"]
    assert all(move > 0 for move in moves)
    # Half of each measurement is the tasks'; the second time, equal steps take it, one a forward pass.
    each = seen.totals["ablation"] // 8 // 2
    assert max(moves[-10:]) <= each / 4
    assert len(moves) >= 8 * (each // 48 + 4)
