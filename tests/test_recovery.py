"""Claims about healing a cut model: it comes closer to the dense one, stays stock, and goes on where it stopped."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import arguments, blocks, run_json
from tiny_models import LAYERS, PATHS, logits, make_model, save_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

from fbn_prune.cli.main import _exit_code
from fbn_prune.data.calibration import TokenBlocks
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.surgery import MlpCut
from fbn_prune.progress import StageClock
from fbn_prune.pruning.recovery import Weights, distillation, healing
from fbn_prune.pruning.recovery.distillation import DistillationOptions, _Training, distil
from fbn_prune.pruning.recovery.gain import Recovery
from fbn_prune.pruning.recovery.healing import RecoveryOptions, heal, linear_maps
from fbn_prune.pruning.recovery.layer_matching import _LayerFit, match_layers
from fbn_prune.pruning.recovery.trained import AllWeights
from fbn_prune.store import Store

OPTIONS = RecoveryOptions(passes=3, rank=4, seed=0)


def sample(weights: tuple[float, ...] | None = None) -> TokenBlocks:
    return replace(blocks(*range(24, 32), context=40), weights=weights)


def pair(name: str = "llama") -> tuple[ModelAdapter, ModelAdapter]:
    """A model and itself without two thirds of its neurons."""
    dense, cut = (ModelAdapter(make_model(name)) for _ in range(2))
    for layer in range(LAYERS):
        kept = torch.arange(0, 24, 3)
        cut.cut(layer, MlpCut(kept, dense.down_weight(layer)[:, kept], None))
    return dense, cut


def hidden_error(dense: ModelAdapter, cut: ModelAdapter) -> float:
    ids = sample().blocks[0][None]
    with torch.no_grad():
        wanted, found = (
            each.model(ids, output_hidden_states=True).hidden_states for each in (dense, cut)
        )
        return sum(float((a - b).square().mean()) for a, b in zip(wanted, found, strict=True))


def parameters(adapter: ModelAdapter) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in adapter.model.named_parameters()}


@pytest.mark.parametrize("name", PATHS)
def test_matching_brings_the_layers_closer_and_changes_mlps_alone(name: str) -> None:
    dense, cut = pair(name)
    before, error = parameters(cut), hidden_error(dense, cut)
    match_layers(cut, dense, sample().batches(64), passes=8, seed=0, clock=StageClock())
    assert hidden_error(dense, cut) < error
    mlp = [f".{projection.path}." for projection in cut.family.projections]
    for key, value in parameters(cut).items():
        if not any(path in key for path in mlp):
            assert torch.equal(value, before[key]), key
    assert all(p.requires_grad for p in cut.model.parameters())


@pytest.mark.parametrize("weights", ["adapters", "all"])
@pytest.mark.parametrize("name", PATHS)
def test_distillation_brings_predictions_closer_and_leaves_no_adapter(
    name: str, weights: Weights
) -> None:
    dense, cut = pair(name)
    ids = sample().blocks[0][None]
    wanted = logits(dense.model, ids).log_softmax(-1)

    def divergence() -> float:
        found = logits(cut.model, ids).log_softmax(-1)
        return float((wanted.exp() * (wanted - found)).sum(-1).mean())

    names, before = list(parameters(cut)), divergence()
    options = DistillationOptions(weights, rank=4, passes=8, step_tokens=64, learning_rate=5e-3)
    distil(cut.model, dense.model, list(linear_maps(cut)), sample(), options, StageClock())
    assert divergence() < before
    assert list(parameters(cut)) == names
    assert all(p.requires_grad for p in cut.model.parameters())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "falcon"])
@pytest.mark.parametrize("weights", ["adapters", "all"])
def test_activations_that_are_computed_again_give_the_same_weights(
    name: str, weights: Weights
) -> None:
    dense, cut = pair(name)
    again = copy.deepcopy(cut)
    options = replace(OPTIONS, steps=("distil",), weights=weights)
    ran: list[int] = []
    for adapter in (cut, again):
        for projection in adapter.family.projections[-1:]:
            adapter.module(0, projection).register_forward_pre_hook(lambda *_: ran.append(0))
    heal(cut, dense, sample(), options, StageClock())
    once = len(ran)
    heal(again, dense, sample(), replace(options, recompute=True), StageClock())
    assert len(ran) - once > once, "in a backward pass layers run once more"
    found = parameters(again)
    assert all(torch.equal(value, found[key]) for key, value in parameters(cut).items())
    assert not any("forward" in layer.__dict__ for layer in again.layers)


def training(text_loss: float = 0.0) -> _Training:
    dense, cut = pair()
    options = DistillationOptions(rank=4, passes=2, step_tokens=64, text_loss=text_loss)
    maps = list(linear_maps(cut))
    return _Training(cut.model, dense.model, maps, sample(), None, options)


def test_the_text_has_its_own_loss_at_its_weight() -> None:
    """Between the divergence and the cross-entropy that transformers computes from labels."""
    found = training()
    batch = sample().batches(64)[0]
    with torch.no_grad():
        labels = batch.input_ids.masked_fill(~batch.valid, -100)
        model = found._model(batch.input_ids, labels=labels, use_cache=False)
        tokens = int((labels[:, 1:] != -100).sum())
        own = float(found._loss(batch, 1.0))
        assert own == pytest.approx(float(model.loss) * tokens, rel=1e-4)
        both = 0.7 * float(found._loss(batch, 0.0)) + 0.3 * own
        assert float(found._loss(batch, 0.3)) == pytest.approx(both, rel=1e-4)


def test_all_weights_of_a_model_in_16_bits_take_steps_that_rounding_would_swallow() -> None:
    """A hundred steps of a thousandth of the last bit each move a weight only if float32 copies add them up."""
    dense, cut = pair()
    for adapter in (dense, cut):
        adapter.model.to(torch.bfloat16)
    before = parameters(cut)
    options = DistillationOptions("all", passes=25, step_tokens=64, learning_rate=1e-4)
    distil(cut.model, dense.model, list(linear_maps(cut)), sample(), options, StageClock())
    after = parameters(cut)
    assert all(value.dtype == torch.bfloat16 for value in after.values())
    moved = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert moved == {f"{name}.weight" for name in linear_maps(cut)}


def test_all_weights_learn_at_a_rate_relative_to_their_size() -> None:
    _, cut = pair()
    maps = list(linear_maps(cut))
    found = AllWeights(cut.model, maps)
    for name, (parameter, rate) in zip(found.parameters, found.rates(2e-3), strict=True):
        assert rate == pytest.approx(2e-3 * float(parameter.detach().square().mean().sqrt())), name
        assert parameter is cut.model.get_parameter(name)  # no copies in float32
    found.merge()
    assert all(p.requires_grad for p in cut.model.parameters())


@pytest.mark.parametrize("weights", ["adapters", "all"])
@pytest.mark.parametrize("step", ["match", "distil"])
def test_each_step_can_be_asked_for_alone(step: str, weights: Weights) -> None:
    dense, cut = pair()
    before = parameters(cut)
    heal(cut, dense, sample(), replace(OPTIONS, steps=(step,), weights=weights), StageClock())
    changed = {key for key, value in parameters(cut).items() if not torch.equal(value, before[key])}
    trained = {f"{name}.weight" for name in linear_maps(cut)}
    assert changed == {name for name in trained if step == "distil" or ".mlp." in name}


def test_the_training_ends_with_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock goes ten seconds on with each look: each step takes ten, each check too."""
    seconds = iter(range(0, 10**6, 10))
    monkeypatch.setattr(distillation.time, "perf_counter", lambda: float(next(seconds)))
    dense, cut = pair()
    options = replace(OPTIONS, steps=("distil",), minutes=1.0, passes=100)
    with interrupted_at(_Training, "step", 0) as steps:
        curve = heal(cut, dense, sample(), options, StageClock()).curve
    assert 1 < len(steps) <= 6
    assert curve[0][0] == 0
    assert [tokens for tokens, _ in curve] == sorted({tokens for tokens, _ in curve})
    assert 0 < curve[-1][0] < sample().tokens * options.passes


