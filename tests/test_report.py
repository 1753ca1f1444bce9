"""Claims about the report: what it shows and leaves out, text that stays text, bytes that are always the same."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from figures_as_data import drawn
from hypothesis import given
from hypothesis import strategies as st
from report_material import HOSTILE, ablation, comparison, write_material
from small_runs import arguments, refused, run_json

from fbn_prune.cli.main import _exit_code
from fbn_prune.export.published import public_name
from fbn_prune.export.report.facts import read_facts
from fbn_prune.export.report.page import report_html
from fbn_prune.export.report.text import visible

HEADINGS = {
    "size": "Size",
    "search": "Where the size went",
    "quality": "Quality against size",
    "ablation": "What the networks do",
    "evaluation": "Evaluation",
    "connectivity": "Functional connectivity",
    "cards": "Networks kept",
    "recipe": "Recipe",
}


class Page(HTMLParser):
    """Elements with their attributes, headings and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self.marks: list[str] = []
        self.text = ""
        self._open = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open == "h2":
            self.headings.append(data)
        if self._open == "mark":
            self.marks.append(data)


@pytest.fixture(scope="module", autouse=True)
def figures_are_drawn() -> Iterator[None]:
    with drawn():
        yield


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_material(folder)
    return folder


@pytest.fixture(scope="module")
def full(material: Path) -> str:
    """The page with everything on it."""
    return _full(material)


def _full(material: Path) -> str:
    beside = {name: material / f"{name}.json" for name in ("compare", "ablate", "evaluate")}
    return report_html(read_facts(material / "out", **beside))


def test_the_page_shows_all_that_is_known(full: str) -> None:
    page = Page(full)
    assert page.headings == list(HEADINGS.values())
    assert sum(tag == "svg" for tag, _ in page.elements) == 9
    for words in (
        "18.820",
        "16.620",
        "51.3 times",
        "0.6100 ± 0.0200",
        "-0.0200",
        "networks: 20",
        "0.310 ± 0.010",
        "55 %",
        "Layers left out: 2.",
    ):
        assert words in page.text, words
    cards = [a["id"] for tag, a in page.elements if tag == "article"]
    assert cards == [f"network-{n}" for n in range(19, -1, -1)]


def test_what_is_not_known_is_left_out(material: Path, tmp_path: Path) -> None:
    alone = Page(report_html(read_facts(material / "out")))
    assert alone.headings == [
        HEADINGS[key] for key in ("size", "search", "connectivity", "cards", "recipe")
    ]
    (tmp_path / "result.json").write_text((material / "out" / "result.json").read_text())
    assert Page(report_html(read_facts(tmp_path))).headings == [
        HEADINGS["size"],
        HEADINGS["search"],
    ]
    found = tmp_path / "found"
    found.mkdir()
    artifact = (material / "out" / "networks.safetensors").read_bytes()
    (found / "networks.safetensors").write_bytes(artifact)
    page = Page(report_html(read_facts(found)))
    assert page.headings == ["Size", HEADINGS["connectivity"], "The strongest networks"]


def test_hostile_text_stays_text(full: str) -> None:
    page = Page(full)
    assert not [tag for tag, _ in page.elements if tag in ("script", "iframe", "object", "h4")]
    assert all(a.get("src") is None for _, a in page.elements)
    assert all(not name.startswith("on") for _, a in page.elements for name in a)
    assert [a for tag, a in page.elements if tag == "h1"] == [{}]
    for text in HOSTILE:
        assert visible(text) in page.marks
    assert "49" not in [mark.strip() for mark in page.marks]


def test_the_page_needs_nothing_beside_it(full: str) -> None:
    page = Page(full)
    for _, attributes in page.elements:
        for name, value in attributes.items():
            if name in ("href", "xlink:href", "src"):
                assert value is not None
                assert value.startswith(("#", "data:image/png;base64,"))
    assert not re.search(r"@import|url\((?!#)", full)
    assert "someone" not in full, "the user's folders are not told"
    assert "secret" not in full
    ids = [a["id"] for _, a in page.elements if a.get("id")]
    assert len(ids) == len(set(ids))


