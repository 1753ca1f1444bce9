"""The page of networks holds every network, escapes what it shows, and admits its own script alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from report_material import HOSTILE, write_material

from fbn_prune.cli.main import _exit_code
from fbn_prune.export.report.browser import browser_html
from fbn_prune.networks.functional_networks import FunctionalNetworks


def test_the_page_has_every_network_its_effect_and_one_script(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, page = tmp_path / "run", tmp_path / "networks.html"
    write_material(folder)
    more = ["--ablate", str(folder / "ablate.json"), "--most", "1"]
    found = folder / "out"
    assert _exit_code(["inspect", str(found), "--html", str(page), *more]) == 0
    text = page.read_text("utf-8")
    networks = FunctionalNetworks.load(found / "networks.safetensors")
    assert text.count("<article ") == len(networks.maps)
    assert text.count("<script>") == 1
    assert not any(each in text for each in HOSTILE if "<" in each)
    assert re.search(r"script-src 'sha256-[\w+/=]+'", text)
    assert "<img" not in text
    assert browser_html(networks) == browser_html(networks)
    assert _exit_code(["inspect", str(found), "--html", str(page)]) == 2
    assert "exists" in capsys.readouterr().err


def test_effects_without_a_page_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code(["inspect", "nowhere", "--ablate", "a.json"]) == 2
    assert "--html" in capsys.readouterr().err
