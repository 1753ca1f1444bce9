"""The embedded model of five skills, its calibration and held-out text, and the script that made
them.

A small Llama that every installation of fbn-prune carries, so that the whole path from networks
to a pruned checkpoint runs without a download. `python -m builtin_model.train --output DIR`
makes it again from text that every Python installation carries. Importing this package loads no
tensor library.
"""

from __future__ import annotations

from pathlib import Path

SKILLS: tuple[str, ...] = ("prose", "code", "arithmetic", "brackets", "copy")
"""What the model can do; the last three have questions with one right answer."""

QUESTION_SKILLS: tuple[str, ...] = SKILLS[2:]

_ROOT = Path(__file__).parent


def model_path() -> Path:
    """The checkpoint's folder: what `AutoModelForCausalLM` and `AutoTokenizer` load."""
    return _ROOT / "model"


def calibration_files() -> dict[str, Path]:
    """For each skill, text the model was trained on: JSON lines `{"text": ...}`, a line each."""
    return {skill: _ROOT / "text" / "calibration" / f"{skill}.jsonl" for skill in SKILLS}


def held_out_files() -> dict[str, Path]:
    """For each skill, text the model was never trained on: JSON lines `{"text": ...}`."""
    return {skill: _ROOT / "text" / "held_out" / f"{skill}.jsonl" for skill in SKILLS}


def question_files() -> dict[str, Path]:
    """For each skill with right answers, held-out JSON lines `{"question": ..., "answer": ...}`.

    The answer is all that the model should write after the question, before the line's end.
    """
    return {skill: _ROOT / "questions" / f"{skill}.jsonl" for skill in QUESTION_SKILLS}
