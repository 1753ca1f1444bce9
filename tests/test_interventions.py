"""Claims about interventions: exact while they last, gone without a trace after, and what an ablation reports."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import arguments, refused, run_json
from tiny_models import PATHS, TOKENS, logits, make_model, make_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from fbn_prune.cli.main import _exit_code
from fbn_prune.data.calibration import TokenBlocks
from fbn_prune.errors import InvalidInput
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.networks.intervention_effects import Ablation, largest, random_like
from fbn_prune.networks.interventions import amplified, masked, retained


def some_neurons(model: PreTrainedModel, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(width, generator=generator) < 0.4 for width in ModelAdapter(model).widths]


@pytest.mark.parametrize("name", [*PATHS, "falcon"])
def test_masking_is_zeroing_the_weights_and_leaves_no_trace(name: str) -> None:
    model = make_model(name)
    adapter, masks = ModelAdapter(model), some_neurons(model)
    before = logits(model)
    with masked(adapter, masks):
        silenced = logits(model)
    assert torch.equal(logits(model), before)
    with retained(adapter, [~mask for mask in masks]):
        assert torch.equal(logits(model), silenced)
    with torch.no_grad():
        for layer, mask in enumerate(masks):
            adapter.down_weight(layer)[:, mask] = 0
    assert not torch.equal(silenced, before)
    assert torch.equal(logits(model), silenced)


@given(st.floats(-4, 4), st.integers(0, 5))
@settings(max_examples=10, deadline=None)
def test_amplifying_is_scaling_the_weights(factor: float, seed: int) -> None:
    model = make_model("llama")
    adapter, masks = ModelAdapter(model), some_neurons(model, seed)
    with amplified(adapter, masks, factor):
        louder = logits(model)
    with torch.no_grad():
        for layer, mask in enumerate(masks):
            adapter.down_weight(layer)[:, mask] *= factor
    assert torch.allclose(logits(model), louder, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "enter",
    [masked, retained, lambda adapter, masks: amplified(adapter, masks, 3.0)],
)
def test_an_exception_inside_restores_every_bit(
    enter: Callable[..., AbstractContextManager[None]],
) -> None:
    model = make_model("gpt2")
    before = logits(model)
    changed = []

    def fails() -> None:
        with enter(ModelAdapter(model), some_neurons(model)):
            changed.append(not torch.equal(logits(model), before))
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fails()
    assert changed == [True]
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda masks: masks[:-1], "2 masks of neurons for a model of 3 layers"),
        (lambda masks: [*masks[:2], masks[2][:5]], "layer 2"),
        (lambda masks: [*masks[:2], masks[2].float()], "torch.float32"),
    ],
)
def test_masks_that_do_not_fit_are_refused_and_leave_no_trace(
    damage: Callable[[list[torch.Tensor]], list[torch.Tensor]], message: str
) -> None:
    model = make_model("llama")
    before = logits(model)
    with (
        pytest.raises(InvalidInput, match=message),
        masked(ModelAdapter(model), damage(some_neurons(model))),
    ):
        raise AssertionError("entered")
    assert torch.equal(logits(model), before)


@given(st.lists(st.integers(0, 10), min_size=1, max_size=4), st.integers(0, 100))
def test_random_sets_are_as_large_in_every_layer(sizes: list[int], seed: int) -> None:
    like = [torch.arange(10) < size for size in sizes]
    drawn = random_like(like, torch.Generator().manual_seed(seed))
    assert [int(mask.sum()) for mask in drawn] == sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_amplifying_by_one_changes_no_bit_and_interventions_nest(dtype: torch.dtype) -> None:
    model = make_model("llama", dtype=dtype)
    adapter, masks, others = ModelAdapter(model), some_neurons(model), some_neurons(model, 2)
    before = logits(model)
    with amplified(adapter, masks, 1.0):
        assert torch.equal(logits(model), before)
    with amplified(adapter, masks, 0.0), masked(adapter, others):
        none = logits(model)
    with masked(adapter, [a | b for a, b in zip(masks, others, strict=True)]):
        assert torch.equal(logits(model), none)


def test_the_largest_neurons_are_taken_whatever_their_sign() -> None:
    weights = torch.tensor([0.5, -3.0, 2.0, 0.0])
    assert largest(weights, 2).tolist() == [False, True, True, False]


def test_an_unchanged_model_shows_no_rise() -> None:
    model = make_model("llama")
    adapter = ModelAdapter(model)
    batches = TokenBlocks((TOKENS[0],), 64, ("here",)).batches(100)
    ablation = Ablation(adapter, {"a": batches, "b": batches})
    dense = ablation.dense()
    same = ablation.measure(ablation.action("amplify", 1.0), some_neurons(model))
    assert same.quality.rises(dense) == {"a": 0.0, "b": 0.0}
    assert same.quality.perplexity == dense.perplexity


def ablate(model: Path, text: Path, *more: str) -> list[str]:
    return ["ablate", *arguments(model, text, None, *more)]


@pytest.mark.parametrize("action", ["mask", "retain"])
def test_ablate_keeps_its_contract(
    action: str, tiny: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--action", action, "--draws", "3", "--z", "1", "--text-tokens", "100"]
    result = run_json(capsys, *ablate(tiny, text, *more))
    assert {entry["id"] for entry in result["networks"]} == set(range(6))
    for entry in result["networks"]:
        assert 0 < entry["neurons"] < 72
        assert entry["perplexity"] > 0
    assert result["dense"] > 0
    assert result["random"]["n"] == 3
    assert result["random"]["mean"] > 0
    assert result["random"]["std"] >= 0
    by_id = {entry["id"]: entry["neurons"] for entry in result["networks"]}
    assert result["random"]["neurons"] == by_id[result["strongest"]]


def test_amplifying_by_one_is_the_dense_model_to_the_last_digit(
    tiny: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--action", "amplify", "--factor", "1", "--draws", "2", "--z", "2"]
    result = run_json(capsys, *ablate(tiny, text, *more))
    assert {entry["perplexity"] for entry in result["networks"]} == {result["dense"]}
    assert (result["random"]["mean"], result["random"]["std"]) == (result["dense"], 0)


def test_ablate_shows_growing_sets_components_and_each_text(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    more = "--network 2 --network 4 --grow 1,6 --draws 2 --z 2 --components --text-tokens 200"
    texts = ["--text", str(text), "--text", f"fox={other}"]
    result = run_json(capsys, *ablate(tiny, text, *more.split(), *texts))
    assert {entry["id"] for entry in result["networks"]} == {2, 4}
    assert list(result["tokens"]) == ["text", "fox"]
    for entry in result["networks"]:
        assert list(entry["rise_by_text"]) == ["text", "fox"]
    sizes = {entry["neurons"] for entry in result["components"]}
    assert sizes == {result["random"]["neurons"]}
    for curve in ("mask", "retain"):
        steps = result["growing"][curve]
        assert [step["n"] for step in steps] == [1, 6]
        assert steps[0]["neurons"] < steps[1]["neurons"]
        assert all(step["random"]["n"] == 2 for step in steps)
        assert all(step["components"]["neurons"] == step["neurons"] for step in steps)
    assert _exit_code(ablate(tiny, text, *more.split(), *texts)) == 0
    assert "random" in capsys.readouterr().out


def test_ablate_measures_tasks_of_the_harness_as_evaluate_does(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    lines = [{"context": f"one two {i}", "continuation": "three"} for i in range(8)]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tasks = ["--tasks", str(questions), "--limit", "6"]
    evaluated = run_json(capsys, "evaluate", "--model", tiny, *tasks)["tasks"]["questions"]
    expected = {metric: entry["value"] for metric, entry in evaluated.items()}
    few = ["--draws", "2", "--text-tokens", "50", "--network", "1", "--grow", "6"]
    same = ["--action", "amplify", "--factor", "1"]
    result = run_json(capsys, *ablate(tiny, text, *tasks, *few, *same))
    assert result["dense_tasks"] == {"questions": expected}
    assert result["networks"][0]["tasks"] == {"questions": expected}
    for metric, spread in result["random"]["tasks"]["questions"].items():
        assert spread == {"mean": pytest.approx(expected[metric]), "std": 0}
    silent = ablate(tiny, text, *tasks, *few, "--z", "0")
    everything_masked = run_json(capsys, *silent)["growing"]["mask"][0]["tasks"]["questions"]
    model = AutoModelForCausalLM.from_pretrained(tiny)
    adapter = ModelAdapter(model)
    with torch.no_grad():
        for layer in range(3):
            adapter.down_weight(layer).zero_()
    model.save_pretrained(tmp_path / "without")
    make_tokenizer().save_pretrained(tmp_path / "without")
    zeroed = run_json(capsys, "evaluate", "--model", tmp_path / "without", *tasks)
    for metric, entry in zeroed["tasks"]["questions"].items():
        assert everything_masked[metric] == entry["value"]
    assert everything_masked != expected


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tasks", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--network", "9"], "no network 9"),
        (["--grow", "1,7"], "give a number from 1 to 6"),
        (["--grow", "many"], "give numbers"),
        (["--draws", "0"], "draws"),
        (["--action", "freeze"], "freeze"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--text", f"a={__file__}", "--text", f"a={__file__}"], "two texts are called 'a'"),
        (["--text", "/dev/null"], "has no text"),
    ],
)
def test_ablate_refuses_in_one_line_before_it_looks_for_networks(
    more: list[str],
    message: str,
    tiny: Path,
    text: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fbn_prune.runs.stages.discover", None)
    refused(capsys, ablate(tiny, text, *more), message)


def test_a_text_may_lie_in_a_folder_with_an_equals_sign(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lr=0.1").mkdir()
    shutil.copy(text, tmp_path / "lr=0.1" / "words.txt")
    given = ["--text", str(tmp_path / "lr=0.1" / "words.txt"), "--draws", "1"]
    shown = run_json(capsys, *ablate(tiny, text, *given))
    assert set(shown["tokens"]) == {"words"}


@pytest.mark.parametrize("rank", ["energy", "knockout"])
def test_rank_lists_every_network_strongest_first(
    rank: str, tiny: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_json(capsys, "rank", *arguments(tiny, text, None, "--rank", rank))
    scores = [entry["score"] for entry in result["networks"]]
    assert scores == sorted(scores, reverse=True)
    assert {entry["id"] for entry in result["networks"]} == set(range(6))
    assert result["rank"] == rank


def test_rank_by_a_task_is_how_far_networks_stand_out(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = tmp_path / "task.jsonl"
    task.write_text('{"text": "zzzz zzzz zzzz zzzz"}\n')
    result = run_json(capsys, "rank", *arguments(tiny, text, None, "--task", str(task)))
    assert result["rank"] == "task"
    assert result["networks"][0]["score"] > 0