def test_the_best_state_is_kept_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that are far too long leave the weights with which the training began."""
    largest = DistillationOptions(learning_rate=1e3)
    monkeypatch.setattr(DistillationOptions, "for_width", lambda *about: largest)
    dense, cut = pair()
    before = parameters(cut)
    healed = heal(cut, dense, sample(), replace(OPTIONS, steps=("distil",)), StageClock())
    divergences = [value for _, value in healed.curve]
    assert divergences[0] == min(divergences) < divergences[-1]
    for name, value in parameters(cut).items():
        torch.testing.assert_close(value, before[name])


@pytest.mark.parametrize("weights", ["adapters", "all"])
def test_a_rate_that_makes_the_model_worse_is_lowered_until_it_helps(
    weights: Weights, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The training goes back to its start, and broken off between two setbacks it ends in the same weights."""
    rate = 3.0 if weights == "adapters" else 30.0
    far_too_high = DistillationOptions(weights, learning_rate=rate)
    monkeypatch.setattr(DistillationOptions, "for_width", lambda *about: far_too_high)
    monkeypatch.setattr(distillation, "KEEPING_SHARE", float("inf"))
    monkeypatch.setattr(healing, "BATCH_TOKENS", 64)
    options = replace(OPTIONS, steps=("distil",), passes=12)
    dense, cut = pair()
    with interrupted_at(_Training, "_put_best", 0) as set_back:
        curve = heal(cut, dense, sample(), options, StageClock()).curve
    losses = [loss for _, loss in curve]
    assert losses[1] > losses[0] > min(losses[2:])
    assert len(set_back) > 2  # the last one is the end's
    assert_healed_alike([(_Training, "step", 8)], tmp_path, options)


