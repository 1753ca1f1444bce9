"""A run that got worse than guessing, or worse by its recovery, stops or keeps the better model, and says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import arguments, blocks, recipe
from tiny_models import make_model, make_tokenizer, save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from fbn_prune import FunctionalNetworkICA, PruningConfig, prune
from fbn_prune.cli.main import _exit_code
from fbn_prune.data.builtin import model_path
from fbn_prune.errors import InvalidInput
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.perplexity import mean_loss
from fbn_prune.model.streaming import StreamedModel
from fbn_prune.networks.sampling import SampledActivations
from fbn_prune.progress import StageClock
from fbn_prune.pruning.prediction import PredictedRise
from fbn_prune.pruning.recovery import healing
from fbn_prune.pruning.recovery.distillation import Distilled
from fbn_prune.runs.main_job import run_prune


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fbn_prune.runs.stages.GUESSING", 0.8)


def with_other_ids(folder: Path) -> Path:
    """The embedded model with a tokenizer that is not its own: the same pieces, other ids."""
    shutil.copytree(model_path(), folder)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    fixed = {token["content"] for token in content["added_tokens"]}
    moved = [piece for piece in vocabulary if piece not in fixed]
    ids = [vocabulary[piece] for piece in moved]
    vocabulary.update(zip(moved, [*ids[len(ids) // 2 :], *ids[: len(ids) // 2]], strict=True))
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.mark.usefixtures("strict")
def test_a_tokenizer_that_is_not_the_models_stops_the_run_before_the_work(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_other_ids(tmp_path / "in")
    run = arguments(folder, text, tmp_path / "out", "--sparsity", "0.5", "--criterion", "magnitude")
    assert _exit_code(run) == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if "error:" in one]
    assert "no better than guessing. Most likely its tokenizer" in line
    assert not (tmp_path / "out").exists()
    assert _exit_code([*run, "--allow-untrained"]) == 0


@pytest.mark.usefixtures("strict")
def test_a_model_in_memory_is_refused_and_left_as_it_is() -> None:
    model, texts = make_model("llama"), [f"{n} apples and {n * 3} pears" for n in range(200)]
    small = {"criterion": "magnitude", "sparsity": 0.5, "tokens": 500, "context": 32}
    before = model.model.layers[0].mlp.down_proj.weight.clone()
    with pytest.raises(InvalidInput, match="no better than guessing"):
        prune(model, make_tokenizer(), texts, PruningConfig(**small))
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, before)
    prune(model, make_tokenizer(), texts, PruningConfig(**small, allow_untrained=True))


@pytest.mark.usefixtures("strict")
def test_every_command_that_studies_a_model_stops_before_the_decomposition(
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, found = with_other_ids(tmp_path / "in"), tmp_path / "found"
    job = arguments(folder, text)
    discovery = ["discover", *job, "--output", str(found)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fbn_prune.networks.ica.spatial_ica", None)  # which none may reach
        for command in (
            discovery,
            [*discovery, "--memory-budget", "700MB"],
            ["rank", *job],
            ["ablate", *job],
            ["compare", *job],
        ):
            assert _exit_code(command) == 2, command
            (line,) = [one for one in capsys.readouterr().err.splitlines() if "error:" in one]
            assert "no better than guessing. Most likely its tokenizer" in line
            assert "--allow-untrained" in line
    assert _exit_code([*discovery, "--allow-untrained"]) == 0
    # With networks at hand, each stops at the loss that it measures itself, or goes on if told to.
    known = ["--networks-from", str(found / "networks.safetensors")]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("networks.ranking.masked", "networks.intervention_effects.masked"):
            patch.setattr(f"fbn_prune.{name}", None)
        patch.setattr("fbn_prune.runs.compare.try_cuts", None)
        for command in (["rank", "--rank", "knockout"], ["ablate"], ["compare"]):
            assert _exit_code([*command, *job, *known]) == 2, command
            assert "no better than guessing" in capsys.readouterr().err
    more = ["--draws", "2", "--allow-untrained"]
    assert _exit_code(["ablate", *job, *known, *more]) == 0


def test_the_loss_of_a_discovery_is_that_of_the_model_on_the_tokens_it_read(tiny: Path) -> None:
    read = blocks(48, 40, 31)
    checkpoint = Checkpoint.open(tiny)
    live = ModelAdapter(checkpoint.load_model("cpu", torch.float32))
    streamed = StreamedModel(checkpoint, torch.device("cpu"), torch.float32, scratch=tiny.parent)
    expected = mean_loss(live, read.batches(96))
    for adapter in (live, streamed):
        clock = StageClock()
        sampled = SampledActivations(adapter, read, 100, batch_tokens=96, keep=True, clock=clock)
        assert len(list(sampled)) == 3
        assert sampled.loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.usefixtures("strict")
def test_networks_of_a_model_in_memory_that_only_guesses_need_a_word() -> None:
    model, tokenizer = make_model("llama"), make_tokenizer()
    texts = [f"{n} apples and {n * 3} pears" for n in range(200)]
    small = {"network_tokens": 200, "n_components": 3}
    with pytest.raises(InvalidInput, match="no better than guessing"):
        FunctionalNetworkICA(**small).fit(model, tokenizer, texts)
    FunctionalNetworkICA(**small, allow_untrained=True).fit(model, tokenizer, texts)


@pytest.mark.usefixtures("strict")
def test_a_model_that_computes_nan_is_refused_by_every_command(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny(tmp_path / "in")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    job = arguments(folder, text)
    output = ["--output", str(tmp_path / "out")]
    for command in ([*job, *output], ["discover", *job, *output], ["rank", *job], ["ablate", *job]):
        assert _exit_code(command) == 2, command
        said = capsys.readouterr().err
        assert "NaN or Inf among the model's logits: the checkpoint is damaged" in said


def test_a_recovery_that_makes_the_model_worse_is_not_kept(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_path()  # which is trained: random weights cannot get much worse
    small = {"sparsity": 0.5, "criterion": "magnitude"}
    run_prune(recipe(model, text, tmp_path / "cut", **small), StageClock())

    def spoil(
        model: torch.nn.Module, dense: object, maps: list[str], *about: object, **how: object
    ) -> Distilled:
        with torch.no_grad():
            for name in maps:
                model.get_submodule(name).weight.mul_(9)
        return Distilled(0, [])

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