def test_the_same_facts_give_the_same_bytes_in_another_process(full: str, material: Path) -> None:
    output = material / "again.html"
    flags = [f"--{n}={material / n}.json" for n in ("compare", "ablate", "evaluate")]
    command = [sys.executable, "-m", "fbn_prune", "report", str(material / "out"), *flags]
    other = {"PYTHONHASHSEED": "7", "SOURCE_DATE_EPOCH": "1", "TZ": "Asia/Tokyo"}
    other["PYTHONPATH"] = os.pathsep.join(sys.path)
    subprocess.run([*command, "--output", str(output)], check=True, env=os.environ | other)
    assert output.read_bytes() == full.encode()


def test_the_users_own_style_changes_nothing(
    full: str, material: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "axes.facecolor", "black")
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 30)
    assert _full(material) == full
    assert matplotlib.rcParams["font.size"] == 30


def test_a_run_is_marked_only_in_a_comparison_on_the_same_text(
    full: str, material: Path, tmp_path: Path
) -> None:
    assert ">this run<" in full
    (tmp_path / "other.json").write_text(json.dumps(comparison("beef")))
    other = report_html(read_facts(material / "out", compare=tmp_path / "other.json"))
    assert "used another sample than this run" in other
    assert ">this run<" not in other


def test_figures_that_are_not_finite_do_not_stop_the_page(material: Path, tmp_path: Path) -> None:
    content = ablation()
    content["networks"][0]["perplexity"] = float("inf")
    content["growing"]["mask"][-1]["perplexity"] = float("inf")
    content["random"] |= {"mean": float("inf"), "std": float("nan")}
    compared = comparison()
    compared["budgets"][2]["perplexity"]["random"] = float("inf")
    (tmp_path / "a.json").write_text(json.dumps(content))
    (tmp_path / "c.json").write_text(json.dumps(compared))
    facts = read_facts(material / "out", ablate=tmp_path / "a.json", compare=tmp_path / "c.json")
    assert "inf" in Page(report_html(facts)).text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "neither result.json nor"),
        (["{out}", "--compare", "{folder}/ablate.json"], "not the JSON output of compare"),
        (["{out}", "--ablate", "{folder}/compare.json"], "not the JSON output of ablate"),
        (["{out}", "--evaluate", "{folder}/none.json"], "cannot read"),
        (["{out}", "--output", "/nowhere/at/all.html"], "no folder"),
        (["{out}", "--output", "{folder}/compare.json"], "exists"),
    ],
)
def test_what_cannot_be_read_or_written_is_refused_in_one_line(
    arguments: list[str], message: str, material: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [a.format(out=material / "out", folder=material) for a in arguments]
    if "--output" not in filled:
        filled += ["--output", str(material / "unwritten.html")]
    refused(capsys, ["report", *filled], message)
    assert not (material / "unwritten.html").exists()


@given(st.text())
def test_visible_text_has_no_sign_that_acts(text: str) -> None:
    shown = visible(text)
    assert len(shown) == len(text)
    shown.encode("utf-8")
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)
    assert visible(shown) == shown


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("builtin", "builtin"),
        ("org/model-7b", "org/model-7b"),
        ("/home/me/models/mine/", "mine"),
        ("../models/mine", "mine"),
        ("work/models/mine", "mine"),
    ],
)
def test_a_model_is_named_without_the_folders_it_lies_in(model: str, name: str) -> None:
    assert public_name(model) == name


@pytest.mark.slow
def test_the_real_commands_write_what_the_report_reads(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, base = tmp_path / "out", arguments(tiny, text)
    run_json(capsys, *base, "--keep-networks", "2", "--output", out)
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    assert page.headings == [HEADINGS[key] for key in ("size", "connectivity", "cards", "recipe")]
    to = ["--output-path", tmp_path / "compare.json"]
    run_json(capsys, "compare", *base, "--kept", "2,0.5", *to)
    few = ["--draws", "2", "--grow", "1,2", "--text-tokens", "200", "--components"]
    (tmp_path / "ablate.json").write_text(json.dumps(run_json(capsys, "ablate", *base, *few)))
    asked = ["--model", out, "--compare", tiny, "--tasks", text]
    evaluated = run_json(capsys, "evaluate", *asked)
    (tmp_path / "evaluate.json").write_text(json.dumps(evaluated))
    flags = [f"--{n}={tmp_path / n}.json" for n in ("compare", "ablate", "evaluate")]
    assert _exit_code(["report", str(out), *flags, "--output", str(tmp_path / "all.html")]) == 0
    page = Page((tmp_path / "all.html").read_text(encoding="utf-8"))
    assert page.headings == [heading for key, heading in HEADINGS.items() if key != "search"]
