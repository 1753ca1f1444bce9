"""Python processes that start warm: `warm_python.py -m MODULE ...` is `python -m MODULE ...` without the slow imports.

Torch, and what transformers imports of others, take seconds to import, and many tests look at a process from the
outside. A server imports these libraries once for all workers and forks itself for every process that is asked for.
It imports nothing of ours, and nothing of transformers, huggingface_hub and datasets, which read the environment when
they are imported: each process imports those itself.

A process so started is a process of its own: arguments, environment, folder, standard files, signals and exit code are
what its caller gives and sees. But what the interpreter and torch read as they start (`PYTHONHASHSEED`,
`OMP_NUM_THREADS`) is the server's. Tests of such settings, of imports, or of a missing library start `sys.executable`.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

WARM = (sys.executable, "-IS", __file__) if hasattr(os, "pidfd_open") else (sys.executable,)
"""Stands in for `sys.executable` in a command."""

ADDRESS = "FBN_PRUNE_WARM_PYTHON"
"""The variable that names the server's socket."""

SLOW = (
    "jinja2",
    "matplotlib.backends.backend_svg",
    "pyarrow.dataset",
    "pydantic",
    "safetensors.torch",
    "scipy.optimize",
    "scipy.stats",
    "sklearn.metrics",
    "tokenizers",
    "torch._dynamo.aot_compile",
    "torch._inductor.standalone_compile",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.launcher.api",
    "torch.distributed.tensor",
    "typer.main",
    "yaml",
)
NO_THREADS = {  # a fork would have none of them
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}
READ_AT_THE_START = ("PYTHON", "TRITON_")
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


# In pytest:


@contextmanager
def server() -> Iterator[None]:
    """Provide a server for this process and its workers; it imports nothing before it is asked for a process."""
    import subprocess
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        os.environ[ADDRESS] = f"{folder}/socket"
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(os.environ[ADDRESS])
        listening.listen()
        process = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(listening.fileno())],
            stdin=subprocess.PIPE,  # ends when this process does, and the server with it
            env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
            | NO_THREADS,
            pass_fds=[listening.fileno()],
            start_new_session=True,  # Ctrl-C is for pytest
        )
        listening.close()  # the server alone has it: should that fail, nobody waits for it
        try:
            yield
        finally:
            process.communicate()
            del os.environ[ADDRESS]


# In the process that a test starts, which stands for the fork:


def ask(arguments: list[str]) -> int:
    """Have a process forked that has these arguments and all else of this process; return its exit code."""
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # until there is a process for them
    ignored = [number for number in FORWARDED if signal.getsignal(number) == signal.SIG_IGN]
    request = {"arguments": arguments, "environment": dict(os.environ)}
    request |= {"folder": os.getcwd(), "ignored": ignored}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ[ADDRESS])
        line = json.dumps(request).encode() + b"\n"
        sent = socket.send_fds(connection, [line], [0, 1, 2])
        connection.sendall(line[sent:])
        answers = connection.makefile()
        pid = int(answers.readline())

        def forward(number: int, _: object) -> None:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

        for number in FORWARDED:
            if number not in ignored:
                signal.signal(number, forward)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        code = int(answers.readline())
    if code < 0:  # a signal
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


# In the server:


def serve(listening: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Fork for every request until pytest ends; return, in the forks alone, the request and its standard files."""
    running: dict[int, tuple[int, socket.socket]] = {}
    with selectors.DefaultSelector() as selector, listening:
        selector.register(0, selectors.EVENT_READ)
        selector.register(listening, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                pid = key.data
                if key.fileobj == 0:
                    os._exit(0)
                elif key.fileobj is listening:
                    connection, _ = listening.accept()
                    line, files, _, _ = socket.recv_fds(connection, 1 << 20, 3)
                    while not line.endswith(b"\n"):
                        line += connection.recv(1 << 20)
                    import_slow_libraries()
                    pid = os.fork()
                    if pid == 0:
                        for _, other in [*running.values(), (0, connection)]:
                            other.close()
                        return json.loads(line), files
                    for file in files:
                        os.close(file)
                    connection.sendall(b"%d\n" % pid)
                    ended = os.pidfd_open(pid)
                    running[pid] = ended, connection
                    selector.register(ended, selectors.EVENT_READ, pid)
                    selector.register(connection, selectors.EVENT_READ, pid)
                elif pid in running and key.fileobj is running[pid][1]:  # who asked was killed
                    selector.unregister(key.fileobj)
                    os.kill(pid, signal.SIGKILL)
                elif pid in running:
                    ended, connection = running.pop(pid)
                    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                    with suppress(OSError, KeyError):
                        connection.sendall(b"%d\n" % code)
                        selector.unregister(connection)
                    connection.close()
                    selector.unregister(ended)
                    os.close(ended)


def import_slow_libraries() -> None:
    import gc
    from importlib import import_module

    if SLOW[0] in sys.modules:
        return
    for name in SLOW:
        import_module(name)
    gc.freeze()  # the forks share it
    assert len(os.listdir("/proc/self/task")) == 1, "a fork has none of the threads"
    theirs = {"transformers", "huggingface_hub", "datasets", "fbn_prune"} & set(sys.modules)
    assert not theirs, theirs


# In the fork:


def become(request: dict[str, Any], files: list[int]) -> None:
    """Be what `python` with these arguments is."""
    import runpy

    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
    for number in FORWARDED:
        usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in request["ignored"] else usual)
    environment = request["environment"]
    for name in {**os.environ, **environment}:
        if name.startswith(READ_AT_THE_START) and name != "PYTHONPATH":
            given, here = environment.get(name), os.environ.get(name)
            if given != here:
                raise ValueError(f"{name} is {given}, which a process that starts warm cannot have")
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(request["folder"])
    path = environment.get("PYTHONPATH")
    sys.path[:1] = [os.getcwd(), *(path.split(os.pathsep) if path else [])]
    option, *rest = request["arguments"]
    if option in ("-m", "-c"):
        what, *rest = rest
        sys.argv = [option, *rest]
    else:
        sys.argv = [option, *rest]
        sys.path[0] = os.path.dirname(os.path.abspath(option))
    if option == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    elif option == "-c":
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(option, run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        become(*serve(socket.socket(fileno=int(sys.argv[2]))))
    else:
        sys.exit(ask(sys.argv[1:]))
