"""Entry point of the command line: one line and an exit code for everything that ends a command early.

The commands are imported inside the handler, so that an interruption during the imports is handled as well.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from fbn_prune.cli.streams import open_streams, say
from fbn_prune.distributed import is_first
from fbn_prune.errors import FbnPruneError


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 bad usage, 129 hung up, 130 interrupted, 143 terminated."""
    open_streams()
    code = _exit_code(sys.argv[1:] if arguments is None else arguments)
    # Everything is done and said: a late Ctrl-C must not make a traceback of what libraries do at the end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)


def _exit_code(arguments: list[str]) -> int:
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    with _signals_raise():
        try:
            return _run(arguments)
        except FbnPruneError as error:
            return _fail(error, error.exit_code, debug)
        except (Stopped, KeyboardInterrupt) as error:
            number = error.number if isinstance(error, Stopped) else signal.SIGINT
            return _fail(f"{_STOPS[number]}; {_leftovers(error)}", 128 + number, debug)
        except MemoryError as error:
            line = f"out of memory: lower --tokens or --context; {_leftovers(error)}"
            return _fail(line, 1, debug)
        except OSError as error:
            place = f": {error.filename}" if error.filename else ""
            return _fail(f"{error.strerror or error}{place}", 1, debug)
        except Exception as error:
            if hasattr(error, "format_message"):  # a usage error from typer
                return _fail(error.format_message(), 2, debug)
            hint = "" if debug else " (--debug shows where)"
            return _fail(f"{type(error).__name__}: {error}{hint}", 1, debug)


def _run(arguments: list[str]) -> int:
    # Progress bars of other libraries would disturb our own.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Must be set before torch loads OpenMP: threads that wait by spinning would take the cores from the thread that
    # they wait for when another program uses some of the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import typer

    from fbn_prune.cli.app import build_app
    from fbn_prune.cli.quiet import quiet_libraries

    with quiet_libraries():
        command = typer.main.get_command(build_app())
        try:
            # The command's own `main` would end an interruption and a broken pipe without a word.
            with command.make_context("fbn-prune", arguments) as context:
                code = command.invoke(context)
        except typer.Exit as ended:
            code = ended.exit_code
    return code if isinstance(code, int) else 0


_STOPS = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "terminated",
    signal.SIGHUP: "the terminal was closed",
}


class Stopped(BaseException):
    """Raised by the signals that end a process, so that temporary folders are removed before."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = signal.Signals(number)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Turn the signals that end a process into exceptions; those that the caller ignores (nohup) stay ignored."""
    before = {number: signal.getsignal(number) for number in _STOPS}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, _stop)
    native = sys.unraisablehook

    def send_again(dropped: sys.UnraisableHookArgs) -> None:
        """Send a signal again whose exception Python had to drop, as it does in a weak reference's callback."""
        if isinstance(dropped.exc_value, Stopped):
            arguments = (os.getpid(), dropped.exc_value.number)
            threading.Timer(0.01, os.kill, arguments).start()
        else:
            native(dropped)

    sys.unraisablehook = send_again
    try:
        yield
    finally:
        sys.unraisablehook = native
        for number, handler in before.items():
            if handler is not None:  # None: not set from Python
                signal.signal(number, handler)


def _fail(message: object, code: int, debug: bool) -> int:
    if code > 128:  # a second Ctrl-C must not interrupt the message about the first
        for number in _STOPS:
            signal.signal(number, signal.SIG_IGN)
    if debug:
        import traceback

        say(traceback.format_exc().rstrip())
    # All processes refuse the input for the same reason, and the launcher stops them together: one message is enough.
    if (code == 2 or code > 128) and not is_first():
        return code
    line = " ".join(str(message).split())
    say(f"fbn-prune: error: {line}")
    return code


def _leftovers(error: BaseException | None) -> str:
    """Return what an interrupted run has left on disk."""
    while error is not None:
        if written := getattr(error, "written", None):
            return f"{written} is complete"
        if getattr(error, "resumes", False):
            return "no output was written; the same command continues from the last finished stage"
        error = error.__cause__ or error.__context__
    return "nothing was written"
