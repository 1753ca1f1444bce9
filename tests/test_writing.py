"""Claims about text that a model writes for itself: it is what the model predicts, and the same for the same seed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import arguments, refused, run_json
from tiny_models import save_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fbn_prune import PruningConfig, prune
from fbn_prune.data import builtin
from fbn_prune.data.chat import turn_texts
from fbn_prune.model import writing
from fbn_prune.model.writing import Manner, write_text

TEMPLATE = (
    "{% for turn in messages %}<{{ turn['role'] }}>{{ turn['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SMALL = {"tokens": 300, "context": 40, "cached": 160}


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    path = builtin.model_path()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(path)


def told(model: Any, rows: list[Tensor]) -> float:
    """Mean loss of the model on rows, in nats a token."""
    with torch.no_grad():
        losses = [float(model(row[None], labels=row[None]).loss) * (len(row) - 1) for row in rows]
    return sum(losses) / sum(len(row) - 1 for row in rows)


def test_a_model_finds_its_own_text_likely_and_the_text_is_long_enough(
    pair: tuple[Any, Any],
) -> None:
    model, tokenizer = pair
    rows = write_text(model, tokenizer, **SMALL, seed="0")
    assert sum(map(len, rows)) >= SMALL["tokens"]
    assert all(row.dtype == torch.int64 and len(row) <= SMALL["context"] for row in rows)
    vocabulary = model.config.vocab_size
    at_random = [torch.randint(vocabulary, (40,)) for _ in range(8)]
    assert told(model, rows) < 0.7 * math.log(vocabulary) < told(model, at_random)


def test_the_same_seed_writes_the_same_text_and_nothing_else_changes(
    pair: tuple[Any, Any],
) -> None:
    state = torch.get_rng_state()
    first = write_text(*pair, **SMALL, seed="0")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    again, other = (write_text(*pair, **SMALL, seed=seed) for seed in ("0", "1"))
    assert len(first) == len(again)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a in first for b in other)


def test_progress_goes_on_while_a_batch_is_written_and_adds_up_to_the_text(
    pair: tuple[Any, Any],
) -> None:
    told: list[int] = []
    rows = write_text(*pair, **SMALL, seed="0", advance=told.append)
    assert sum(told) == sum(map(len, rows))
    assert sum(number > 0 for number in told) > SMALL["tokens"] / 8
    assert max(told) <= SMALL["cached"] // SMALL["context"]


def test_batches_that_are_kept_are_not_written_again(pair: tuple[Any, Any]) -> None:
    kept: dict[int, list[Tensor]] = {}

    def keep(batch: int, write: Any) -> list[Tensor]:
        kept[batch] = write()
        return kept[batch]

    whole = write_text(*pair, **SMALL, seed="0", kept=keep)
    again = write_text(*pair, **SMALL, seed="0", kept=lambda batch, write: kept[batch])
    assert len(kept) > 1
    assert [row.tolist() for row in again] == [row.tolist() for row in whole]


def test_a_chat_model_asks_and_answers_in_its_template(pair: tuple[Any, Any]) -> None:
    """The words between are the model's; what stands around them is the template's."""
    model, tokenizer = pair
    tokenizer.chat_template = TEMPLATE
    try:
        assert turn_texts(tokenizer) == ("<user>", "\n<assistant>")
        manner = Manner.of(model, tokenizer)
        rows = write_text(model, tokenizer, **{**SMALL, "context": 64}, seed="0")
    finally:
        tokenizer.chat_template = None
    assert rows
    for row in rows:
        ids = tuple(row.tolist())
        assert ids[: len(manner.question)] == manner.question
        assert any(
            ids[at : at + len(manner.answer)] == manner.answer
            for at in range(len(manner.question), len(ids))
        )
        assert all(token not in manner.stops for token in ids[len(manner.question) : 1])


@pytest.mark.parametrize("template", ["{{ 'no words' }}", "{{ raise_exception('no') }}", TEMPLATE])
def test_a_template_without_turns_makes_a_base_model(template: str, pair: tuple[Any, Any]) -> None:
    model, tokenizer = pair
    tokenizer.chat_template = template
    try:
        assert bool(Manner.of(model, tokenizer).question) == (template == TEMPLATE)
    finally:
        tokenizer.chat_template = None


def test_a_model_that_writes_nothing_is_refused(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "_written", lambda *about: [])
    with pytest.raises(Exception, match="nothing but empty texts"):
        write_text(*pair, **SMALL, seed="0")


def test_a_run_calibrates_and_recovers_on_what_the_model_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = ["--model", "builtin", "--calibration", "generated", "--tokens", "1500", "--context", "64",
           "--sparsity", "0.5", "--recover", "--recover-text", "generated",
           "--recover-tokens", "700", "--recover-steps", "match"]  # fmt: skip
    result = run_json(capsys, *job, "--output", tmp_path / "out")
    assert 1400 < result["calibration_tokens"] < 1700
    assert result["perplexity_before"] < 20  # the model's own text, held out
    assert result["recovery"]["tokens"] < 900
    card = (tmp_path / "out" / "README.md").read_text()
    assert "tokens of generated" in card
    again = run_json(capsys, *job, "--output", tmp_path / "again")
    assert again["perplexity_after"] == result["perplexity_after"]


def test_a_run_that_was_killed_has_kept_its_text(
    tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And ends in the bytes of one that was not."""
    from fbn_prune.cli.main import _exit_code
    from fbn_prune.runs.prune import PruneRun

    class Killed(BaseException):
        pass

    def killed(run: PruneRun) -> None:
        raise Killed

    job = [*arguments(tiny, text), "--sparsity", "0.5"]
    job[job.index(str(text))] = "generated"
    assert _exit_code([*job, "--output", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(PruneRun, "cut", killed)
        with pytest.raises(Killed):
            _exit_code([*job, "--output", str(tmp_path / "out")])
    with monkeypatch.context() as patch:
        patch.setattr(writing, "_written", lambda *about: pytest.fail("written again"))
        assert _exit_code([*job, "--output", str(tmp_path / "out")]) == 0
    whole, out = (tmp_path / name / "model.safetensors" for name in ("whole", "out"))
    assert whole.read_bytes() == out.read_bytes()


def test_a_model_in_memory_writes_too(pair: tuple[Any, Any]) -> None:
    import copy

    config = PruningConfig(sparsity=0.5, tokens=600, context=64)
    found = prune(copy.deepcopy(pair[0]), pair[1], "generated", config)
    assert 500 < found.calibration_tokens < 800


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--vocabulary", "1"], "before the model can write"),
        (["--structures", "all", "--layout", "ragged"], "before the model can write"),
        (["--memory-budget", "0.5GB"], "whole model in memory"),
        (["--calibration", "generated"], "name 'generated' once"),
    ],
)
def test_what_text_from_the_model_cannot_do_is_refused(
    flags: list[str], words: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = ["--model", str(tiny), "--calibration", "generated", "--output", str(tmp_path / "out")]
    refused(capsys, [*job, "--sparsity", "0.5", "--tokens", "600", *flags], words)


def test_a_plan_writes_no_text(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = ["--model", str(tiny), "--calibration", "generated", "--sparsity", "0.5"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "write_text", lambda *about: pytest.fail("written"))
        assert run_json(capsys, *job, "--dry-run")["neurons_kept"] > 0


@pytest.mark.parametrize("name", ["gpt2", "phi3", "gemma2"])
def test_other_families_write(name: str, tmp_path: Path) -> None:
    path = save_tiny(tmp_path / name, name)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    rows = write_text(model, AutoTokenizer.from_pretrained(path), **SMALL, seed="0")
    assert sum(map(len, rows)) >= SMALL["tokens"]
