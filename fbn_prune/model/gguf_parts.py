"""Find the GGUF file that a path means, and the other parts of a split one, without opening it."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from fbn_prune.errors import InvalidInput
from fbn_prune.model.gguf_header import MAGIC
from fbn_prune.model.headers import INDEX_FILE, SINGLE_FILE

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_PROJECTOR = "mmproj"
"""First word in the names of files that hold a vision encoder instead of a model."""


def find_gguf(path_or_hub_id: str | Path) -> Path | None:
    """Return the GGUF file that a path means: the file itself, or the only one in a folder without safetensors.

    Of a split file this is the first part. Returns None if the path means something else.

    Raises
    ------
    InvalidInput
        The folder holds several GGUF files, or there is no such file.
    """
    path = Path(path_or_hub_id).expanduser()
    named = path.suffix.lower() == ".gguf"
    if path.is_file():
        return _first_part(path) if named or _begins_as_gguf(path) else None
    if not path.is_dir():
        if named:
            raise InvalidInput(f"there is no file {path}; give a GGUF file or a model folder")
        return None
    if any((path / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)):
        return None
    files = sorted(file for file in path.glob("*.gguf") if not file.name.startswith(_PROJECTOR))
    firsts = list(dict.fromkeys(_first_part(file) for file in files))
    if len(firsts) > 1:
        names = ", ".join(file.name for file in firsts[:5]) + (", ..." if len(firsts) > 5 else "")
        raise InvalidInput(
            f"{path} holds {len(firsts)} GGUF files ({names}); give one of them, as {firsts[0]}"
        )
    return firsts[0] if firsts else None


def _begins_as_gguf(path: Path) -> bool:
    with suppress(OSError), path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC
    return False


def _first_part(path: Path) -> Path:
    match = _PART.fullmatch(path.name)
    return path if match is None else _part(path, match, 1)


def parts_of(path: Path) -> list[Path]:
    """Return all parts of a split file whose first part this is, whether they exist or not; else the file alone."""
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    return [_part(path, match, number) for number in range(1, int(match["count"]) + 1)]


def _part(path: Path, match: re.Match[str], number: int) -> Path:
    return path.with_name(f"{match['stem']}-{number:05}-of-{match['count']}.gguf")
