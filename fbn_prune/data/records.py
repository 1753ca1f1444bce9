"""Read the records of a file one after another: JSON, CSV and TSV, Parquet and Arrow.

Nothing is read that is not used, so a file may be larger than memory. JSON is read here, and not by `datasets`, because
that needs the same types in all records, reads a list as a whole, and does not say in which line a fault lies. CSV is
read by the standard library, because `datasets` reads the texts "NA" and "null" as missing and numbers as numbers.
"""

from __future__ import annotations

import csv
import glob
import json
import logging
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, TextIO

from fbn_prune.data.file_kinds import OpenFile
from fbn_prune.errors import InvalidInput

LONGEST_LINE = 64 * 2**20
"""Most characters of a line or a JSON value, so that a file without line ends is not read into memory as a whole."""

_READ = 2**16
_DELIMITERS = (",", ";", "\t", "|")

Record = tuple[str, Any]
"""Where a record is, for error messages, and its value."""


def read_records(
    file: OpenFile, *, is_record: Callable[[dict[str, Any]], bool] = lambda record: False
) -> Generator[Record, None, None]:
    """Yield the records of an open file with the places where they are.

    Parameters
    ----------
    file
        A file of any kind but plain text.
    is_record
        Whether an object in a .json file is a record. Any other object is taken for one that holds a list of records.

    Raises
    ------
    InvalidInput
        The file is damaged, or a record cannot be read.
    UnicodeDecodeError
        The text is not UTF-8.
    """
    if file.kind in ("parquet", "arrow"):
        yield from _table(file.path, file.kind)
    elif file.kind in ("csv", "tsv"):
        yield from _separated(file.text(newline=""), file.path, file.kind == "tsv")
    else:
        text = file.text()
        first = _line(text, file.path, 1)
        if file.suffix == ".json" or first.lstrip().startswith("["):
            yield from _json_values(first, text, file.path, is_record)
        else:
            yield from json_lines(text, file.path, first)


def _line(file: TextIO, path: Path, number: int) -> str:
    line = file.readline(LONGEST_LINE)
    if len(line) == LONGEST_LINE:
        raise InvalidInput(
            f"{path}, line {number}: longer than {LONGEST_LINE:,} characters; write each record on a line of its own"
        )
    return line


def _lines(first: str, file: TextIO, path: Path) -> Iterator[tuple[int, str]]:
    number, line = 1, first
    while line:
        yield number, line
        number += 1
        line = _line(file, path, number)


def json_lines(file: TextIO, path: Path, first: str | None = None) -> Iterator[Record]:
    """Yield the value in each line that is not empty; `first` is a first line that was read already.

    Raises
    ------
    InvalidInput
        A line is too long, or not JSON.
    """
    first = _line(file, path, 1) if first is None else first
    for number, line in _lines(first, file, path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (RecursionError, ValueError):
            raise InvalidInput(
                f"{path}, line {number}: not JSON; correct the line, or remove it"
            ) from None
        yield f"{path}, line {number}", record


def _json_values(
    first: str, file: TextIO, path: Path, is_record: Callable[[dict[str, Any]], bool]
) -> Iterator[Record]:
    """Yield the elements of a list or the values one after another, whatever the line ends between them."""
    for line, value in _values(first, file, path):
        where = f"{path}, line {line}"
        inner = _records_inside(value) if isinstance(value, dict) and not is_record(value) else None
        if inner is None:
            yield where, value
        else:
            key, records = inner
            for index, record in enumerate(records):
                yield f"{path}, {key}[{index}]", record


def _records_inside(value: dict[str, Any]) -> tuple[str, list[Any]] | None:
    """Return the only list of objects in an object, as in {"data": [{...}, ...]}; None if there is no such list."""
    lists = [
        (key, inner)
        for key, inner in value.items()
        if isinstance(inner, list) and inner and all(isinstance(one, dict) for one in inner)
    ]
    return lists[0] if len(lists) == 1 else None


def _values(text: str, file: TextIO, path: Path) -> Iterator[tuple[int, Any]]:
    decoder = json.JSONDecoder()
    at, line, in_list, ended = 0, 1, False, False
    while True:
        while at < len(text) and (text[at].isspace() or text[at] in ",]["):
            # At the top level these characters only separate records.
            if text[at] == "[" and in_list:
                break
            in_list = text[at] == "[" or (in_list and text[at] != "]")
            line += text[at] == "\n"
            at += 1
        if at < len(text):
            try:
                value, end = decoder.raw_decode(text, at)
            except (RecursionError, ValueError):
                value, end = None, None
            if end is not None and (end < len(text) or ended):
                yield line, value
                line += text.count("\n", at, end)
                at = end
                continue
            if ended:
                raise InvalidInput(f"{path}, line {line}: not JSON; correct the file") from None
        elif ended:
            return
        text, at = text[at:], 0
        if len(text) >= LONGEST_LINE:
            raise InvalidInput(
                f"{path}, line {line}: not JSON, or a value longer than {LONGEST_LINE:,} characters; "
                "write each record on a line of its own (JSON lines)"
            )
        more = file.read(min(max(_READ, len(text)), LONGEST_LINE))
        ended = not more
        text += more


def _separated(file: TextIO, path: Path, tabs: bool) -> Iterator[Record]:
    """Yield the rows of a CSV or TSV file whose first line names the columns."""
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_LINE))
    first = _line(file, path, 1)
    delimiter = "\t" if tabs else max(_DELIMITERS, key=_outside_quotes(first).count)
    rows = csv.reader((line for _, line in _lines(first, file, path)), delimiter=delimiter)
    header: list[str] = []
    begins = 1
    try:
        for row in rows:
            where, begins = f"{path}, line {begins}", rows.line_num + 1
            if not any(row):
                continue
            if not header:
                header = [cell.strip() for cell in row]
            elif len(row) != len(header):
                raise InvalidInput(
                    f"{where}: {len(row)} cells, but the first line names {len(header)} columns; "
                    "put cells that hold the delimiter, a line end or a quote in double quotes"
                )
            else:
                yield where, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise InvalidInput(f"{path}, line {begins}: not CSV ({error}); correct the line") from None


def _outside_quotes(line: str) -> str:
    return "".join(line.split('"')[::2])


def _table(path: Path, kind: str) -> Iterator[Record]:
    import datasets

    # It logs what it then raises, which would be a second line beside the refusal.
    logger = logging.getLogger(f"datasets.packaged_modules.{kind}.{kind}")
    was_disabled, logger.disabled = logger.disabled, True
    # It would tell the Hub that a file was read, and without a network wait for it.
    counted = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        # The path is a pattern to `datasets`, and brackets are common in names.
        rows = datasets.load_dataset(
            kind, data_files=glob.escape(str(path)), split="train", streaming=True
        )
        for number, row in enumerate(rows):
            yield f"{path}, row {number}", row
    except (InvalidInput, GeneratorExit):
        raise
    except Exception as error:  # Arrow and `datasets` raise many types of error on damaged files
        line = " ".join(str(error).split())[:300]
        raise InvalidInput(
            f"{path} is not a readable {kind} file ({line}); write it or download it again"
        ) from None
    finally:
        logger.disabled = was_disabled
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counted
