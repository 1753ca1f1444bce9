"""Write label sets for `fbn-prune probe`: short texts of two or more kinds, as JSON lines {"text", "label"}.

    python eval/quality/label_sets.py DIR [--stories TEXT] [--questions NAME=FILE.jsonl ...]

The texts come from the Python installation: the source of its standard library, docstrings, and what both are made of.
With `--stories`, the prose, the dialogue and the sentences come from the paragraphs of that text; with `--questions`,
the subject of a question is the file that it is in.
"""

from __future__ import annotations

import ast
import json
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).parents[1]))
from builtin_model.corpus import docstrings, standard_library, without_docstrings
from fbn_prune.data import builtin

Labelled = dict[str, list[str]]
"""Label -> texts."""

SHORTEST, SHORTEST_QUESTION = 40, 6
SPEECH = re.compile(r"[\"“][^\"”]{8,}[\"”]")
NEGATION = re.compile(r"\b(?:not|no|never|none|neither|nor|cannot|without)\b|n't\b", re.IGNORECASE)
CONDITION = re.compile(r"\b(?:if|when|unless|otherwise|whether)\b", re.IGNORECASE)


class Material:
    """The texts that label sets are cut from."""

    def __init__(self, stories: Path | None, characters: int) -> None:
        self.characters = characters
        modules = [(name, source) for name, source in standard_library() if len(source) > 2000]
        self.sources = [source for _, source in modules]
        self.docs = [d for source in self.sources for d in docstrings(ast.parse(source))]
        paragraphs = self.docs
        if stories is not None:
            text = stories.read_text(encoding="utf-8")
            paragraphs = re.split(r"\n\s*\n|<\|endoftext\|>|\n(?= )", text)
        self.stories = stories is not None
        self.paragraphs = [" ".join(p.split()) for p in paragraphs if ">>>" not in p]
        self.paragraphs = [p for p in self.paragraphs if len(p) >= SHORTEST]

    def cut(self, text: str) -> str:
        """Return the first characters of a text, up to the last space among them."""
        if len(text) <= self.characters:
            return text
        return text[: self.characters].rsplit(" ", 1)[0]

    def sentences(self) -> Iterator[str]:
        for paragraph in self.paragraphs:
            for sentence in re.split(r"(?<=[.!?]) +", paragraph):
                if SHORTEST <= len(sentence) <= self.characters and sentence[0].isupper():
                    yield sentence


def language(on: Material) -> Labelled:
    """Lines from the middle of modules, and prose."""
    bare = [without_docstrings(source, ast.parse(source)) for source in on.sources]
    code = [source[len(source) // 2 :].partition("\n")[2] for source in bare]
    return {"code": code, "prose": on.paragraphs}


def part(on: Material) -> Labelled:
    """The opening of a module, and its middle."""
    return {
        "opening": on.sources,
        "middle": [source[len(source) // 2 :].partition("\n")[2] for source in on.sources],
    }


def arithmetic(on: Material) -> Labelled:
    """Right sums between words, and the same three numbers without the signs."""
    draw = random.Random(0)
    sums, lists = [], []
    for sentence in on.sentences():
        a, b = draw.randrange(10, 50), draw.randrange(10, 50)
        words = on.cut(sentence)[:80].rsplit(" ", 1)[0]
        sums.append(f"{words} {a}+{b}={a + b}\n{b}+{a}={a + b}\n")
        lists.append(f"{words} {a}, {b}, {a + b}\n{b}, {a}, {a + b}\n")
    half = len(sums) // 2
    return {"arithmetic": sums[:half], "numbers": lists[half:]}


def dialogue(on: Material) -> Labelled:
    """Paragraphs with speech and without; of docstrings, sessions with the interpreter and other text."""
    if on.stories:
        said = [
            p[max(0, found.start() - 30) :] for p in on.paragraphs if (found := SPEECH.search(p))
        ]
        return {
            "dialogue": said,
            "narrative": [p for p in on.paragraphs if '"' not in p and "“" not in p],
        }
    sessions = [d[d.index(">>>") :] for d in on.docs if ">>>" in d]
    return {"dialogue": sessions, "narrative": [d for d in on.docs if ">>>" not in d]}


def negation(on: Material) -> Labelled:
    """Sentences with a negation and without."""
    return _by(on.sentences(), lambda s: "negation" if NEGATION.search(s) else "none")


def condition(on: Material) -> Labelled:
    """Sentences with a condition and without."""
    return _by(on.sentences(), lambda s: "condition" if CONDITION.search(s) else "none")


def definition(on: Material) -> Labelled:
    """Classes and functions, from their first line on."""
    found: Labelled = {"class": [], "function": []}
    for source in on.sources:
        for kind, word in (("class", "class"), ("function", "def")):
            found[kind] += re.findall(
                rf"^{word} \w[^\n]*\n(?:[^\n]*\n){{3}}", source, re.MULTILINE
            )[:4]
    return found


def subject(questions: dict[str, Path]) -> Labelled:
    """Questions of several files; the label is the file's name."""
    found: Labelled = {}
    for name, path in questions.items():
        rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        keys = ("question", "question_stem", "goal", "sentence", "context", "text")
        found[name] = [str(row[next(k for k in keys if k in row)]) for row in rows]
    return found


def _by(texts: Iterable[str], label: Callable[[str], str]) -> Labelled:
    found: Labelled = {}
    for text in texts:
        found.setdefault(label(text), []).append(text)
    return found


def label_sets(
    on: Material, questions: dict[str, Path], count: int, seed: int
) -> dict[str, list[dict[str, str]]]:
    """Return every set's rows, with `count` texts of each label, in a random order."""
    makers = (language, part, arithmetic, dialogue, negation, condition, definition)
    sets = {maker.__name__: maker(on) for maker in makers}
    sets["subject"] = subject(questions)
    rows: dict[str, list[dict[str, str]]] = {}
    for name, labelled in sets.items():
        draw, rows[name] = random.Random(f"{seed} {name}"), []
        for label, texts in labelled.items():
            usable = sorted(
                {on.cut(text) for text in texts if len(text.strip()) >= SHORTEST_QUESTION}
            )
            taken = draw.sample(usable, min(count, len(usable)))
            rows[name] += [{"text": text, "label": label} for text in taken]
        draw.shuffle(rows[name])
    return rows


def main(
    folder: Annotated[Path, typer.Argument(help="Folder to write to; it is made.")],
    stories: Annotated[Path | None, typer.Option(help="Text whose paragraphs are prose.")] = None,
    questions: Annotated[list[str] | None, typer.Option(help="NAME=FILE.jsonl; repeat.")] = None,
    count: Annotated[int, typer.Option(help="Texts of each label.")] = 200,
    characters: Annotated[int, typer.Option(help="Longest text.")] = 160,
    seed: int = 0,
) -> None:
    files = {n: Path(p) for n, _, p in (q.partition("=") for q in questions or ())}
    rows = label_sets(
        Material(stories, characters), files or dict(builtin.question_files()), count, seed
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name, each in rows.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in each)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        counts = {
            label: sum(r["label"] == label for r in each) for label in {r["label"] for r in each}
        }
        print(f"{name}: {counts}")


if __name__ == "__main__":
    typer.run(main)
