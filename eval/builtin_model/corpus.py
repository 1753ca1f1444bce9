"""Collect prose and code from the documentation and the standard library of a Python installation.

Prose is `pydoc_data.topics` (the language reference) and the docstrings of the standard library; code is the source of
the same modules without those docstrings, so that the two skills share no sentence. A module held out for one skill is
held out for the other.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType

from builtin_model.skills import is_held_out

_FOLDERS = "test tests idle_test site-packages dist-packages idlelib lib2to3 pydoc_data encodings __pycache__"
EXCLUDED = frozenset(_FOLDERS.split())
SHORTEST_DOCSTRING = 60
SHORTEST_DOCUMENT = 400


@dataclass(frozen=True)
class Document:
    """A text, and the name that decides whether it is held out."""

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        return is_held_out(self.name)


@dataclass(frozen=True)
class Corpus:
    """All prose and code of the running Python, in the order of names."""

    prose: list[Document]
    code: list[Document]

    def documents(self, skill: str, *, held_out: bool) -> list[Document]:
        """Return the `prose` or `code` documents of one side of the split."""
        return [d for d in getattr(self, skill) if d.held_out == held_out]


def collect() -> Corpus:
    """Read the documentation and the standard library of the running Python."""
    prose = [Document(f"topic {name}", text) for name, text in sorted(topics.items())]
    code: list[Document] = []
    seen: set[str] = set()
    for name, source in standard_library():
        tree = ast.parse(source)
        paragraphs = [d for d in docstrings(tree) if d not in seen]
        seen.update(paragraphs)
        prose.append(Document(name, "\n\n".join(paragraphs)))
        code.append(Document(name, without_docstrings(source, tree)))
    for name in sorted(sys.builtin_module_names):
        paragraphs = [d for d in builtin_docstrings(importlib.import_module(name)) if d not in seen]
        seen.update(paragraphs)
        prose.append(Document(name, "\n\n".join(paragraphs)))
    return Corpus(_long_enough(prose), _long_enough(code))


def standard_library() -> Iterator[tuple[str, str]]:
    """Yield the name and source of every standard library module that is neither a test nor a table."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if path.stem.startswith("_sysconfigdata") or not EXCLUDED.isdisjoint(relative.parts[:-1]):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue
        yield ".".join(relative.with_suffix("").parts), source


def docstrings(tree: ast.Module) -> list[str]:
    """Return the long docstrings of a module, its classes and functions, in source order."""
    found = (ast.get_docstring(node) for node, _ in _documented(tree))
    return [d for d in found if d and len(d) >= SHORTEST_DOCSTRING]


def builtin_docstrings(module: ModuleType) -> list[str]:
    """Return the docstrings of a built-in module and of its members."""
    objects: list[object] = [module]
    for _, member in sorted(vars(module).items()):
        if inspect.isclass(member):
            objects += [member, *(value for _, value in sorted(vars(member).items()))]
        elif inspect.isroutine(member):
            objects.append(member)
    found = (d for d in map(_docstring, objects) if d)
    return [d for d in dict.fromkeys(found) if len(d) >= SHORTEST_DOCSTRING]


def without_docstrings(source: str, tree: ast.Module) -> str:
    """Return the source without the lines of its docstrings; a docstring that is a whole body stays."""
    lines = source.splitlines(keepends=True)
    for node, docstring in _documented(tree):
        if len(node.body) > 1:
            for number in range(docstring.lineno - 1, docstring.end_lineno or docstring.lineno):
                lines[number] = ""
    return "".join(lines)


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _documented(tree: ast.Module) -> Iterator[tuple[Documented, ast.stmt]]:
    for node in ast.walk(tree):
        if isinstance(node, Documented) and ast.get_docstring(node, clean=False):
            yield node, node.body[0]


def _docstring(thing: object) -> str | None:
    # An instance without a docstring returns that of its class.
    text = getattr(thing, "__doc__", None)
    if not isinstance(text, str) or text == type(thing).__doc__:
        return None
    return inspect.cleandoc(text)


def _long_enough(documents: list[Document]) -> list[Document]:
    return [d for d in documents if len(d.text) >= SHORTEST_DOCUMENT]
