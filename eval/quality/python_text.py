"""Write Python source of this installation's standard library as two texts, calibration.txt and evaluation.txt.

    python eval/quality/python_text.py DIR

Docstrings are left out, modules are in a random order, and no module is in both texts. Each gives at most its first
characters, so that a few thousand tokens come from many modules.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).parents[1]))
from builtin_model.corpus import collect


def main(
    folder: Annotated[Path, typer.Argument(help="Folder to write to; it is made.")],
    characters: Annotated[int, typer.Option(help="Most characters of a module.")] = 3000,
    seed: int = 0,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    corpus = collect()
    for name, held_out in (("calibration", False), ("evaluation", True)):
        modules = corpus.documents("code", held_out=held_out)
        random.Random(seed).shuffle(modules)
        text = "\n\n".join(module.text[:characters] for module in modules)
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
        print(f"{name}.txt: {len(modules)} modules, {len(text)} characters")


if __name__ == "__main__":
    typer.run(main)
