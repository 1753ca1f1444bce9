"""Run llama.cpp on a GGUF file and compare its answers with those of transformers for the checkpoint.

The binding is `xllamacpp`, which has ready-made wheels. It runs in a process of its own: llama.cpp ends its process on
some faults of a file, and writes its log to the standard error stream.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch

from fbn_prune.errors import FbnPruneError, InvalidInput
from fbn_prune.export import llama_cpp_process
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.headers import one_line

BINDING = "xllamacpp"

TEXTS = (
    "Once upon a time, there was a little girl who loved to play outside. One day she",
    "The Senate praised him in his first year for",
    "import os\n\n\ndef read(path):\n    with open(path) as file:\n",
    "7 + 11 = 18\n46 - 21 =",
)
GREEDY_TOKENS = 16
"""Tokens that llama.cpp adds to each text."""
COMPARED = 20
"""Log-probabilities that are compared at each of these tokens, the largest first."""

MOST_DIFFERENCE = {torch.float32: 0.002, torch.float16: 0.05, torch.bfloat16: 0.2}
"""Largest mean difference of a token's log-probabilities, by the type of the matrices, to which llama.cpp rounds
activations too."""

_SECONDS = 600


class Unusable(FbnPruneError):
    """The binding does not do what it did in the versions that are known; this says nothing of a file."""


def verifier(
    source: Checkpoint,
    matrices: torch.dtype | None,
    verify: bool | None,
    note: Callable[[str], None],
) -> Callable[[Path], None] | None:
    """Return a function that compares a GGUF file with its checkpoint; None if none is to be compared.

    Parameters
    ----------
    source
        The checkpoint that is converted.
    matrices
        Type to which the file rounds the matrices; None if they stay as they are.
    verify
        True requires the comparison, False leaves it out, None makes it where it can be made.
    note
        Called with one line on the comparison, or on why there is none.

    Raises
    ------
    InvalidInput
        `verify` is True, and llama.cpp is not installed or the memory is too small.
    """
    if verify is False:
        return None
    obstacle = _obstacle(source)
    if obstacle is not None and verify:
        raise InvalidInput(f"--verify: {obstacle}")
    if obstacle is not None:
        note(f"not verified: {obstacle}")
        return None

    def compare_file(path: Path) -> None:
        try:
            note(compare(source, path, matrices))
        except Unusable as error:
            if verify:
                raise
            note(f"not verified: {error}")

    return compare_file


def _obstacle(source: Checkpoint) -> str | None:
    if find_spec(BINDING) is None:
        return f"llama.cpp is not installed (pip install {BINDING})"
    needed = 4 * source.total_parameters + source.total_bytes
    if needed > (free := psutil.virtual_memory().available):
        return f"the comparison with llama.cpp needs {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
    return None


def compare(source: Checkpoint, path: Path, matrices: torch.dtype | None) -> str:
    """Compare greedy tokens and log-probabilities of a GGUF file with those of its checkpoint in float32.

    Parameters
    ----------
    source, matrices
        See :func:`verifier`.
    path
        The GGUF file.

    Returns
    -------
    str
        One line on what was compared.

    Raises
    ------
    FbnPruneError
        llama.cpp does not load the file, or answers differently.
    Unusable
        The binding does not work as expected.
    """
    stored = {info.dtype for info in source.tensors.values() if len(info.shape) > 1}
    most = max(MOST_DIFFERENCE.get(dtype, 0.0) for dtype in ([matrices] if matrices else stored))
    limit = source.family.context_length(source.config) - GREEDY_TOKENS - 1
    tokenizer = source.load_tokenizer()
    prompts = [ids[: max(limit, 1)] for ids in (tokenizer(t)["input_ids"] for t in TEXTS) if ids]
    names = sorted(tokenizer.get_vocab().items(), key=lambda named: (len(named[0]), named[0]))
    plain = next((index for text, index in names if text.isascii() and text.isalpha()), 0)
    answers = _llama_cpp(path, prompts, plain)
    model = source.load_model("cpu", torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if matrices is not None and parameter.ndim > 1:  # as in the file
                parameter.copy_(parameter.to(matrices))
    largest, tokens = 0.0, 0
    for prompt, answer in zip(prompts, answers, strict=True):
        chosen = [step[0][0] for step in answer]
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + chosen[:-1]]), use_cache=False).logits[0]
        expected = logits[len(prompt) - 1 :].log_softmax(-1)
        for step, (row, top) in enumerate(zip(expected, answer, strict=True)):
            ids = torch.tensor([index for index, _ in top])
            theirs = torch.tensor([value for _, value in top])
            difference = float((row[ids] - theirs).abs().mean())
            largest, tokens = max(largest, difference), tokens + 1
            behind = float(row.max() - row[ids[0]])  # of the token that transformers would choose
            if difference > most or behind > 2 * most:
                text = tokenizer.decode([*prompt, *chosen[:step]])
                raise FbnPruneError(
                    f"llama.cpp answers differently from transformers: after {text[-40:]!r} log-probabilities differ "
                    f"by {difference:.3f} on average, and rounding explains {most}; nothing was written"
                )
    return (
        f"verified with llama.cpp: {tokens} greedy tokens agree with transformers, log-probabilities within "
        f"{largest:.1e}"
    )


def _llama_cpp(path: Path, prompts: Sequence[Sequence[int]], plain: int) -> list[list[list[Any]]]:
    """Return, for each prompt and each greedy token after it, the most probable tokens with their log-probabilities."""
    request = {
        "path": str(path),
        "prompts": prompts,
        "tokens": GREEDY_TOKENS,
        "compared": COMPARED,
        "plain": plain,
        "threads": torch.get_num_threads(),
        "context": max(map(len, prompts)) + GREEDY_TOKENS + 1,
    }
    try:
        ran = subprocess.run(
            [sys.executable, llama_cpp_process.__file__],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise FbnPruneError(
            f"llama.cpp did not answer within {_SECONDS} s; convert with --no-verify"
        ) from None
    if ran.returncode == llama_cpp_process.FAILED:
        reason = ran.stderr.rpartition("error: ")[2].strip()
        raise Unusable(f"the installed {BINDING} does not work as expected ({reason})")
    _, found, answer = ran.stdout.rpartition(llama_cpp_process.ANSWER)
    if ran.returncode or not found:
        lines = [line for line in ran.stderr.splitlines() if "error" in line.lower()]
        reason = one_line(RuntimeError(lines[0] if lines else f"exit code {ran.returncode}"))
        raise FbnPruneError(f"llama.cpp cannot run the file ({reason}); nothing was written")
    answers: list[list[list[Any]]] = json.loads(answer)
    return answers
