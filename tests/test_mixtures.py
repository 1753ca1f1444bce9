"""Mixtures of experts: what is cut is cut as stock transformers computes it, for every type that is tried out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mixtures import MIXTURES, mixture_config
from safetensors.torch import load_file
from small_runs import refused, run_json
from tiny_models import logits, make_model, make_tokenizer, save_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

from fbn_prune import api
from fbn_prune.data.calibration import Batch
from fbn_prune.errors import InvalidInput
from fbn_prune.export.mixture_writer import write_mixture
from fbn_prune.model.mixture_adapter import MixtureAdapter
from fbn_prune.model.mixture_checkpoint import open_mixture
from fbn_prune.model.mixture_family import MixtureFamily, mixture_family
from fbn_prune.model.perplexity import perplexity
from fbn_prune.model.routed import ExpertsCut, Routed
from fbn_prune.networks.interventions import masked
from fbn_prune.progress import StageClock
from fbn_prune.pruning.block_cutting import MixturePlan, cut_block
from fbn_prune.pruning.evidence import CutOptions
from fbn_prune.pruning.experts import block_output, choose_experts, frequency, reap, refitted, whole
from fbn_prune.pruning.mixture_cutting import cut_experts
from fbn_prune.recipe import PruningConfig, build_recipe
from fbn_prune.runs.mixture_comparison import WAYS
from fbn_prune.runs.mixture_setup import width_for
from fbn_prune.runs.opening import open_run
from fbn_prune.runs.setup import prepare

OPTIONS = CutOptions(
    sequential=False, damping=1e-2, refit_damping=1e-3, seed=0, round_to=torch.float32
)
IDS = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(0))
BATCHES = [Batch(IDS, torch.ones_like(IDS, dtype=torch.bool))]
TEXT = "".join(
    f"{number} apples and {number * 3} pears, {number % 7} plums\n" for number in range(300)
)


def opened(name: str, **changes: object) -> MixtureAdapter:
    """A tiny random mixture of a type."""
    config = mixture_config(name, **changes)
    model = make_model("", config=config)
    return MixtureAdapter(model, mixture_family(config.to_dict()))


def recorded(adapter: MixtureAdapter, layer: int) -> Routed:
    """What the router of a layer sends to its experts for some text."""
    with adapter.blocks[layer].recording() as seen:
        logits(adapter.model, IDS)
    return seen[0]


def keep(adapter: MixtureAdapter, experts: list[int], neurons: Tensor) -> list[ExpertsCut]:
    """The cut that keeps these experts and neurons with their weights."""
    cuts = []
    for block in adapter.blocks:
        cut = whole(block, experts)
        down = tuple(weight[:, neurons] for weight in cut.down)
        cuts.append(replace(cut, neurons=tuple(neurons for _ in experts), down=down))
    return cuts


@pytest.mark.parametrize("name", MIXTURES)
@torch.no_grad()
def test_keeping_all_is_the_identity_and_neurons_without_output_do_not_count(name: str) -> None:
    adapter = opened(name)
    model, family = adapter.model, adapter.mixture
    every, experts = torch.arange(family.expert_width), list(range(family.count))
    dense = logits(model, IDS)
    with adapter.trying_experts(keep(adapter, experts, every), round_to=torch.float32):
        assert torch.equal(logits(model, IDS), dense)
    for block in adapter.blocks:
        for expert in experts:
            block.down(expert)[:, ::2] = 0.0
    silent = logits(model, IDS)
    assert not torch.allclose(silent, dense)
    with adapter.trying_experts(keep(adapter, experts, every[1::2]), round_to=torch.float32):
        torch.testing.assert_close(logits(model, IDS), silent, atol=1e-4, rtol=0)
    assert torch.equal(logits(model, IDS), silent), "trying must leave the model as it was"
    made, _ = cut_experts(
        adapter, BATCHES, {0: MixturePlan(family.count, 8)}, OPTIONS, clock=StageClock()
    )
    assert all(torch.equal(own, every[1::2]) for cut in made[0].cuts for own in cut.neurons)
    assert max(made[0].errors) < 1e-6


@pytest.mark.parametrize("name", MIXTURES)
@torch.no_grad()
def test_experts_that_no_token_is_sent_to_do_not_count(name: str) -> None:
    adapter = opened(name)
    block, family = adapter.blocks[0], adapter.mixture
    size = family.count // family.groups
    gone = torch.arange(family.count) % size == 1  # one of each group
    hidden = torch.randn(40, 16)
    hidden[:, 0] = hidden[:, 0].abs() + 1  # a channel by which the router tells the experts
    weight = next(path for path in family.counted if path.endswith("weight"))
    router = adapter.layers[0].get_parameter(weight)
    router[:, 0] = 0.0
    router[gone] = 0.0
    router[gone, 0] = -100.0
    before = _first(block.parent(hidden[None]))
    kept = torch.arange(family.count)[~gone]
    assert torch.isin(block.route(hidden).index, kept).all()
    routed = block.route(hidden, kept)
    cut, error = refitted(
        block, routed, whole(block, kept), block_output(block, block.route(hidden)), damping=1e-3
    )
    assert error < 1e-8, "the output lacks nothing, so the refit changes nothing"
    block.cut(cut, round_to=torch.float32)
    torch.testing.assert_close(_first(block.parent(hidden[None])), before, atol=1e-4, rtol=1e-4)
    assert block.count == len(kept)


def _first(output: object) -> Tensor:
    found = output[0] if isinstance(output, tuple) else output
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("name", MIXTURES)
def test_the_main_job_writes_what_stock_classes_load(name: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", config=mixture_config(name))
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    family = open_mixture(folder).family
    assert isinstance(family, MixtureFamily)
    half = family.count // 2
    common = {"calibration": str(text), "tokens": 800, "context": 32, "device": "cpu"}
    recipe = build_recipe(
        {"model": str(folder), "output": tmp_path / "out", "sparsity": 0.5, "experts": half}
        | common
    )
    result = api.prune_checkpoint(recipe=recipe)
    assert result.experts == (family.count, half)
    assert set(result.widths) == {8}
    written = mixture_family(json.loads((tmp_path / "out" / "config.json").read_text()))
    assert (written.count, written.expert_width) == (half, 8)
    assert written.top_k == family.top_k_of(half)
    again = {"model": str(tmp_path / "out"), "experts": half}
    on = open_run(prepare(build_recipe(again | common)), StageClock())
    found = perplexity(on.adapter, on.data.held_out.batches(256))
    assert found == pytest.approx(result.perplexity_after, rel=1e-6)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(stock), logits(on.adapter.model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_a_wrong_orientation_is_noticed_where_experts_are_narrow_or_square(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No shape tells: gate and up together are square in narrow experts, and the output is in square ones."""
    key = "intermediate_size" if name == "gpt_oss" else "moe_intermediate_size"
    for width, method in ((8, "input_weight"), (16, "down"), (16, "_rows")):
        adapter = opened(name, **{key: width})
        block, tokens = adapter.blocks[0], recorded(adapter, 0)
        block.check(tokens)
        right = getattr(block, method)
        wrong = (lambda neurons: neurons.repeat(2)) if method == "_rows" else lambda e: right(e).T  # noqa: B023
        monkeypatch.setattr(block, method, wrong)
        with pytest.raises(InvalidInput, match="are not what their tensors say"):
            block.check(tokens)


