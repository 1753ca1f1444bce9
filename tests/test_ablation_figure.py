"""Claims about the figure of an ablation: all that was measured is in it, and it is the same whenever it is drawn."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from ablation_figure import main, on_one_text


def entry(neurons: int, perplexity: float, **more: Any) -> dict[str, Any]:
    rises = {"prose": 0.125, "code": perplexity / 100}
    return {
        "neurons": neurons,
        "perplexity": perplexity,
        "rise": 0.1,
        "rise_by_text": rises,
        **more,
    }


def band(mean: float) -> dict[str, Any]:
    return {"neurons": 9, "mean": mean, "std": 0.5, "n": 20}


@pytest.fixture
def result(tmp_path: Path) -> Path:
    def steps(scale: float) -> list[dict[str, Any]]:
        return [
            entry(90 * n, scale * n, n=n, random=band(5 + n), components=entry(90 * n, 4.0 * n))
            for n in (1, 2, 4)
        ]

    facts = {
        "model": "somewhere/a-model",
        "rank": "knockout",
        "z": 3.0,
        "tokens": {"prose": 100, "code": 2000},
        "dense": 4.0,
        "networks": [entry(90, 10.0 + n, id=n + 40) for n in range(4)],
        "components": [entry(90, 6.0 + n) for n in range(4)],
        "random": band(4.2),
        "growing": {"mask": steps(20.0), "retain": steps(700.0)},
    }
    path = tmp_path / "result.json"
    path.write_text(json.dumps(facts))
    return path


def test_the_figure_shows_networks_texts_and_sizes_and_repeats_itself(
    result: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"
    main(result, first)
    main(result, second)
    assert first.read_bytes() == second.read_bytes()
    words = set(re.findall(r">([^<>\n]+)<", first.read_text()))
    assert {"40", "41", "42", "43", "prose", "code", "+0.12"} <= words
    assert {"(90)", "(180)", "(360)"} <= words
    assert any("a-model" in line and "2,100 tokens" in line for line in words)
    assert any("20 random sets" in line for line in words)


def test_a_network_that_hurts_one_text_alone_is_wholly_on_it() -> None:
    selective = entry(9, 10.0) | {"rise_by_text": {"prose": -0.2, "code": 0.5}}
    even = entry(9, 10.0) | {"rise_by_text": {"prose": 0.5, "code": 0.5}}
    assert on_one_text([selective]) == 1
    assert on_one_text([selective, even]) == pytest.approx(0.75)
