"""A run that got worse than guessing, or worse by its recovery, stops or keeps the better model, and says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import arguments, recipe
from tiny_models import make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from fbn_prune import PruningConfig, prune
from fbn_prune.cli.main import _exit_code
from fbn_prune.data.builtin import model_path
from fbn_prune.progress import StageClock
from fbn_prune.pruning.prediction import PredictedRise
from fbn_prune.pruning.recovery import healing
from fbn_prune.runs.prune import run_prune


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fbn_prune.runs.stages.GUESSING", 0.8)


@pytest.mark.usefixtures("strict")
def test_a_tokenizer_that_is_not_the_models_stops_the_run_before_the_work(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(model_path(), tmp_path / "in")
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]  # another order: the ids of another tokenizer
    fixed = {token["content"] for token in content["added_tokens"]}
    moved = [piece for piece in vocabulary if piece not in fixed]
    ids = [vocabulary[piece] for piece in moved]
    vocabulary.update(zip(moved, [*ids[len(ids) // 2 :], *ids[: len(ids) // 2]], strict=True))
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    run = arguments(folder, text, tmp_path / "out", "--sparsity", "0.5", "--criterion", "magnitude")
    for command in (run, ["compare", *arguments(folder, text, None, "--kept", "0.5")]):
        assert _exit_code(command) == 2
        (line,) = [one for one in capsys.readouterr().err.splitlines() if "error:" in one]
        assert "no better than guessing. Most likely its tokenizer" in line
    assert not (tmp_path / "out").exists()
    assert _exit_code([*run, "--allow-untrained"]) == 0


@pytest.mark.usefixtures("strict")
def test_a_model_in_memory_is_refused_and_left_as_it_is() -> None:
    from fbn_prune.errors import InvalidInput

    model, texts = make_model("llama"), [f"{n} apples and {n * 3} pears" for n in range(200)]
    small = {"criterion": "magnitude", "sparsity": 0.5, "tokens": 500, "context": 32}
    before = model.model.layers[0].mlp.down_proj.weight.clone()
    with pytest.raises(InvalidInput, match="no better than guessing"):
        prune(model, make_tokenizer(), texts, PruningConfig(**small))
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, before)
    prune(model, make_tokenizer(), texts, PruningConfig(**small, allow_untrained=True))


def test_a_recovery_that_makes_the_model_worse_is_not_kept(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_path()  # which is trained: random weights cannot get much worse
    small = {"sparsity": 0.5, "criterion": "magnitude"}
    run_prune(recipe(model, text, tmp_path / "cut", **small), StageClock())

    def spoil(
        model: torch.nn.Module, dense: object, maps: list[str], *about: object, **how: object
    ) -> None:
        with torch.no_grad():
            for name in maps:
                model.get_submodule(name).weight.mul_(9)

    monkeypatch.setattr(healing, "distil", spoil)
    healed = recipe(model, text, tmp_path / "out", recover=True, recover_passes=1, **small)
    result = run_prune(healed, StageClock())
    assert result.recovery is not None
    assert not result.recovery.kept
    assert result.recovery.perplexity_recovered > result.recovery.perplexity_cut
    assert result.perplexity_after == result.recovery.perplexity_cut
    line = "the recovery raised the perplexity from"
    assert line in str(result.warning)
    card = (tmp_path / "out" / "README.md").read_text()
    assert line in card
    assert "norms and embeddings are unchanged" in card
    cut, out = (load_file(tmp_path / name / "model.safetensors") for name in ("cut", "out"))
    assert all(torch.equal(cut[name], out[name]) for name in cut)
    shown = (tmp_path / "out" / "report.html").read_text()
    assert "perplexity, healed" not in shown
    # The model in memory is the one that was cut, too.
    texts = [f"{number} apples and {number * 3} pears" for number in range(200)]
    common = {**small, "tokens": 500, "context": 32, "width_multiple": 4}
    models = [AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32) for _ in range(2)]
    tokenizer = AutoTokenizer.from_pretrained(model)
    prune(models[0], tokenizer, texts, PruningConfig(**common))
    more = PruningConfig(**common, recover=True, recover_passes=1)
    assert not prune(models[1], tokenizer, texts, more).recovery.kept
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_cut_far_above_its_prediction_is_said_on_terminal_and_card(
    tiny: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    far = PredictedRise(-9.0, -8.0)
    monkeypatch.setattr("fbn_prune.runs.prune.predicted_rise", lambda errors: far)
    run = arguments(tiny, text, tmp_path / "out", "--sparsity", "0.5", "--criterion", "magnitude")
    assert _exit_code(run) == 0
    line = "but the statistics of the cut predict"
    assert line in capsys.readouterr().err
    assert line in (tmp_path / "out" / "README.md").read_text()
