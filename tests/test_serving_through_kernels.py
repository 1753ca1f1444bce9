"""Serving goes through the Triton kernels where they run: here interpreted, on the CPU, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
CHOSEN = {
    # Copies of rows are for the CPU's own path.
    "test_many_tasks.py": "not room_for_copies and (generate or [phi3])",
}


@pytest.mark.parametrize("name", CHOSEN)
def test_what_holds_on_the_cpus_own_path_holds_through_the_kernels(name: str) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("--show-capture=no", "-k", CHOSEN[name], str(HERE / name)),
        ],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
