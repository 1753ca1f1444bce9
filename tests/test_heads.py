"""Claims about cutting attention heads: whole groups go, the rest takes over, and every loader opens what is left."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import small_runs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import (
    FAMILY_CONFIGS,
    HIDDEN,
    LAYERS,
    TOKENS,
    logits,
    make_merging_tokenizer,
    make_model,
    save_tiny,
)
from transformers import AutoModelForCausalLM, LlamaConfig

from fbn_prune.errors import InvalidInput
from fbn_prune.export.to_gguf import write as write_gguf
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.families import family_of
from fbn_prune.model.heads import HeadCut
from fbn_prune.model.perplexity import perplexity
from fbn_prune.model.surgery import MlpCut
from fbn_prune.progress import StageClock
from fbn_prune.pruning.finished import FinishedLayer
from fbn_prune.pruning.second_order import choose_groups, choose_neurons, output_error, refit
from fbn_prune.recipe import Recipe
from fbn_prune.runs import memory
from fbn_prune.runs.dry_run import plan
from fbn_prune.runs.main_job import run_prune
from fbn_prune.runs.memory import possible_plans
from fbn_prune.runs.opening import read_texts
from fbn_prune.runs.setup import prepare
from fbn_prune.serving.tasks import task_of_pruned

WITH_HEADS = [name for name, config in FAMILY_CONFIGS.items() if family_of(config()).attention]


def recipe(model: Path, text: Path, output: Path | None = None, **changes: object) -> Recipe:
    budget = {} if "target_params" in changes else {"sparsity": 0.25}
    heads = {"head_sparsity": 0.5, "keep_networks": None}
    return small_runs.recipe(model, text, output, **{**heads, **budget, **changes})


@pytest.fixture(scope="module")
def headless(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with half its heads, to read."""
    output = tmp_path_factory.mktemp("headless") / "out"
    run_prune(recipe(tiny, text, output), StageClock())
    return output


