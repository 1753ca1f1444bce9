"""Print how many Python files keep their pieces, and how many parameters go, by the number of tokens that stay.

    python eval/quality/vocabulary_curve.py --model DIR --output curve.json

Tokens are chosen in the order of their frequency in the Python files of this installation but every twentieth (the
calibration files of `vocabulary_table.py --python`), and then those that these files do not use, in the order of their
ids, which in BPE is that of their merges. Tokens without which a chosen one cannot be made stay too, as the command
keeps them. The last row keeps all tokens that the files use and all ASCII ones, as `--ascii` does.

A file of the held-out twentieth keeps its pieces if all its tokens stay.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from vocabulary_table import python_files

from fbn_prune.data.pieces import batches, count_tokens, encoded
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.runs.vocabulary import VocabularyRule, _Chooser

USED = "all that the files use"
ASCII = "the same and all ASCII ones"


def main(
    model: Annotated[Path, typer.Option(help="Checkpoint folder.")],
    tokens: Annotated[
        str, typer.Option(help="Numbers of tokens to choose, before those they need.")
    ] = "20000,40000,60000,80000,88600,100000,120000",
    output: Annotated[Path | None, typer.Option(help="JSON to write.")] = None,
) -> None:
    """Count tokens once and print a row for each number of them."""
    checkpoint = Checkpoint.open(model)
    plain, ascii = (
        _Chooser(checkpoint, VocabularyRule((), ascii=every)) for every in (False, True)
    )
    with tempfile.TemporaryDirectory() as place:
        calibrating = Path(place) / "python.jsonl"
        held_out = python_files(calibrating)
        with calibrating.open(encoding="utf-8") as lines:
            counts = count_tokens(plain.tokenizer, (json.loads(line)["text"] for line in lines))
    used = [token for token, _ in sorted(counts.items(), key=lambda one: (-one[1], one[0]))]
    unused = sorted({*plain.tokenizer.get_vocab().values()} - counts.keys())
    files = [
        frozenset(ids) for batch in batches(held_out) for ids in encoded(plain.tokenizer, batch)
    ]
    chosen: list[tuple[str, _Chooser, Sequence[int]]] = [
        (f"{count:,} most frequent", plain, [*used, *unused][:count])
        for count in sorted(int(number) for number in tokens.split(","))
    ]
    chosen += [(USED, plain, used), (ASCII, ascii, used)]
    rows = [row(checkpoint, name, chooser, ids, files) for name, chooser, ids in chosen]
    rows.sort(key=lambda one: one["tokens_kept"])
    facts: dict[str, Any] = {
        "model": model.name,
        "tokens": checkpoint_tokens(checkpoint),
        "tokens_used": len(used),
        "calibration_tokens": Counter(counts).total(),
        "held_out_files": len(files),
        "rows": rows,
    }
    show(facts)
    if output is not None:
        output.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def checkpoint_tokens(checkpoint: Checkpoint) -> int:
    """Return the number of rows of the embedding."""
    return checkpoint.family.vocab_size(checkpoint.config)


def row(
    checkpoint: Checkpoint,
    name: str,
    chooser: _Chooser,
    ids: Sequence[int],
    files: Sequence[frozenset[int]],
) -> dict[str, Any]:
    """Return the figures of the vocabulary that keeps these tokens and those that it needs."""
    cut = chooser.cut(dict.fromkeys(ids, 1))
    kept = {*cut.ids}
    same = sum(tokens <= kept for tokens in files)
    return {
        "chosen": name,
        "tokens_kept": len(cut.kept),
        "identical": same,
        "identical_share": same / len(files),
        "parameters_removed_share": cut.removed_parameters(checkpoint)
        / checkpoint.total_parameters,
    }


def show(facts: dict[str, Any]) -> None:
    title = f"{facts['model']}: {facts['held_out_files']} Python files, {facts['tokens']:,} tokens"
    table = Table("tokens chosen", "kept", "files with the same pieces", "parameters", title=title)
    for one in facts["rows"]:
        table.add_row(
            one["chosen"],
            f"{one['tokens_kept']:,}",
            f"{one['identical_share']:.1%}",
            f"-{one['parameters_removed_share']:.1%}",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    typer.run(main)
