"""Claims about what reaches stderr beside our own lines: nothing of the libraries below, odd configs as one line."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers
from small_runs import arguments
from tiny_models import VOCAB, make_merging_tokenizer, save_tiny
from warm_python import WARM

from fbn_prune.cli.main import _exit_code
from fbn_prune.cli.quiet import VERBOSITY, quiet_libraries
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.config_checks import ConfigWarning, oddities

ODD = {"eos_token_id": 99999, "bos_token_id": -5}
SAID = (
    f"config.json gives bos_token_id -5 and eos_token_id 99999, which the vocabulary of {VOCAB} tokens does not have; "
    "correct that there"
)
KEEP = ["--keep-networks", "2", "--allow-untrained"]  # random weights
ENVIRONMENT = {
    key: value
    for key, value in os.environ.items()
    if key not in (VERBOSITY, "PYTHONWARNINGS", "CI")
}


def odd_model(folder: Path, file: str = "config.json", **odd: Any) -> Path:
    save_tiny(folder)
    make_merging_tokenizer().save_pretrained(folder)
    path = folder / file
    content = json.loads(path.read_text()) | odd
    path.write_text(json.dumps(dict(sorted(content.items()))))
    return folder


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*WARM, "-m", "fbn_prune", *arguments],
        capture_output=True,
        text=True,
        env=ENVIRONMENT | environment,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("odd", [True, False], ids=["odd", "in order"])
def test_an_odd_config_is_one_line_and_in_all_that_the_run_writes_and_else_nothing_is_said(
    odd: bool, text: Path, tmp_path: Path
) -> None:
    model = odd_model(tmp_path / "in", **(ODD if odd else {}))
    done = run(*arguments(model, text, tmp_path / "out", *KEEP), "--json")
    assert done.returncode == 0
    lines = [line for line in done.stderr.splitlines() if ": done in " not in line]
    assert lines == ([f"warning: {SAID}"] if odd else [])
    assert json.loads(done.stdout)["warning"] == (SAID if odd else None)
    assert (f"**Warning:** {SAID}." in (tmp_path / "out" / "README.md").read_text()) == odd
    assert ("eos_token_id 99999" in (tmp_path / "out" / "report.html").read_text()) == odd


def test_transformers_is_heard_by_who_asks_for_it(text: Path, tmp_path: Path) -> None:
    model = odd_model(tmp_path / "in", **ODD)
    job = arguments(model, text, tmp_path / "out", *KEEP, "--dry-run")
    done = run(*job, TRANSFORMERS_VERBOSITY="warning")
    assert done.returncode == 0
    assert done.stderr.count(f"warning: {SAID}") == 1
    assert done.stderr.count("[transformers] Model config: eos_token_id") == 1


@pytest.mark.parametrize("command", ["dry run", "convert", "bundle"])
def test_also_where_transformers_was_imported_before(
    command: str, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, out = odd_model(tmp_path / "in", **ODD), tmp_path / "out"
    job = {
        "dry run": arguments(model, text, out, *KEEP, "--dry-run"),
        "convert": ["convert", "--model", str(model), "--output", str(out)],
        "bundle": ["bundle", "--model", str(model), "--output", str(out), f"again={model}"],
    }[command]
    transformers.logging.get_logger().warning_once.cache_clear()
    capfd.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(VERBOSITY, raising=False)
        code = _exit_code(job)
    printed = capfd.readouterr().err
    assert code == (2 if command == "bundle" else 0)  # a model that was not pruned is no task
    assert printed.count(f"warning: {SAID}\n") == 1
    assert "[transformers]" not in printed


@pytest.mark.parametrize(
    ("file", "odd", "said"),
    [
        ("config.json", {"pad_token_id": -1}, "config.json gives pad_token_id -1, which"),
        (
            "generation_config.json",
            {"eos_token_id": [1, VOCAB]},
            f"generation_config.json gives eos_token_id {VOCAB}, which",
        ),
        (
            "config.json",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0.5}},
            "config.json: `rope_parameters`'s factor field must be a float or int >= 1, got 0.5",
        ),
    ],
)
def test_what_is_odd_is_a_warning_of_ours_in_python(
    file: str, odd: dict[str, Any], said: str, tmp_path: Path
) -> None:
    model = odd_model(tmp_path / "in", file, **odd)
    with pytest.warns(ConfigWarning) as caught:
        Checkpoint.open(model)
    (message,) = [str(warning.message) for warning in caught]
    assert said in message
    assert len(message) < 400
    assert message.isprintable()


def test_what_a_warning_quotes_is_short_and_printable(tmp_path: Path) -> None:
    hostile = {"rope_type": "linear", "rope_theta": 1e4, "factor": "\x1b[2J" + 900 * "x"}
    model = odd_model(tmp_path / "in", rope_parameters=hostile)
    message = oddities(model, json.loads((model / "config.json").read_text()), VOCAB)
    assert message is not None
    assert "got ?[2Jxxx" in message
    assert len(message) < 400
    assert message.isprintable()


def test_a_generation_config_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    model = odd_model(tmp_path / "in")
    for content in ("[", "[" * 100_000, "\udcff"):
        (model / "generation_config.json").write_text(content, errors="surrogateescape")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert Checkpoint.open(model).oddities() is None


def test_warnings_of_ours_are_lines_and_those_of_others_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "warnoptions", [])
    monkeypatch.delenv(VERBOSITY, raising=False)
    with quiet_libraries():
        for _ in range(3):
            warnings.warn("odd\n thing", ConfigWarning, stacklevel=1)
            warnings.warn("of another's", UserWarning, stacklevel=1)
            warnings.warn("old", FutureWarning, stacklevel=1)
            transformers.logging.get_logger("transformers.models").error("no business of the user")
    assert capsys.readouterr().err == "warning: odd thing\n"


def test_a_command_leaves_logging_and_warnings_as_they_were(monkeypatch: Any) -> None:
    monkeypatch.delenv(VERBOSITY, raising=False)

    def state() -> tuple[Any, ...]:
        logger = logging.getLogger("transformers")
        return (
            logger.level,
            list(logger.handlers),
            warnings.showwarning,
            list(warnings.filters),
            os.environ.get(VERBOSITY),
        )

    before = state()
    assert _exit_code(["convert", "--model", "nowhere-at/all", "--output", "/nowhere/x"]) == 2
    assert state() == before


def test_an_import_changes_nothing() -> None:
    program = """
import importlib, logging, os, pkgutil, warnings
import transformers

def state():
    named = ("", "transformers", "huggingface_hub", "datasets", "matplotlib", "accelerate", "torch")
    loggers = {n: logging.getLogger(n) for n in named}
    return (
        {n: (log.level, log.propagate, list(log.handlers)) for n, log in loggers.items()},
        transformers.logging.is_progress_bar_enabled(),
        warnings.showwarning,
        [f for f in warnings.filters if "fbn" in str(f)],
        {k: v for k, v in os.environ.items() if k.startswith(("TRANSFORMERS", "HF_", "PYTHON"))},
    )

import torch, huggingface_hub, datasets, accelerate, matplotlib
before = state()
import fbn_prune
for found in pkgutil.walk_packages(fbn_prune.__path__, "fbn_prune."):
    if not found.name.startswith(("fbn_prune.export.vllm", "fbn_prune.__main__")):
        importlib.import_module(found.name)
assert state() == before, (before, state())
"""
    done = subprocess.run(
        [*WARM, "-c", program],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