def test_each_written_expert_is_its_own_gate_up_and_down(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", config=mixture_config("qwen3_moe"))
    source = open_mixture(folder)
    assert isinstance(source.family, MixtureFamily)
    adapter = MixtureAdapter(source.load_model("cpu", torch.float32), source.family)
    adapter.cut_experts(keep(adapter, [1, 4], torch.arange(3, 11)), round_to=torch.float32)
    out = tmp_path / "out"
    out.mkdir()
    write_mixture(source, adapter, (2, 8), out)
    before, after = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    for new, old in enumerate([1, 4]):
        for name, rows in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            there = "model.layers.1.mlp.experts.{}." + name + ".weight"
            kept = before[there.format(old)].index_select(rows, torch.arange(3, 11))
            assert torch.equal(after[there.format(new)], kept)
    assert "model.layers.1.mlp.experts.2.up_proj.weight" not in after


@torch.no_grad()
def test_the_second_order_removes_a_twin_and_the_refit_makes_up_for_it() -> None:
    """Of two experts that compute the same, one can go at no cost where the router treats them alike."""
    adapter = opened("mixtral")
    block = adapter.blocks[0]
    for parameter in (block.experts.gate_up_proj, block.experts.down_proj):
        parameter[5] = parameter[2]
    hidden = torch.randn(400, 16)
    tokens = block.route(hidden)
    target = block_output(block, tokens)
    for criterion in ("second-order", "reap", "frequency", "random"):
        kept = choose_experts(block, tokens, 4, criterion=criterion, seed=0)
        assert len(kept) == 4
        assert torch.equal(kept, kept.unique())
    plan = MixturePlan(3, 16)
    finished = cut_block(block, tokens, plan, OPTIONS, layer=0)
    cut, error = finished.cut, finished.error
    plain, before = refitted(
        block,
        block.route(hidden, cut.experts),
        whole(block, cut.experts),
        target,
        damping=1e-3,
        sweeps=0,
    )
    assert error < 0.9 * before
    assert all(
        torch.equal(a, b) for a, b in zip(plain.down, whole(block, cut.experts).down, strict=True)
    )


@torch.no_grad()
def test_of_the_experts_that_the_second_order_and_reap_keep_those_with_less_error_stay() -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        block = opened("mixtral").blocks[0]
        tokens = block.route(torch.randn(400, 16))
        ours = cut_block(block, tokens, MixturePlan(2, 16), OPTIONS, layer=0)
        theirs = cut_block(block, tokens, MixturePlan(2, 16, "reap", refit=True), OPTIONS, layer=0)
        plain = cut_block(block, tokens, MixturePlan(2, 16, "reap"), OPTIONS, layer=0)
        assert ours.error <= theirs.error
        assert plain.error == 0, "a baseline does not refit"


def test_reap_is_the_mean_of_gate_times_norm_over_an_experts_tokens() -> None:
    block = opened("mixtral").blocks[0]
    tokens = block.route(torch.randn(50, 16))
    scores = reap(block, tokens, 0)
    rows, gates = tokens.of(3)
    output = block.output(3, block.activation(3, tokens.hidden[rows])).double()
    assert scores[3] == pytest.approx(float((output.norm(dim=1) * gates).mean()))
    assert torch.equal(
        frequency(block, tokens, 0).long(), tokens.index.flatten().bincount(minlength=6)
    )


def test_experts_with_few_tokens_get_a_pooled_hessian_and_it_is_said() -> None:
    adapter = opened("olmoe")
    made, _ = cut_experts(adapter, BATCHES, {0: MixturePlan(6, 8)}, OPTIONS, clock=StageClock())
    assert made[0].pooled > 0
    (line,) = made[0].lines()
    assert "fewer than 2 tokens for each neuron" in line


def test_shared_experts_stay_whole_where_the_config_gives_them_the_experts_width() -> None:
    family = mixture_family(mixture_config("deepseek_v3").to_dict())
    assert (family.shared_key, family.groups) == ("n_shared_experts", 2)
    assert family.with_experts({}, 8, 8) | {"n_shared_experts": 2} == family.with_experts({}, 8, 8)
    assert width_for(family, 0.4, 2) == 8
    assert not family.states_width(6)
    with pytest.raises(InvalidInput, match="2 groups of equal size"):
        family.check_count(5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "give --sparsity"),
        ({"experts": 7}, "a layer has 6: keep 1 to 6"),
        ({"sparsity": 0.5, "loss_aware": True}, "loss_aware = True: not done on mixtures"),
        ({"sparsity": 0.5, "layout": "ragged"}, "layout = ragged: not done on mixtures"),
        ({"forget": __file__}, "forget = .*: not done on mixtures"),
        ({"sparsity": 0.5, "criterion": "membership"}, "criterion = membership: not done"),
        (
            {"sparsity": 0.5, "width_multiple": 64},
            "width_multiple = 64: no multiple of it and of 8",
        ),
    ],
)
def test_what_is_not_done_is_refused_by_name(
    settings: dict[str, object], said: str, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "model", config=mixture_config("qwen3_moe"))
    recipe = build_recipe({"model": str(folder), "output": tmp_path / "out", **settings})
    with pytest.raises(InvalidInput, match=said):
        api.prune_checkpoint(recipe=recipe)
    assert not (tmp_path / "out").exists()