def test_it_trains_on_the_text_and_tokens_that_are_asked_for(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("".join(f"No. {i}: {i * 7} trees in {i % 5} rows. " for i in range(200)))
    job = [*arguments(tiny, text), "--sparsity", "0.5", "--recover", "--recover-text", str(other)]
    result = run_json(capsys, *job, "--recover-tokens", 600, "--output", tmp_path / "out")
    recovery = result["recovery"]
    assert 600 <= recovery["tokens"] < 700
    assert recovery["passes"] == 1
    assert recovery["curve"][0][0] == 0
    assert "as the distillation went on" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--recover-text", "x.txt"], "add recover = true"),
        (["--recover", "--recover-steps", "match,heal"], "give match and distil"),
        (["--recover", "--recover-tokens", "9", "--recover-passes", "2"], "give one of them"),
        (
            ["--recover", "--recover-steps", "match", "--recover-minutes", "3"],
            "only the step distil",
        ),
        (["--recover", "--recover-text", "missing.txt"], "missing.txt"),
        (["--recover-weights", "all"], "only the step distil"),
        (["--recover", "--recover-weights", "all", "--recover-rank", "4"], "only adapters"),
        (["--recover-rank", "4"], "add recover = true"),
        (["--recover-cuts", "2"], "add recover = true"),
        (["--recover", "--recover-cuts", "9", "--recover-tokens", "90"], "give more text"),
        (["--recover", "--recover-cuts", "2", "--head-sparsity", "0.5"], "remove neurons alone"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    flags: list[str],
    words: str,
    tiny: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = [*arguments(tiny, text, tmp_path / "out"), "--sparsity", "0.5"]
    assert _exit_code([*job, *flags]) == 2
    assert words in capsys.readouterr().err


def test_nothing_but_the_linear_maps_of_the_layers_is_trained() -> None:
    dense, cut = pair()
    trained = {f"{name}.weight" for name in linear_maps(cut)}
    before = parameters(cut)
    heal(cut, dense, sample(), OPTIONS, StageClock())
    changed = {key for key, value in parameters(cut).items() if not torch.equal(value, before[key])}
    assert changed == trained
    assert not any("embed" in name or "norm" in name or "lm_head" in name for name in trained)


def test_blocks_that_count_for_nothing_teach_nothing() -> None:
    found = []
    for spoiled in (sample().blocks[7], torch.full((31,), 9)):
        dense, cut = pair()
        given = sample((1.0,) * 7 + (0.0,))
        given = replace(given, blocks=(*given.blocks[:7], spoiled))
        heal(cut, dense, given, OPTIONS, StageClock())
        found.append(parameters(cut))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-3, atol=1e-5)


class Interrupted(Exception):
    pass


@contextmanager
def interrupted_at(owner: type, method: str, call: int) -> Iterator[list[object]]:
    """That call of a method does not return; the list has one item a call that did."""
    whole, calls = getattr(owner, method), []

    def counted(self: Any, *args: Any) -> Any:
        if len(calls) + 1 == call:
            raise Interrupted
        result = whole(self, *args)
        calls.append(result)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, method, counted)
        yield calls


