"""Tell by its content what a file of text holds, and open it: compressed or not, with or without a byte order mark.

A file is opened once and read forwards, so that a pipe can be read as well.
"""

from __future__ import annotations

import codecs
import io
import lzma
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TextIO, cast

from fbn_prune.errors import InvalidInput

Kind = Literal["text", "json", "csv", "tsv", "parquet", "arrow"]

PLAIN_SUFFIXES = (".txt", ".md", ".py", ".rst")
"""Files with these names are always one document of plain text."""

_BY_SUFFIX: dict[str, Kind] = {
    **dict.fromkeys(PLAIN_SUFFIXES, "text"),
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), "json"),
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4", ".xz": "xz"}
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bz2",
    b"\x04\x22\x4d\x18": "lz4",
    b"\xfd7zXZ\0": "xz",
}
_TABLES: dict[bytes, Kind] = {
    b"PAR1": "parquet",
    b"ARROW1": "arrow",
    b"\xff\xff\xff\xff": "arrow",
}
_NOT_TEXT = {
    b"PK\x03\x04": "a zip archive: unpack it, and give the files or their folder",
    b"%PDF-": "a PDF: extract its text into a .txt file first",
    b"GGUF": "a GGUF model: give text to calibrate on",
    b"SQLite format 3": "a database: export its text, for example as CSV",
    b"\x89HDF": "an HDF5 file: export its text, for example as JSON lines",
}
_OFFICE = (".docx", ".odt", ".epub", ".pptx", ".xlsx")
"""Suffixes of zip archives of which the parts are no text."""
_JSON_START = re.compile(r'\s*\[?\s*\{\s*"(?:[^"\\]|\\.)*"\s*:')
_HEAD = 2**16


@dataclass(frozen=True)
class OpenFile:
    """A file at its beginning, decompressed.

    Attributes
    ----------
    path
        The file.
    kind
        What it holds.
    suffix
        The suffix of its name in lower case, without that of the compression.
    looks_like_json
        Whether it begins like a JSON record.
    """

    path: Path
    kind: Kind
    suffix: str
    looks_like_json: bool
    binary: BinaryIO
    compression: str | None

    def text(self, newline: str | None = None) -> TextIO:
        """Return the decoded text, without a byte order mark; `newline` is that of :func:`open`."""
        return io.TextIOWrapper(self.binary, encoding="utf-8-sig", newline=newline)


def kind_of_name(path: Path) -> Kind | None:
    """Return the kind that a file's name promises; None if it promises none."""
    return _BY_SUFFIX.get(_inner_suffix(path))


@contextmanager
def open_file(path: Path, name: str) -> Iterator[OpenFile]:
    """Open a file and find out its kind.

    Parameters
    ----------
    path
        The file.
    name
        Its name in error messages.

    Raises
    ------
    InvalidInput
        The file cannot be opened or is not text; inside the context also: it is damaged, or not UTF-8.
    """
    compression: str | None = None
    opened: list[io.IOBase] = []
    try:
        raw = io.BufferedReader(io.FileIO(path), _HEAD)
        opened.append(raw)
        head = raw.peek(_HEAD)
        compression = next((c for magic, c in _MAGIC.items() if head.startswith(magic)), None)
        binary = raw
        if compression is not None:
            binary = io.BufferedReader(cast(Any, _Decompressor(raw, compression)), _HEAD)
            opened.append(binary)
            head = binary.peek(_HEAD)
        kind = _kind(path, head, name)
        if kind in ("parquet", "arrow") and compression is not None:
            raise InvalidInput(f"{name} is a compressed {kind} file: unpack it first")
        start = head[:_HEAD].decode("utf-8", "ignore").removeprefix("\ufeff")
        json_like = _JSON_START.match(start) is not None
        yield OpenFile(path, kind, _inner_suffix(path), json_like, binary, compression)
    except UnicodeDecodeError as error:
        raise InvalidInput(_not_utf8(path, compression, name, error.reason)) from None
    except (OSError, EOFError, lzma.LZMAError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        if compression is None:
            raise InvalidInput(
                f"cannot read {name}: {reason}; check its name and permissions"
            ) from None
        raise InvalidInput(
            f"{name} is damaged or incomplete ({compression}: {reason}); copy or download it again"
        ) from None
    finally:
        for one in reversed(opened):
            one.close()


def _inner_suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


class _Decompressor(io.RawIOBase):
    """The decompressed bytes of a stream, for :class:`io.BufferedReader`."""

    def __init__(self, source: Any, compression: str) -> None:
        import pyarrow

        if compression == "xz":
            self._stream: Any = lzma.LZMAFile(source)  # noqa: SIM115 - closed with its source
        else:
            self._stream = pyarrow.CompressedInputStream(source, compression)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _kind(path: Path, head: bytes, name: str) -> Kind:
    by_name = kind_of_name(path)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InvalidInput(
            f"{name} is UTF-16, not UTF-8: convert it, for example with iconv -f UTF-16 -t UTF-8"
        )
    if by_name != "text":
        for magic, kind in _TABLES.items():
            if head.startswith(magic):
                return kind
        for magic, what in _NOT_TEXT.items():
            if head.startswith(magic):
                if path.suffix.lower() in _OFFICE:
                    what = "an office document: save its text in a .txt file first"
                raise InvalidInput(f"{name} is {what}")
    if head[257:262] == b"ustar":
        raise InvalidInput(f"{name} is a tar archive: unpack it, and give the files or the folder")
    if by_name in ("parquet", "arrow"):
        raise InvalidInput(f"{name} is not the {by_name} file that its name says: write it again")
    if by_name is not None:
        return by_name
    start = head[:_HEAD].decode("utf-8", "ignore").removeprefix("\ufeff")
    return "json" if _JSON_START.match(start) else "text"


def _not_utf8(path: Path, compression: str | None, name: str, reason: str) -> str:
    """Say which line has the first byte that is not UTF-8."""
    cure = "convert the file, for example with iconv -f LATIN1 -t UTF-8"
    if not path.is_file():  # a pipe cannot be read again
        return f"{name} is not UTF-8 ({reason}); {cure}"
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    with io.BufferedReader(io.FileIO(path), _HEAD) as raw:
        source: Any = raw if compression is None else _Decompressor(raw, compression)
        while chunk := source.read(_HEAD):
            pending = decoder.getstate()[0]
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                data = pending + chunk
                before = data[: error.start]
                line += before.count(b"\n")
                byte = data[error.start]
                return f"{name}, line {line}: the byte 0x{byte:02x} is not UTF-8; {cure}"
            line += chunk.count(b"\n")
    return f"{name}, line {line}: the file ends within a UTF-8 character; {cure}"