def problem(seed: int, groups: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    mixing = torch.randn(groups * size, groups * size, **draw)
    x = torch.randn(200, groups * size, **draw) @ mixing
    return torch.randn(6, groups * size, **draw), x.T @ x / len(x)


@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_the_group_that_goes_is_the_one_whose_best_refit_loses_least(
    seed: int, groups: int, size: int
) -> None:
    weight, gram = problem(seed, groups, size)
    errors = []
    for gone in range(groups):
        stay = torch.tensor([i for i in range(groups * size) if i // size != gone])
        errors.append(output_error(weight, gram, stay, refit(weight, gram, stay, damping=1e-12)))
    kept = choose_groups(weight, gram, size, groups - 1, damping=1e-12)
    missing = set(range(groups)) - set(kept.tolist())
    assert missing == {min(range(groups), key=errors.__getitem__)}


@given(st.integers(0, 10_000))
@settings(max_examples=10, deadline=None)
def test_groups_of_one_are_the_neurons_that_the_second_order_keeps(seed: int) -> None:
    weight, gram = problem(seed, 12, 1)
    expected = choose_neurons(weight, gram, 5, damping=1e-2)
    assert torch.equal(choose_groups(weight, gram, 1, 5, damping=1e-2), expected)


@pytest.mark.parametrize("name", WITH_HEADS)
def test_without_a_group_that_gives_nothing_the_model_is_the_same(name: str) -> None:
    """Query, key, value and output rows of one group go together: another one's would show."""
    model = make_model(name)
    adapter = ModelAdapter(model)
    family = adapter.family
    shape = family.head_shape(model.config)
    assert (shape.groups, shape.queries) == (2, 2)
    for layer in range(LAYERS):
        out = adapter.attention_output(layer)
        silent = layer % 2
        with torch.no_grad():
            out.weight[:, silent * shape.width : (silent + 1) * shape.width] = 0
    before = logits(model)
    for layer in range(LAYERS):
        out = adapter.attention_output(layer).weight.detach()
        stays = 1 - layer % 2
        heads = HeadCut(
            torch.tensor([stays]), out[:, stays * shape.width : (stays + 1) * shape.width]
        )
        down = adapter.down_weight(layer)
        whole = MlpCut(torch.arange(down.shape[1]), down.clone(), heads=heads)
        adapter.cut(layer, whole)
        assert torch.allclose(logits(model), before, atol=1e-5)
    assert family.head_shape(model.config) == replace(shape, groups=1)
    generated = model.generate(TOKENS, max_new_tokens=4, do_sample=False)
    assert generated.shape[1] == TOKENS.shape[1] + 4


@pytest.mark.parametrize(
    ("name", "sequential"), [("llama", True), ("llama-mlp-bias", False), ("phi3", False)]
)
def test_what_is_measured_is_what_stock_transformers_loads(
    name: str, sequential: bool, text: Path, tmp_path: Path
) -> None:
    model = save_tiny(tmp_path / "model", name)
    asked = recipe(model, text, tmp_path / "out", sequential=sequential)
    predicted = plan(prepare(recipe(model, text)))
    result = run_prune(asked, StageClock())
    assert (result.heads_total, result.heads_kept) == (4 * LAYERS, 2 * LAYERS)
    assert result.parameters_after == predicted.parameters_after
    assert result.bytes_after == predicted.bytes_after
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert family_of(written.config).head_shape(written.config).groups == 1
    again = tmp_path / "again"
    written.save_pretrained(again)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(again)), logits(written))
    prepared = prepare(recipe(model, text))
    held_out = read_texts(prepared, prepared.checkpoint.load_tokenizer())[0].held_out
    assert perplexity(ModelAdapter(written), held_out.batches(400)) == pytest.approx(
        result.perplexity_after, rel=1e-4
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| attention heads | 12 | 6 | -50.0 % |" in card
    assert "6 of 12 attention heads remain" in card
    assert "attention heads" in (tmp_path / "out" / "report.html").read_text()
    assert json.loads((tmp_path / "out" / "result.json").read_text())["heads_kept"] == 6


def test_a_refit_beats_leaving_the_kept_heads_as_they_were(tiny: Path, headless: Path) -> None:
    before, after = Checkpoint.open(tiny), Checkpoint.open(headless)
    changed = [
        name
        for name in after.names
        if "o_proj" in name and not torch.isin(after.tensor(name), before.tensor(name)).all()
    ]
    assert len(changed) == LAYERS  # new weights, not a selection of the old ones
    for name in after.names:
        if "q_proj" in name or "k_proj" in name or "v_proj" in name:
            rows = {row.numpy().tobytes() for row in before.tensor(name)}
            assert all(row.numpy().tobytes() in rows for row in after.tensor(name))


@pytest.mark.parametrize("sequential", [False, True])
def test_streaming_cuts_the_same_heads(
    sequential: bool, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny(tmp_path / "model", "llama-mlp-bias")

    def frugal(*args: object) -> memory.MemoryPlan:
        plans = [each for each in possible_plans(*args) if each.streamed]
        return [each for each in plans if each.batch_tokens == 4096][-1]

    whole = run_prune(recipe(model, text, tmp_path / "one", sequential=sequential), StageClock())
    monkeypatch.setattr("fbn_prune.runs.setup.plan_memory", frugal)
    streamed = run_prune(recipe(model, text, tmp_path / "two", sequential=sequential), StageClock())
    assert streamed.perplexity_after == pytest.approx(whole.perplexity_after, rel=1e-5)
    torch.testing.assert_close(
        small_runs.tensors(tmp_path / "two"),
        small_runs.tensors(tmp_path / "one"),
        rtol=0,
        atol=1e-5,
    )


def test_ragged_layers_and_recovery_go_with_cut_heads(
    tiny: Path, text: Path, tmp_path: Path
) -> None:
    ragged = {"layout": "ragged", "widths": "members", "keep_networks": 3}
    recovery = {"recover": True, "recover_passes": 1, "recover_rank": 2}
    asked = recipe(tiny, text, tmp_path / "out", **ragged, **recovery)
    result = run_prune(asked, StageClock())
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert sum(p.numel() for p in written.parameters()) == result.parameters_after
    assert written.config.num_key_value_heads == 1
    assert torch.isfinite(logits(written)).all()


def test_a_budget_in_parameters_counts_the_heads_that_go(
    tiny: Path, text: Path, tmp_path: Path
) -> None:
    total = Checkpoint.open(tiny).total_parameters
    heads = 2 * HIDDEN * 4 * LAYERS * 3  # half of q and o, half of k and v
    target = total - heads - 3 * HIDDEN * 4 * LAYERS  # and four neurons of each layer
    asked = recipe(tiny, text, tmp_path / "out", target_params=str(target))
    result = run_prune(asked, StageClock())
    assert result.parameters_after == target
    assert result.widths == [20] * LAYERS


@pytest.mark.parametrize("name", ["gpt2", "opt", "falcon"])
def test_architectures_without_a_head_size_of_their_own_are_refused(
    name: str, text: Path, tmp_path: Path
) -> None:
    model = save_tiny(tmp_path / "model", name)
    with pytest.raises(InvalidInput, match=r"attention heads of .* cannot be cut"):
        prepare(recipe(model, text))


def test_a_share_that_the_config_does_not_accept_is_refused_with_those_that_it_does(
    text: Path, tmp_path: Path
) -> None:
    fields = FAMILY_CONFIGS["llama"]().to_dict()
    fields |= {"num_attention_heads": 8, "head_dim": 2, "num_key_value_heads": 4}
    model = save_tiny(tmp_path / "model", config=LlamaConfig(**fields))
    for share, message in {
        0.25: r"3 of 4 key-value heads .* possible shares: 0\.5, 0\.75$",
        0.9: "0 of 4 key-value heads",
    }.items():
        with pytest.raises(InvalidInput, match=message):
            prepare(recipe(model, text, head_sparsity=share))
    assert prepare(recipe(model, text, head_sparsity=0.75)).head_groups == 1


def test_whole_layers_and_cut_heads_exclude_each_other(text: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="keep_layers = 0: head_sparsity"):
        recipe(tmp_path, text, layout="ragged", keep_layers="0")


def test_a_task_of_a_shared_model_cannot_lack_heads(tiny: Path, headless: Path) -> None:
    with pytest.raises(InvalidInput, match="attention heads were cut"):
        task_of_pruned(Checkpoint.open(tiny), Checkpoint.open(headless), "full", 8)


def test_gguf_says_how_large_a_head_is_where_that_can_be_said(text: Path, tmp_path: Path) -> None:
    for name in ("llama", "qwen2"):
        model = save_tiny(tmp_path / name, name)
        make_merging_tokenizer().save_pretrained(model)
        run_prune(recipe(model, text, tmp_path / f"{name}-out"), StageClock())
    write_gguf(Checkpoint.open(tmp_path / "llama-out"), tmp_path / "llama.gguf")
    fields = gguf.GGUFReader(tmp_path / "llama.gguf").fields
    counts = {
        key: int(fields[f"llama.attention.{key}"].contents())
        for key in ("head_count", "head_count_kv", "key_length", "value_length")
    }
    assert counts == {"head_count": 2, "head_count_kv": 1, "key_length": 4, "value_length": 4}
    with pytest.raises(InvalidInput, match="without --head-sparsity"):
        write_gguf(Checkpoint.open(tmp_path / "qwen2-out"), tmp_path / "qwen2.gguf")
    assert not (tmp_path / "qwen2.gguf").exists()


def test_a_finished_layer_comes_back_with_its_heads_and_what_was_said_of_it() -> None:
    heads = HeadCut(torch.tensor([1]), torch.randn(4, 6), torch.randn(4))
    cut = MlpCut(torch.tensor([0, 2]), torch.randn(4, 2), None, heads)
    back = FinishedLayer.from_bytes(FinishedLayer(cut, 0.25, ("few tokens", "ünd")).to_bytes())
    assert back.notes == ("few tokens", "ünd")
    assert back.relative_error == 0.25
    assert back.cut.heads is not None
    assert torch.equal(back.cut.heads.out_weight, heads.out_weight)
    assert torch.equal(back.cut.heads.out_bias, heads.out_bias)
    assert back.cut.down_bias is None
