"""Claims about signals, readers and terminals: each ends in one line, and none undoes work that is finished."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table
from small_runs import arguments

from fbn_prune.cli import console, prune, streams
from fbn_prune.cli.main import _exit_code
from fbn_prune.errors import FbnPruneError

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

START = "import sys; from fbn_prune.cli.main import main; "


def child(*command: str, **how: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command],
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        # A shell's background job ignores interrupts, and its children inherit that.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        **how,
    )


def test_ctrl_c_during_the_imports_is_one_line(tmp_path: Path) -> None:
    # The interrupt comes while the commands are imported, wherever that is slow.
    program = (
        "import builtins, os, signal, sys\n"
        "from fbn_prune.cli.main import main\n"
        "native = builtins.__import__\n"
        "def slow(name, *rest):\n"
        "    if name == 'typer':\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return native(name, *rest)\n"
        "builtins.__import__ = slow\n"
        "main(['--keep-networks', '4'])\n"
    )
    process = child("-c", program)
    error = process.communicate(timeout=120)[1]
    assert error == "fbn-prune: error: interrupted; nothing was written\n"
    assert process.returncode == 130


def test_an_interrupt_that_python_drops_is_sent_again() -> None:
    # A weak reference's callback cannot raise: Python prints such an exception and goes on.
    program = (
        "import os, signal, sys, time, weakref\n"
        "from fbn_prune.cli import main\n"
        "class Thing: pass\n"
        "def drop(_):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "def run(arguments):\n"
        "    thing = Thing()\n"
        "    watched = weakref.ref(thing, drop)\n"
        "    del thing\n"
        "    time.sleep(60)\n"
        "main._run = run\n"
        "main.main([])\n"
    )
    process = child("-c", program)
    assert process.communicate(timeout=50)[1].count("\n") == 1
    assert process.returncode == 130


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_run_says_that_the_same_command_goes_on(
    number: signal.Signals, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: Any, **__: Any) -> None:
        try:
            signal.raise_signal(number)
        except BaseException as error:
            error.resumes = True  # type: ignore[attr-defined]
            raise

    monkeypatch.setattr(prune, "command", work)
    inherited = signal.signal(number, signal.SIG_DFL)  # the tests may run where it is ignored
    try:
        assert _exit_code(["--keep-networks", "2"]) == 128 + number
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, inherited)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "the same command continues from the last finished stage" in said


def test_nohup_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setattr(prune, "command", lambda *_, **__: signal.raise_signal(signal.SIGHUP))
        assert _exit_code(["--keep-networks", "2"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


LOOKS = """
from rich.table import Table
from fbn_prune.cli import console
from fbn_prune.cli.streams import finished
from fbn_prune.cli import prune

def command(*_, **__):
    console.display().note("working")
    table = Table(title="ä")
    table.add_column("x")
    with finished("out"):
        console.print_table(table)
        console.print_line("ä" + 100_000 * "x")
    console.display().note("after")

prune.command = command
main(["--keep-networks", "2"])
"""


@pytest.mark.parametrize(
    "reader", ["closed", "gone", "full", "full, unbuffered", "no stderr", "ascii"]
)
def test_no_reader_makes_a_finished_run_fail(reader: str) -> None:
    shell = {
        "closed": '"$0" -c "$1" >&-',
        "gone": '"$0" -c "$1" | true; exit ${PIPESTATUS[0]}',
        "full": '"$0" -c "$1" >/dev/full',
        "full, unbuffered": 'PYTHONUNBUFFERED=1 "$0" -c "$1" >/dev/full',
        "no stderr": '"$0" -c "$1" 2>&- >/dev/null',
        "ascii": 'PYTHONIOENCODING=ascii PYTHONUTF8=0 "$0" -c "$1"',
    }[reader]
    done = subprocess.run(
        ["bash", "-c", shell, sys.executable, START + LOOKS],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = [] if reader == "no stderr" else ["working", "after"]
    if reader.startswith("full"):
        lost = "warning: cannot print the result: No space left on device; out is complete"
        said.insert(1, lost)
    assert done.stderr.splitlines() == said
    if reader == "ascii":
        assert done.stdout.isascii()
        assert "\\xe4xxx" in done.stdout


def test_a_command_that_only_prints_fails_if_it_cannot(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", streams.Outlet(full, patient=False))
        assert _exit_code(["--version"]) == 1
    assert "cannot print the result: No space left on device" in capsys.readouterr().err


def test_json_on_an_ascii_terminal_is_escaped_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    console.print_json({"output": "Modell-ü"})
    out.seek(0)
    assert json.loads(out.read()) == {"output": "Modell-ü"}


@pytest.mark.parametrize("name", ["exp [final]", "ck[/INST]", "a [bold]b", ":cat:", "x\\[y]"])
def test_a_name_is_no_markup(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = Table(title=f"{name} -> out")
    table.add_column(name)
    table.add_row(name)
    console.print_table(table)
    assert capsys.readouterr().out.count(name) == 3
    shown = io.StringIO()
    terminal = partial(Console, file=shown, force_terminal=True, width=200, color_system=None)
    monkeypatch.setattr(console, "Console", lambda **how: terminal(**{**how, "width": 200}))
    display = console.TerminalDisplay()
    with display.stage(name, 2, name) as advance:
        advance(1)
        display.note(name)
    assert shown.getvalue().count(name) >= 3


def test_paths_with_brackets_go_through_a_whole_run(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "ck[/INST]"
    assert _exit_code(arguments(tiny, text, output, "--keep-networks", "2")) == 0
    assert "ck[/INST]" in capsys.readouterr().out.replace("\n", "")
    assert _exit_code(["inspect", str(output)]) == 0
    assert "ck[/INST]" in capsys.readouterr().out.replace("\n", "")


def test_at_20_columns_every_number_is_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = partial(Console, width=20)
    monkeypatch.setattr(console, "Console", lambda **how: narrow(**{**how, "width": 20}))
    table = Table(title="small")
    table.add_column("")
    for heading in ("before", "after"):
        table.add_column(heading, justify="right")
    table.add_row("parameters", "1,234,567,890", "234,567,890")
    console.print_table(table)
    shown = capsys.readouterr().out
    assert "parameters\n  before: \n1,234,567,890\n  after: 234,567,890" in shown


def test_the_upload_comes_before_the_printing_and_the_result_is_shown_if_it_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fbn_prune import api

    order: list[str] = []

    class Result:
        def to_json(self) -> dict[str, Any]:
            order.append("printed")
            return {"done": True}

    def push(*_: Any, **__: Any) -> str:
        order.append("pushed")
        raise FbnPruneError("the Hub is down")

    monkeypatch.setattr(api, "check_push", lambda *_, **__: None)
    monkeypatch.setattr(api, "prune_checkpoint", lambda **_: Result())
    monkeypatch.setattr(api, "push_to_hub", push)
    job = ["--keep-networks", "2", "--output", str(tmp_path / "out"), "--push-to-hub", "me/it"]
    assert _exit_code([*job, "--json"]) == 1
    assert order == ["pushed", "printed"]
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"done": True}
    assert "the Hub is down" in printed.err
