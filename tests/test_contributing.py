"""The worked examples of CONTRIBUTING.md run as they stand: a family, a criterion, a command, an export."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from fbn_prune.model import families
from fbn_prune.pruning import criteria

PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"```python ([a-z ]+)\n(.*?)```", PAGE, re.DOTALL))
FILES = {"command": ("fbn_prune.cli", "layers.py"), "export": ("fbn_prune.export", "to_numpy.py")}
"""Examples that are modules: the package that finds them, and the file."""


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """The registries are as they were when the example has run."""
    registries = (families._BY_MODEL_TYPE, criteria.CRITERIA)
    saved = [dict(registry) for registry in registries]
    yield
    for registry, before in zip(registries, saved, strict=True):
        registry.clear()
        registry.update(before)  # type: ignore[arg-type]


@pytest.mark.parametrize("example", ["family", "criterion", "command", "export"])
def test_the_worked_example_runs(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if example in FILES:
        package, file = FILES[example]
        (tmp_path / file).write_text(BLOCKS[example], encoding="utf-8")
        module = import_module(package)
        monkeypatch.setattr(module, "__path__", [*module.__path__, str(tmp_path)])
    else:
        exec(compile(BLOCKS[example], f"{example} of CONTRIBUTING.md", "exec"), {})
    test = BLOCKS[f"{example} test"]
    exec(compile(test, f"{example} test of CONTRIBUTING.md", "exec"), {})