def assert_healed_alike(
    interruptions: Sequence[tuple[type, str, int]],
    folder: Path,
    options: RecoveryOptions = OPTIONS,
) -> tuple[int, int]:
    """Healing broken off again and again ends in the weights of one that was not; the steps that the last run took in
    matching and in distillation."""
    dense, cut = pair()
    whole = copy.deepcopy(cut)
    heal(whole, dense, sample(), options, StageClock())
    for interruption in interruptions:
        broken = copy.deepcopy(cut)
        with interrupted_at(*interruption), pytest.raises(Interrupted):
            heal(broken, dense, sample(), options, StageClock(), store=Store(folder))
    with (
        interrupted_at(_LayerFit, "step", 0) as matching,
        interrupted_at(_Training, "step", 0) as distilling,
    ):
        heal(cut, dense, sample(), options, StageClock(), store=Store(folder))
    for name, value in parameters(cut).items():
        assert torch.equal(value, parameters(whole)[name]), name
    return len(matching), len(distilling)


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Steps of matching one layer, and of the whole distillation."""
    monkeypatch.setattr(healing, "BATCH_TOKENS", 64)
    batches = len(sample().batches(64))
    dense, cut = pair()
    with interrupted_at(_Training, "step", 0) as distilling:
        heal(cut, dense, sample(), OPTIONS, StageClock())
    return OPTIONS.passes * batches, len(distilling)


def test_matching_that_was_cut_off_goes_on_with_the_next_layer(
    small_steps: tuple[int, int], tmp_path: Path
) -> None:
    layer, whole = small_steps
    # The first run ends in the first layer; each other one ends one layer and begins another.
    broken_off = [(_LayerFit, "step", 2), *[(_LayerFit, "step", layer + 3)] * (LAYERS - 1)]
    assert assert_healed_alike(broken_off, tmp_path) == (layer, whole)


@pytest.mark.parametrize("weights", ["adapters", "all"])
@pytest.mark.parametrize("numbers", [[2], [8], [4, 4, 4]], ids=str)
def test_distillation_that_was_cut_off_goes_on_with_the_next_step(
    numbers: list[int],
    weights: Weights,
    small_steps: tuple[int, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distillation, "KEEPING_SHARE", float("inf"))  # after each step
    _, whole = small_steps
    done = sum(number - 1 for number in numbers)
    assert whole > done
    broken_off = [(_Training, "step", number) for number in numbers]
    options = replace(OPTIONS, weights=weights)
    assert assert_healed_alike(broken_off, tmp_path, options) == (0, whole - done)
    assert len(list(tmp_path.glob("distilled-*"))) == 1


def test_what_costs_long_to_keep_is_kept_seldom_but_the_end_is_kept(
    small_steps: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "KEEPING_SHARE", 0.0)
    _, whole = small_steps
    first_alone = (_Training, "step", 4)
    at_the_end = (_Training, "merge", 1)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    assert assert_healed_alike([first_alone], tmp_path / "a") == (0, whole - 1)
    assert assert_healed_alike([at_the_end], tmp_path / "b") == (0, 0)


def test_a_damaged_layer_and_a_damaged_state_are_made_anew(
    small_steps: tuple[int, int], tmp_path: Path
) -> None:
    layer, whole = small_steps
    dense, cut = pair()
    with interrupted_at(_Training, "merge", 1), pytest.raises(Interrupted):
        heal(cut, dense, sample(), OPTIONS, StageClock(), store=Store(tmp_path))
    for name in ("match-00001.safetensors", f"distilled-{whole:08d}.safetensors"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[:-1])
    assert assert_healed_alike([], tmp_path) == (layer, whole)


@contextmanager
def computing_nan(steps: Sequence[int]) -> Iterator[None]:
    """Each of these steps of a distillation, from 1, computes NaN."""
    whole = _Training._loss

    def spoiled(self: _Training, *args: Any) -> Tensor:
        return whole(self, *args) * (float("nan") if self.done + 1 in steps else 1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Training, "_loss", spoiled)
        yield


def test_a_step_that_computes_nan_is_left_out_and_the_others_train(
    small_steps: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "KEEPING_SHARE", float("inf"))
    _, whole = small_steps
    dense, cut = pair()
    error, healed = hidden_error(dense, cut), copy.deepcopy(cut)
    with computing_nan([1, 4]):
        lines = heal(healed, dense, sample(), OPTIONS, StageClock()).warnings
        assert lines == ["the recovery left out 2 steps of its training that computed NaN or Inf"]
        assert hidden_error(dense, healed) < error
        # Broken off after the first step, and after the second one left out, it ends in the same weights.
        broken_off = [(_Training, "step", 2), (_Training, "step", 4)]
        assert assert_healed_alike(broken_off, tmp_path) == (0, whole - 4)


def test_a_training_that_computes_nothing_but_nan_ends_early_and_counts_what_is_missing(
    small_steps: tuple[int, int],
) -> None:
    _, whole = small_steps
    dense, cut = pair()
    with computing_nan(range(3, whole + 1)), interrupted_at(_Training, "step", 0) as steps:
        lines = heal(cut, dense, sample(), OPTIONS, StageClock()).warnings
    assert len(steps) == 2 + distillation.MOST_LEFT_OUT < whole
    assert f"left out {whole - 2} steps" in lines[0]
    assert all(bool(value.isfinite().all()) for value in parameters(cut).values())


def test_a_layer_whose_fit_computes_nan_is_left_as_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("fbn_prune.pruning.recovery.layer_matching.STEP", 1e30)
    dense, cut = pair()
    before = parameters(cut)
    more = {"passes": 2, "seed": 0, "clock": StageClock(), "store": Store(tmp_path)}
    for _ in range(2):  # the second time the store provides all layers
        assert match_layers(cut, dense, sample().batches(64), **more) == list(range(LAYERS))
        assert all(torch.equal(value, before[key]) for key, value in parameters(cut).items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_recovery_that_ends_in_nan_is_not_kept_and_the_cut_is_published(
    dtype: str,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        distillation, "LARGEST_PART", 1000
    )  # no state is measured, so the last one counts
    source = save_tiny(tmp_path / "dense", dtype=getattr(torch, dtype))
    job = [*arguments(source, text), "--sparsity", "0.5"]
    run_json(capsys, *job, "--output", tmp_path / "cut")
    largest = DistillationOptions(learning_rate=1e30)
    monkeypatch.setattr(DistillationOptions, "for_width", lambda *about: largest)
    more = ["--recover", "--recover-passes", "1", "--output", str(tmp_path / "out")]
    assert _exit_code([*job, *more]) == 0
    said = capsys.readouterr()
    assert "recovery not kept: it ended in NaN or Inf" in said.out
    line = "the recovery ended in NaN or Inf, so the model is left as it was cut"
    assert f"warning: {line}" in said.err
    assert line in (tmp_path / "out" / "README.md").read_text()
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["recovery"]["perplexity_recovered"] is None
    assert not result["recovery"]["kept"]
    assert result["perplexity_after"] == result["recovery"]["perplexity_cut"]
    cut, out = (load_file(tmp_path / name / "model.safetensors") for name in ("cut", "out"))
    assert all(torch.equal(cut[name], out[name]) for name in cut)


def test_the_gap_closed_is_the_share_that_came_back() -> None:
    assert Recovery.measured(10.0, 20.0, 14.0, 2, 100).gap_closed == pytest.approx(0.6)
    assert Recovery.measured(10.0, 10.0, 9.0, 2, 100).gap_closed is None


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("gpt2", []),
        ("phi3", ["--layout", "ragged", "--widths", "members"]),
        ("llama-mlp-bias", ["--criterion", "flap"]),
        ("llama", ["--recover-cuts", "2", "--recover-weights", "all"]),
        ("llama-mlp-bias", ["--recover-cuts", "3", "--criterion", "membership-bias"]),
        ("qwen2", ["--recover-cuts", "2", "--layout", "ragged", "--widths", "search"]),
    ],
)
def test_what_is_written_is_what_was_healed_and_measured(
    name: str,
    extra: list[str],
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured = Recovery.measured
    kept = staticmethod(lambda *figures: replace(measured(*figures), kept=True))
    monkeypatch.setattr(Recovery, "measured", kept)  # random weights have no quality to regain
    monkeypatch.setattr(distillation, "LARGEST_PART", 1000)  # nor a best state
    model = save_tiny(tmp_path / "model", name)
    out = tmp_path / "out"
    flags = ["--width-multiple", "1", "--sparsity", "0.55", *extra, "--recover"]
    result = run_json(capsys, *arguments(model, text, out, *flags))
    recovery = result["recovery"]
    assert recovery["perplexity_recovered"] == result["perplexity_after"]
    assert recovery["perplexity_cut"] != result["perplexity_after"]
    assert {"layer matching", "distillation"} <= set(result["stages"])
    assert "were trained to reproduce" in (out / "README.md").read_text()
    ragged = bool((out / "modeling_ragged.py").exists())
    loaded = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=ragged)
    before, after = Checkpoint.open(model), Checkpoint.open(out)
    attention = [n for n in before.names if "attn" in n and n.endswith("weight") and ".0." in n]
    linear = [n for n in attention if len(before.shape(n)) == 2]
    assert linear
    assert all(not torch.equal(before.tensor(n), after.tensor(n)) for n in linear)
    again = tmp_path / "again"
    assert _exit_code(["run", str(out / "recipe.yaml"), "--output", str(again)]) == 0
    assert (out / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    assert sum(p.numel() for p in loaded.parameters()) == result["parameters_after"]
