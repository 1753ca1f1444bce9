"""Generate parts of the site: tables of flags, recipes, copies of documents from elsewhere in the repository.

A page marks the place with `<!-- cli -->`, `<!-- recipes -->` or `<!-- file: PATH -->`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from fbn_prune.cli.app import build_app

ROOT = Path(__file__).parents[2]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marks of one page; mkdocs calls this for every page."""
    markdown = markdown.replace("<!-- cli -->", "\n".join(_commands()))
    markdown = markdown.replace("<!-- recipes -->", "\n".join(_recipes()))
    return re.sub(r"<!-- file: (\S+) -->", lambda match: _document(match[1]), markdown)


def _commands() -> Iterator[str]:
    group = typer.main.get_command(build_app())
    yield from _command("fbn-prune", group)
    for name, command in sorted(group.commands.items()):  # type: ignore[attr-defined]
        parts = getattr(command, "commands", None) or {"": command}
        for part, inner in sorted(parts.items()):
            yield from _command(f"fbn-prune {name} {part}".rstrip(), inner)


def _command(name: str, command: Any) -> Iterator[str]:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    usage = " ".join([name, *(p.metavar or p.name.upper() for p in arguments)])
    yield from (
        f"## {name}",
        "",
        " ".join((command.help or "").split()),
        "",
        f"```\n{usage} [FLAGS]\n```",
        "",
    )
    options = [
        p for p in command.params if p.param_type_name == "option" and "--help-all" not in p.opts
    ]
    panels = dict.fromkeys(getattr(option, "rich_help_panel", None) or "" for option in options)
    yield from ("| flag | meaning |", "|---|---|")
    for panel in panels:
        if panel:
            yield f"| **{panel}** | |"
        for option in options:
            if (getattr(option, "rich_help_panel", None) or "") == panel:
                yield f"| `{'`, `'.join(option.opts)}` | {_description(option)} |"
    yield ""


def _description(option: Any) -> str:
    text = " ".join((option.help or "").split()).replace("|", "\\|")
    default = option.default
    known = default not in (None, False, (), []) and not callable(default)
    return f"{text} Default: `{default}`." if known else text


def _recipes() -> Iterator[str]:
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        yield from (f"## {path.stem}", "", "```yaml", path.read_text("utf-8").rstrip(), "```", "")


def _document(name: str) -> str:
    """A Markdown file with its links to other files turned into text, since the site holds only its own pages."""
    text = (ROOT / name).read_text("utf-8")
    return re.sub(r"\[([^\]]+)\]\((?!https?://|#)[^)]+\)", r"\1", text)
