"""The page of claims shows every figure that was measured, with its spread, and needs nothing but itself."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from claims_page import claims_page, main

BASES = ("networks", "principal components", "random rotations", "temporal ICA", "random sets")


def result() -> dict[str, Any]:
    def step(scale: float) -> dict[str, Any]:
        values = {
            kind: {"mean": scale + place, "std": 0.25 * place} for place, kind in enumerate(BASES)
        }
        return {"neurons": int(100 * scale), "masked, bare": values, "retained, bare": values}

    row = {"mean_iou": 0.58, "chance_iou": 0.06, "recurring": 61, "same": 38}
    return {
        "model": "a <model>",
        "tokens": 4096,
        "networks": 64,
        "perplexity": 25.224,
        "strongest": {"neurons": 1510, "rise": 2.297, "random": {"mean": 0.142, "std": 0.043}},
        "grown": {"1": step(1.0), "4": step(4.0)},
        "recurrence": {"another sample of tokens": row},
        "seeds": {"starts": 8, "in all": 58, "correlation": 0.993},
    }


def test_the_page_has_all_figures_and_repeats_itself(tmp_path: Path) -> None:
    given, page = tmp_path / "result.json", tmp_path / "page.html"
    given.write_text(json.dumps(result()))
    main(given, page)
    text = page.read_text("utf-8")
    assert text == claims_page(result())
    assert text.count("<svg ") == 2
    assert "a &lt;model&gt;" in text
    assert "<model>" not in text
    shown = ["<b>2.30</b>", "0.14 ± 0.04", "61 of 64", "58 of 64", "5.00 ± 0.25"]
    shown.append("perplexity on other tokens is 25.22")
    for one in shown:
        assert one in text, one
    assert len(re.findall(r"<tr><td>top ", text)) == 4


def test_the_page_needs_nothing_else() -> None:
    text = claims_page(result())
    assert "<script" not in text
    assert not re.search(r"(src|href)=\"(?!#)", text.replace('xlink:href="#', ""))


def test_parts_that_were_not_measured_are_left_out() -> None:
    facts = result()
    for name in ("perplexity", "strongest", "grown", "seeds"):
        del facts[name]
    text = claims_page(facts)
    assert "61 of 64" in text
    assert "<svg" not in text
    assert "masked" not in text
