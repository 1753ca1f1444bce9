"""Paths of the built-in model with five skills and of its calibration and held-out text.

This small Llama is part of every installation of fbn-prune, so that a whole pruning run works without a download.
`python -m builtin_model.train --output DIR` trains it again on text from the Python installation. Importing this
package loads no tensor library.
"""

from __future__ import annotations

from pathlib import Path

SKILLS: tuple[str, ...] = ("prose", "code", "arithmetic", "brackets", "copy")
"""The model's skills; the last three have questions with one right answer."""

QUESTION_SKILLS: tuple[str, ...] = SKILLS[2:]

_ROOT = Path(__file__).parent


def model_path() -> Path:
    """Return the checkpoint's folder, for `AutoModelForCausalLM` and `AutoTokenizer` to load."""
    return _ROOT / "model"


def path_or_id(model: str) -> str:
    """Return where a model is: for `builtin` the checkpoint's folder, for any other name the name itself."""
    return str(model_path()) if model == "builtin" else model


def calibration_files() -> dict[str, Path]:
    """Return for each skill a file of text the model was trained on: JSON lines `{"text": ...}`."""
    return {skill: _ROOT / "text" / "calibration" / f"{skill}.jsonl" for skill in SKILLS}


def held_out_files() -> dict[str, Path]:
    """Return for each skill a file of text the model was not trained on: JSON lines `{"text": ...}`."""
    return {skill: _ROOT / "text" / "held_out" / f"{skill}.jsonl" for skill in SKILLS}


def question_files() -> dict[str, Path]:
    """Return for each skill in `QUESTION_SKILLS` a file of held-out JSON lines `{"question": ..., "answer": ...}`.

    The answer is the exact text that the model should write after the question, up to the end of the line.
    """
    return {skill: _ROOT / "questions" / f"{skill}.jsonl" for skill in QUESTION_SKILLS}