def test_other_commands_and_dense_models_refuse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny(tmp_path / "model", config=mixture_config("qwen3_moe"))
    refused(capsys, ["--model", str(folder), "--dry-run"], "is a mixture of experts")
    more = ["--model", str(folder), "--output", str(tmp_path / "out"), "--experts", "9"]
    refused(capsys, more, "a layer has 6: keep 1 to 6")
    dense = save_tiny(tmp_path / "dense")
    with pytest.raises(InvalidInput, match="is no mixture of experts"):
        api.prune_checkpoint(
            recipe=build_recipe({"model": str(dense), "experts": 4, "output": tmp_path / "out"})
        )
    with pytest.raises(InvalidInput, match="say how many experts stay"):
        build_recipe({"expert_criterion": "reap"})


def test_compare_measures_every_way_on_one_sample(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", config=mixture_config("qwen3_moe"))
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    recipe = build_recipe(
        {"model": str(folder), "calibration": str(text), "tokens": 800, "context": 32}
    )
    found = api.compare(recipe, [], [0.5], tmp_path / "found.json")
    assert {name for name, _ in found.cells} == set(WAYS)
    assert (tmp_path / "found.svg").exists()
    with pytest.raises(InvalidInput, match="on a mixture of experts choose from"):
        api.compare(recipe, ["flap"], [0.5])


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@torch.no_grad()
def test_the_neurons_of_all_experts_together_are_a_layers_neurons(name: str) -> None:
    """Their activations times gates give the block's output; to mask an expert's neurons is to silence it."""
    adapter = opened(name)
    tokens, seen = recorded(adapter, 0), []
    watching = adapter.watch_neurons(0, seen.append)
    dense = logits(adapter.model, IDS)
    watching.remove()
    block, width = adapter.blocks[0], adapter.blocks[0].width
    output = seen[0] @ adapter.down_weight(0).T
    if (biases := getattr(block.experts, "down_proj_bias", None)) is not None:
        for expert in range(block.count):
            rows, gates = tokens.of(expert)
            output[rows] += gates.float()[:, None] * biases[expert]
    torch.testing.assert_close(output, block_output(block, tokens), atol=1e-4, rtol=1e-4)
    assert seen[0].shape == (IDS.numel(), adapter.widths[0])
    silent = torch.zeros(adapter.widths[0], dtype=torch.bool)
    silent[2 * width : 3 * width] = True
    nothing = torch.zeros(adapter.widths[1], dtype=torch.bool)
    with masked(adapter, [silent, nothing]):
        found = logits(adapter.model, IDS)
    before = block.down(2).clone()
    block.down(2).zero_()
    torch.testing.assert_close(found, logits(adapter.model, IDS), atol=1e-5, rtol=0)
    block.down(2).copy_(before)
    assert torch.equal(logits(adapter.model, IDS), dense)


def test_networks_are_found_over_all_experts_and_name_those_they_span(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny(tmp_path / "model", config=mixture_config("qwen3_moe"))
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    settings = {"model": str(folder), "calibration": str(text), "tokens": 600, "context": 32}
    small = {"networks": 4, "network_tokens": 400, "output": tmp_path / "found"}
    networks, path = api.discover_checkpoint(build_recipe(settings | small))
    assert list(networks.widths) == [6 * 16] * 2
    cards = api.network_cards(networks)
    assert all(1 <= card["experts_spanned"] <= 12 for card in cards)
    flags = ["--model", folder, "--calibration", text, "--tokens", 600, "--context", 32]
    found = run_json(capsys, "ablate", *flags, "--networks-from", path, "--draws", 2)
    assert len(found["networks"]) == 4
    assert all(1 <= one["neurons"] <= 192 for one in found["networks"])
    assert len(api.rank(build_recipe(settings | {"networks_from": path})).order) == 4
    shown = run_json(capsys, "inspect", path)
    assert all(1 <= one["experts_spanned"] <= 12 for one in shown["networks"])


def test_experts_stored_fused_or_apiece_give_the_same_in_the_form_of_the_source(
    tmp_path: Path,
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    model = make_model("", config=mixture_config("qwen3_moe"), dtype=torch.bfloat16)
    perplexities = []
    for form, tensor in (("fused", "experts.gate_up_proj"), ("apiece", "experts.3.up_proj.weight")):
        folder, out = tmp_path / form, tmp_path / f"{form}-out"
        model.save_pretrained(folder, save_original_format=form == "apiece")
        make_tokenizer().save_pretrained(folder)
        result = api.prune_checkpoint(
            recipe=build_recipe(
                {"model": str(folder), "output": out, "calibration": str(text), "tokens": 800}
                | {"context": 32, "sparsity": 0.5, "experts": 4, "device": "cpu"}
            )
        )
        perplexities.append(result.perplexity_after)
        tensors = open_mixture(out).tensors
        assert f"model.layers.1.mlp.{tensor}" in tensors
        assert {info.dtype for info in tensors.values()} == {torch.bfloat16}
    assert perplexities[0] == perplexities[1]


def test_a_live_mixture_is_pruned_in_place_trains_and_saves(tmp_path: Path) -> None:
    model = make_model("", config=mixture_config("deepseek_v3"))
    model.train()
    settings = PruningConfig(sparsity=0.5, experts=4, tokens=800, context=32)
    result = api.prune(model, make_tokenizer(), TEXT.splitlines(), settings)
    assert result.model is model
    assert model.training
    assert result.parameters_after < result.parameters_before
    model(input_ids=IDS, labels=IDS).loss.backward()
    router = model.get_parameter("model.layers.1.mlp.gate.weight")
    assert router.shape == (4, 16)
    assert router.grad is not None
    assert router.grad.abs().sum() > 0
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(model.eval()), atol=1e-5, rtol=0)


def test_a_group_router_without_experts_is_the_same_by_rows_and_by_correction_bias(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    block = opened("deepseek_v3").blocks[0]
    hidden = torch.randn(50, 16)
    kept = torch.tensor([0, 1, 3, 5, 6, 7])  # three of each group of four
    by_rows = block.route(hidden, kept)
    monkeypatch.setattr(block, "_balanced", lambda kept: False)
    by_bias = block.route(hidden, kept)
    assert torch.equal(by_rows.index.sort(1).values, by_bias.index.sort(1).values)
    torch.testing.assert_close(by_rows.gates.sum(1), by_bias.gates.sum(1))
    assert block.route(hidden).index.max() == 7, "the router is as it was"


@pytest.mark.parametrize("name", ["granitemoe", "glm4_moe"])
def test_sequential_mode_starts_alike_and_then_makes_up_for_the_layers_before(name: str) -> None:
    adapter = opened(name)
    dense = logits(adapter.model, IDS)
    plan = {0: MixturePlan(adapter.counts[0], 8)}
    made = [
        cut_experts(
            adapter, BATCHES, plan, replace(OPTIONS, sequential=sequential), clock=StageClock()
        )[0][0]
        for sequential in (False, True)
    ]
    assert torch.equal(logits(adapter.model, IDS), dense), "the model is as it was"
    first, second = ([torch.stack(one.cuts[layer].down) for one in made] for layer in range(2))
    torch.testing.assert_close(first[0], first[1], atol=1e-5, rtol=0)
    assert not torch.allclose(second[0], second[1], atol=1e-5)
