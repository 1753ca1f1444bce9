"""Claims about what a run says of itself where there is no terminal."""

from __future__ import annotations

import time

import pytest

from fbn_prune.cli import console


def wait_for(capsys: pytest.CaptureFixture[str], words: str) -> str:
    """What was said, up to a line with these words."""
    said, deadline = "", time.monotonic() + 30
    while words not in said and time.monotonic() < deadline:
        time.sleep(0.01)
        said += capsys.readouterr().err
    return said


def test_a_long_step_is_not_passed_in_silence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "LINE_SECONDS", 0.02)
    with console.LineDisplay().stage("prune", 4, "layers") as advance:
        assert "prune: 0% after" in wait_for(capsys, "0% after")
        advance(1)
        said = wait_for(capsys, "25%")
        assert "layers/s" in said
        assert "s left" in said
        assert "25%" in wait_for(capsys, "25%"), "said again where nothing more is heard"


def test_a_stage_that_fails_goes_silent_and_passes_the_error_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "LINE_SECONDS", 0.02)
    with pytest.raises(ValueError, match="broken"), console.LineDisplay().stage("prune", 4, "x"):
        raise ValueError("broken")
    capsys.readouterr()
    time.sleep(0.2)
    assert capsys.readouterr().err == ""
