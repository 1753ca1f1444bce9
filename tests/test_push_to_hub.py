"""A finished output goes to the Hub when that was asked for, never otherwise; what cannot go there is refused first.

The Hub is stood in for: this machine's tests reach no network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from small_runs import arguments, refused

from fbn_prune.cli.main import _exit_code


def refusal(kind: type[HfHubHTTPError], message: str) -> HfHubHTTPError:
    """An answer of the Hub, without the connection it came by."""
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    return error


class Hub:
    """As `HfApi`: a person, the repositories with their files, and what was asked of it."""

    def __init__(self) -> None:
        self.repositories: dict[str, list[str]] = {"me/full": [".gitattributes", "config.json"]}
        self.made: list[dict[str, Any]] = []
        self.uploads: list[dict[str, Any]] = []
        self.failure: Exception | None = None
        self.late_failure: Exception | None = None

    def whoami(self) -> dict[str, Any]:
        if self.failure is not None:
            raise self.failure
        return {"name": "me", "orgs": [{"name": "lab"}]}

    def list_repo_files(self, repo: str) -> list[str]:
        if repo not in self.repositories:
            raise refusal(RepositoryNotFoundError, "no such repository")
        return self.repositories[repo]

    def create_repo(self, repo: str, **settings: Any) -> str:
        self.made.append({"repo": repo, **settings})
        return f"https://hub.test/{repo}"

    def upload_folder(self, **settings: Any) -> None:
        if self.late_failure is not None:
            raise self.late_failure
        files = {path.name for path in Path(settings["folder_path"]).iterdir()}
        recipe = Path(settings["folder_path"], "recipe.yaml").read_text()
        self.uploads.append({**settings, "files": files, "recipe": recipe})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr("fbn_prune.export.hub.HfApi", lambda: hub)
    return hub


@pytest.fixture
def job(tiny: Path, text: Path, tmp_path: Path) -> list[str]:
    cheap = ["--criterion", "magnitude", "--sparsity", "0.5"]
    return arguments(tiny, text, tmp_path / "out", *cheap)


def test_the_whole_output_goes_to_the_repository_in_one_commit(
    hub: Hub, job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _exit_code([*job, "--push-to-hub", "lab/small", "--private"]) == 0
    assert hub.made == [{"repo": "lab/small", "private": True, "exist_ok": True}]
    (upload,) = hub.uploads
    assert upload["files"] == {path.name for path in (tmp_path / "out").iterdir()}
    assert upload["delete_patterns"] is None
    assert "calibration:\n- text.txt\n" in upload["recipe"]
    assert str(tmp_path.parent.parent) not in upload["recipe"]
    assert str(tmp_path) in (tmp_path / "out" / "recipe.yaml").read_text()
    assert "https://hub.test/lab/small" in capsys.readouterr().err


def test_nothing_is_pushed_unless_asked_also_by_the_written_recipe(
    hub: Hub, job: list[str], tmp_path: Path
) -> None:
    assert _exit_code([*job, "--push-to-hub", "me/small", "--dry-run"]) == 0
    assert not hub.made
    assert _exit_code([*job, "--push-to-hub", "me/small"]) == 0
    recipe = tmp_path / "out" / "recipe.yaml"
    assert _exit_code(["run", str(recipe), "--output", str(tmp_path / "again")]) == 0
    assert len(hub.uploads) == 1
    assert hub.made[0]["private"] is False


@pytest.mark.parametrize(
    ("repo", "failure", "message"),
    [
        ("small", None, "write USER/NAME"),
        ("me/sm all", None, "me/sm all"),
        ("you/small", None, "me may push only to: lab, me"),
        ("me/full", None, "holds config.json"),
        ("me/small", LocalTokenNotFoundError("no token"), "hf auth login"),
        ("me/small", OfflineModeIsEnabled("offline mode"), "offline mode"),
        ("me/small", HTTPError("no route"), "no route"),
        ("me/small", refusal(HfHubHTTPError, "401 expired"), "401 expired"),
    ],
)
def test_what_could_not_be_pushed_is_refused_before_any_work(
    repo: str,
    failure: Exception | None,
    message: str,
    hub: Hub,
    job: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.failure = failure
    refused(capsys, [*job, "--push-to-hub", repo], message)
    assert not (tmp_path / "out").exists()
    assert not hub.made


def test_a_repository_with_files_is_replaced_where_that_is_allowed(
    hub: Hub, job: list[str]
) -> None:
    assert _exit_code([*job, "--push-to-hub", "me/full", "--overwrite"]) == 0
    assert hub.uploads[0]["delete_patterns"] == "*"


def test_a_failed_upload_leaves_the_output_and_says_how_to_push_it(
    hub: Hub, job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.late_failure = HTTPError("too slow")
    assert _exit_code([*job, "--push-to-hub", "me/small", "--json"]) == 1
    captured = capsys.readouterr()
    assert f"hf upload me/small {tmp_path / 'out'}" in captured.err.splitlines()[-1]
    assert captured.out.startswith("{")
    assert (tmp_path / "out" / "config.json").exists()


def test_private_alone_has_no_meaning(job: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, [*job, "--private"], "--push-to-hub")
