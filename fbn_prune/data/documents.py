"""Read the documents of a calibration source: a text file, a folder, JSON lines, a Hub data set, or the built-in text.

Reading stops at a given number of characters, so a huge source takes no longer than a small one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from fbn_prune.data.given import GivenData
from fbn_prune.data.text_files import is_text, require_source
from fbn_prune.errors import InvalidInput

LONGEST_LINE = 64 * 2**20
"""Most characters of a JSON line, so that a file without line ends is not read into memory as a whole."""


def read_documents(source: str | GivenData, *, characters: int, seed: int = 0) -> Iterator[str]:
    """Yield the documents of one source, at most `characters` characters in total.

    A text file is one document; JSON lines have one document in each line. A folder yields the documents of its
    ``*.txt``, ``*.md``, ``*.py``, ``*.rst`` and ``*.jsonl`` files.

    Parameters
    ----------
    source
        Data given in Python, ``builtin``, ``hf:DATASET[:CONFIG[:SPLIT[:FIELD]]]``, a folder, a text file, or
        ``FILE.jsonl[:FIELD]``.
    characters
        The last document is truncated at this total.
    seed
        Seed of the random order of a folder's files.

    Raises
    ------
    InvalidInput
        The source is missing, unreadable or not UTF-8, or a JSON line has no text in the field.
    """
    left = characters
    for document in _documents_of(source, characters, seed):
        if left <= 0:
            return
        if not document.strip():
            continue
        yield document[:left]
        left -= len(document)


def _documents_of(source: str | GivenData, characters: int, seed: int) -> Iterator[str]:
    if isinstance(source, GivenData):
        yield from source.documents
    elif source == "builtin":
        from fbn_prune.data import builtin

        files = builtin.calibration_files()
        for path in files.values():
            yield from read_documents(str(path), characters=characters // len(files), seed=seed)
    elif source.startswith("hf:"):
        yield from _hub_documents(source)
    else:
        yield from _local_documents(source, characters, seed)


def _local_documents(source: str, characters: int, seed: int) -> Iterator[str]:
    path, field = _split_field(source)
    if path.is_dir():
        suffixes = {".txt", ".md", ".py", ".rst", ".jsonl"}
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in suffixes)
        if not files:
            raise InvalidInput(f"calibration folder {path} has no .txt, .md, .rst, .py or .jsonl")
        random.Random(seed).shuffle(files)
        for file in files:
            yield from _local_documents(str(file), characters, seed)
    else:
        require_source(source)
        try:
            with path.open(encoding="utf-8") as opened:
                if path.suffix == ".jsonl":
                    yield from _json_lines(opened, path, field)
                else:
                    yield opened.read(characters)
        except UnicodeDecodeError as error:
            raise InvalidInput(f"calibration file {path} is not UTF-8: {error.reason}") from None
        except OSError as error:
            raise InvalidInput(f"cannot read calibration file {path}: {error.strerror}") from None


def _split_field(source: str) -> tuple[Path, str]:
    head, separator, field = source.rpartition(":")
    if separator and head.endswith(".jsonl"):
        return Path(head), field
    return Path(source), "text"


def _json_lines(file: TextIO, path: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), ""), 1):
        if len(line) == LONGEST_LINE:
            raise InvalidInput(f"{path}, line {number}: longer than {LONGEST_LINE:,} characters")
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError, ValueError):
            raise InvalidInput(f"{path}, line {number}: not JSON") from None
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            have = ", ".join(sorted(record)) if isinstance(record, dict) else "no object"
            raise InvalidInput(
                f"{path}, line {number}: no text field {field!r} (found: {have}); "
                f"give the field's name as {path}:FIELD"
            )
        if not is_text(record[field]):
            raise InvalidInput(
                f"{path}, line {number}: {field!r} contains a NUL or a lone surrogate"
            )
        yield record[field]


def _hub_documents(source: str) -> Iterator[str]:
    """Stream the documents of `hf:dataset[:config[:split[:field]]]`."""
    name, *rest = source.removeprefix("hf:").split(":")
    config, split, field = [*rest, "", "", ""][:3]
    split, field = split or "train", field or "text"
    if not name or len(rest) > 3:
        raise InvalidInput(f"{source!r}: the form is hf:dataset[:config[:split[:field]]]")
    import datasets

    try:
        rows = datasets.load_dataset(name, config or None, split=split, streaming=True)
        for row in rows:
            if not isinstance(row.get(field), str):
                raise InvalidInput(
                    f"{source}: no text in {field!r}; fields: {', '.join(sorted(row))}"
                )
            yield row[field]
    except InvalidInput:
        raise
    except Exception as error:  # the Hub, the network and the files raise many types of error
        line = " ".join(str(error).split())
        raise InvalidInput(f"cannot load data set {source}: {line[:300]}") from None
