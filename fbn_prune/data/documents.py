"""Read the documents of a calibration source: a file of any kind, a folder, a Hub data set, or the built-in text.

Reading stops at a given number of characters, so a huge source takes no longer than a small one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from fbn_prune.data.file_kinds import OpenFile, kind_of_name, open_file
from fbn_prune.data.forms import DocumentMaker, Reading, form_of
from fbn_prune.data.given import GivenData
from fbn_prune.data.records import read_records
from fbn_prune.data.text_files import require_source
from fbn_prune.errors import InvalidInput

FOLDER_KINDS = ".txt, .md, .rst, .py, .jsonl, .json, .csv, .tsv, .parquet or .arrow"
_KIND_WORDS = {"json": "JSON", "csv": "CSV", "tsv": "TSV", "parquet": "Parquet", "arrow": "Arrow"}
_OF_SAVED_TABLES = {"state.json", "dataset_info.json", "dataset_dict.json", "dataset_infos.json"}
"""Files beside the tables that `datasets` writes; they hold no text."""


def read_documents(
    source: str | GivenData, *, characters: int, seed: int = 0, reading: Reading | None = None
) -> Iterator[str]:
    """Yield the documents of one source, at most `characters` characters in total.

    A plain text file is one document. JSON (lines, or a list), CSV, TSV, Parquet and Arrow have one in each record: the
    field `text`, or a conversation, see :mod:`fbn_prune.data.forms`. The content decides what a file is where its name
    does not, and any file may be compressed. A folder yields the documents of all its files of these kinds.

    Parameters
    ----------
    source
        Data given in Python, ``builtin``, ``hf:DATASET[:CONFIG[:SPLIT[:FIELD]]]``, ``FILE[:FIELD]`` or
        ``FOLDER[:FIELD]``.
    characters
        The last document is truncated at this total.
    seed
        Seed of the random order of a folder's files.
    reading
        How conversations are rendered, and where it is said what was found.

    Raises
    ------
    InvalidInput
        The source is missing, unreadable or not UTF-8, or a record has no text.
    """
    left = characters
    for document in _documents_of(source, characters, seed, reading or Reading()):
        if left <= 0:
            return
        if not document.strip():
            continue
        yield document[:left]
        left -= len(document)


def _documents_of(
    source: str | GivenData, characters: int, seed: int, reading: Reading
) -> Iterator[str]:
    if isinstance(source, GivenData):
        yield from source.documents
    elif source == "builtin":
        from fbn_prune.data import builtin

        files = builtin.calibration_files()
        for path in files.values():
            yield from read_documents(str(path), characters=characters // len(files), seed=seed)
    elif source.startswith("hf:"):
        yield from _hub_documents(source, reading)
    else:
        path, named = _split_field(source)
        if path.is_dir():
            yield from _folder_documents(path, named, characters, seed, reading)
        else:
            require_source(source)
            yield from _file_documents(path, named, characters, reading)


def _split_field(source: str) -> tuple[Path, str | None]:
    """Split `FILE:FIELD`; a name with a colon that exists is a file's name."""
    head, separator, named = source.rpartition(":")
    if separator and named and not Path(source).exists():
        path = Path(head)
        if path.exists() or kind_of_name(path) not in (None, "text"):
            return path, named
    return Path(source), None


def _folder_documents(
    folder: Path, named: str | None, characters: int, seed: int, reading: Reading
) -> Iterator[str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and kind_of_name(p) is not None)
    files = [path for path in files if path.name not in _OF_SAVED_TABLES]
    if not files:
        raise InvalidInput(
            f"calibration folder {folder} has no {FOLDER_KINDS} file; give a folder with one"
        )
    random.Random(seed).shuffle(files)
    for path in files:
        yield from _file_documents(path, named, characters, reading, in_folder=True)


def _file_documents(
    path: Path, named: str | None, characters: int, reading: Reading, *, in_folder: bool = False
) -> Iterator[str]:
    with open_file(path, f"calibration file {path}") as file:
        if file.kind == "text":
            if file.looks_like_json:
                reading.say(
                    f"{path}: read as plain text, though it looks like JSON; name it .jsonl to read its records"
                )
            yield file.text().read(characters)
        else:
            yield from _record_documents(file, named, reading, in_folder=in_folder)


def _record_documents(
    file: OpenFile, named: str | None, reading: Reading, *, in_folder: bool
) -> Iterator[str]:
    path = file.path
    cure = f"give the field's name as {path}:FIELD" if named is None else "name one of these"
    maker = DocumentMaker(named, cure=cure)
    records = read_records(file, is_record=lambda record: form_of(record) is not None)
    with closing(records):
        for where, record in records:
            # A folder may hold other .json files, such as settings beside the text.
            if in_folder and file.suffix == ".json" and not (maker.form or form_of(record)):
                reading.say(f"{path}: skipped, as it holds no text; {maker.cure} if it does")
                return
            document = maker(where, record)
            if document is None:
                continue
            if file.suffix != ".jsonl" or maker.form != ("text",):
                reading.say_form(f"{path} ({_KIND_WORDS[file.kind]})", maker, document)
            yield reading.rendered(document, where)


def _hub_documents(source: str, reading: Reading) -> Iterator[str]:
    """Stream the documents of `hf:dataset[:config[:split[:field]]]`."""
    name, *rest = source.removeprefix("hf:").split(":")
    config, split, named = [*rest, "", "", ""][:3]
    if not name or len(rest) > 3:
        raise InvalidInput(f"{source!r}: the form is hf:dataset[:config[:split[:field]]]")
    import datasets

    cure = f"give the field's name as hf:{name}:{config}:{split or 'train'}:FIELD"
    maker = DocumentMaker(named or None, cure=cure)
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for number, row in enumerate(rows):
            where = f"{source}, row {number}"
            document = maker(where, row)
            if document is None:
                continue
            if maker.form != ("text",):
                reading.say_form(source, maker, document)
            yield reading.rendered(document, where)
    except InvalidInput:
        raise
    except Exception as error:  # the Hub, the network and the files raise many types of error
        line = " ".join(str(error).split())
        raise InvalidInput(f"cannot load data set {source}: {line[:300]}") from None
