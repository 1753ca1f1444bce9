"""The documentation site builds without a warning, its examples run, and it names every flag and recipe."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from fbn_prune.pruning.criteria import CRITERIA
from fbn_prune.recipe import Recipe

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted([*ROOT.glob("eval/*/*.py"), *ROOT.glob("kernels/bench/*.py")])
PAGES = sorted((ROOT / "docs").glob("*.md"))
PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    pytest.importorskip("material")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


def test_every_page_is_built_and_reachable(site: Path) -> None:
    front = (site / "index.html").read_text("utf-8")
    for page in PAGES:
        if page.stem != "index":
            assert (site / page.stem / "index.html").is_file()
            assert f'href="{page.stem}/"' in front, f"name {page.name} in the nav of mkdocs.yml"


def test_the_command_line_page_has_every_flag_and_command(site: Path) -> None:
    page = (site / "cli" / "index.html").read_text("utf-8")
    for key in Recipe.model_fields:
        assert f"<code>--{key.replace('_', '-')}</code>" in page
    for command in ("run", "convert", "evaluate", "compare", "--push-to-hub"):
        assert command in page


def test_the_recipes_page_has_every_recipe(site: Path) -> None:
    page = (site / "recipes" / "index.html").read_text("utf-8")
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        assert f'id="{recipe.stem}"' in page


def test_the_examples_of_the_python_page_run_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "api.md"
    names: dict[str, object] = {}
    for example in PYTHON.findall(page.read_text("utf-8")):
        exec(compile(example, str(page), "exec"), names)
    CRITERIA.pop("output-norm")  # the page registers it; other tests of this process go without
    for made in ("small/config.json", "pruned/config.json", "pruned.gguf"):
        assert (tmp_path / made).is_file()


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_every_file_that_a_page_names_or_links_is_there(page: Path) -> None:
    text = page.read_text("utf-8")
    folders = "eval|tests|recipes|examples|kernels|docs|fbn_prune"
    named = re.findall(rf"`((?:{folders})/[\w/.*-]+)", text)
    linked = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    for folder, name in [
        *((ROOT, name) for name in named),
        *((page.parent, name) for name in linked),
    ]:
        assert any(folder.glob(name)), name


def test_the_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) < 150


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_every_script_imports_names_that_exist(script: Path) -> None:
    """Scripts run for minutes or need what is not installed here, so their imports of our own names are looked up."""
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fbn_"):
            module = import_module(str(node.module))
            for alias in node.names:
                if not hasattr(module, alias.name):
                    import_module(f"{node.module}.{alias.name}")
