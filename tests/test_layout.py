"""Claims about ragged runs, budgets in parameters and bytes, and whole layers, end to end."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_runs import arguments, refused, run_json
from tiny_models import CONTEXT, HIDDEN, LAYERS, PATHS, logits, make_model, save_tiny
from transformers import AutoModelForCausalLM, PreTrainedModel

from fbn_prune.cli.main import _exit_code
from fbn_prune.data.calibration import TokenBlocks
from fbn_prune.errors import FbnPruneError
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.streaming import SpilledCuts
from fbn_prune.model.surgery import MlpCut
from fbn_prune.pruning.layout import _surely_less, _tried_every
from fbn_prune.recipe import parse_count, parse_size
from fbn_prune.runs import choices
from fbn_prune.runs.budget import ModelSize


def job(model: Path, text: Path, output: Path, *more: str) -> list[str]:
    return arguments(model, text, output, "--width-multiple", "1", *more)


@pytest.mark.parametrize("name", PATHS)
def test_a_ragged_run_ends_in_a_checkpoint_of_the_widths_it_reports(
    name: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny(tmp_path / "model", name)
    # No multiple of the layers.
    extra = ["--layout", "ragged", "--sparsity", "0.45", "--loss-aware", "--sequential"]
    result = run_json(capsys, *job(model, text, tmp_path / "out", *extra))
    written = Checkpoint.open(tmp_path / "out")
    assert written.family.widths(written.config) == result["widths"]
    assert len(set(result["widths"])) > 1
    assert sum(result["widths"]) == round(0.55 * result["neurons_total"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert sum(p.numel() for p in loaded.parameters()) == result["parameters_after"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "trust_remote_code=True" in card
    assert "modeling_ragged.py" in card


@pytest.mark.parametrize("rule", ["networks", "members", "auto"])
def test_every_rule_for_widths_keeps_the_budget_and_tries_cuts_on_disk_in_the_room_it_asks_for(
    rule: str,
    tiny: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, written = [], []
    check, append = choices.check_room, SpilledCuts.append

    def checked(place: Path, needed_bytes: int, what: str) -> None:
        asked.append(needed_bytes)
        check(place, needed_bytes, what)

    def appended(cuts: SpilledCuts, cut: MlpCut) -> None:
        written.append(cut.down_weight.nbytes)
        append(cuts, cut)

    monkeypatch.setattr(choices, "check_room", checked)
    monkeypatch.setattr(SpilledCuts, "append", appended)
    extra = ["--layout", "ragged", "--widths", rule, "--sparsity", "0.4"]
    result = run_json(capsys, *job(tiny, text, tmp_path / "out", *extra))
    assert sum(result["widths"]) == round(0.6 * 72)
    assert sum(asked) == sum(written)
    assert (sum(asked) > 0) == (rule != "members")
    tried = {"networks": ["networks"], "auto": ["networks", "loss"]}
    names = {f"{name}{part}" for name in tried.get(rule, []) for part in ("", " 0.5", " 0.75")}
    trials = result["layout_trials"]
    assert set(trials) == names | ({"uniform"} if names else set())
    if rule == "members":
        assert result["width_rule"] == "members"
    else:
        assert trials[result["width_rule"]] <= trials["uniform"]


def test_a_ragged_recipe_makes_the_same_bytes_again(tiny: Path, text: Path, tmp_path: Path) -> None:
    extra = ["--layout", "ragged", "--widths", "loss", "--loss-aware", "--sparsity", "0.45"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert _exit_code(job(tiny, text, first, *extra)) == 0
    assert _exit_code(["run", str(first / "recipe.yaml"), "--output", str(second)]) == 0
    for name in ("model.safetensors", "config.json", "modeling_ragged.py"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_whole_layers_stay_whole(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = ["--layout", "ragged", "--keep-layers", "0,-1", "--sparsity", "0.2"]
    result = run_json(capsys, *job(tiny, text, tmp_path / "out", *extra))
    assert result["widths"] == [24, 10, 24]
    before, after = Checkpoint.open(tiny), Checkpoint.open(tmp_path / "out")
    for name in before.names:
        if ".layers.0." in name or ".layers.2." in name:
            assert torch.equal(before.tensor(name), after.tensor(name)), name


@pytest.mark.parametrize(("name", "layout"), [("llama-mlp-bias", "ragged"), ("gpt2", "uniform")])
def test_a_target_is_met_and_never_exceeded(
    name: str, layout: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny(tmp_path / "model", name)
    size = ModelSize.of(Checkpoint.open(model))
    step = size.neuron_parameters * (LAYERS if layout == "uniform" else 1)
    target = size.parameters - 20 * size.neuron_parameters + 5
    extra = ["--layout", layout, "--target-params", str(target)]
    result = run_json(capsys, *job(model, text, tmp_path / "by-parameters", *extra))
    assert target - step < result["parameters_after"] <= target
    limit = (model / "model.safetensors").stat().st_size - 20 * size.neuron_bytes + 5
    extra = ["--layout", layout, "--target-size", f"{limit}B"]
    run_json(capsys, *job(model, text, tmp_path / "by-size", *extra))
    written = (tmp_path / "by-size" / "model.safetensors").stat().st_size
    assert limit - 4 * step - 64 < written <= limit


@pytest.mark.parametrize("layout", ["uniform", "ragged"])
def test_the_dry_run_says_the_same_budget_in_every_key(
    layout: str, tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = job(tiny, text, tmp_path / "out", "--layout", layout, "--dry-run")
    shown = run_json(capsys, *base, "--sparsity", "0.5")
    same = shown["same_budget"]
    for flag, value in (
        ("--target-params", str(same["target_params"])),
        ("--target-size", f"{same['target_size']}B"),
        ("--sparsity", str(same["sparsity"])),
    ):
        again = run_json(capsys, *base, flag, value)
        assert again["neurons_kept"] == shown["neurons_kept"] == 36, flag
    assert _exit_code([*base, "--sparsity", "0.5"]) == 0
    table = capsys.readouterr().out
    for key in ("--sparsity", "--target-params", "--target-size"):
        assert key in table


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--target-params", "many"], "target_params = 'many'"),
        (["--target-params", "100"], "attention, embeddings and the narrowest MLPs alone take"),
        (["--target-params", "1B"], "nothing to remove"),
        (["--target-size", "1TB"], "nothing to remove"),
        (["--target-size", "2 gigs"], "target_size = '2 gigs'"),
        (["--target-size", "1KB"], "attention, embeddings"),
        (
            ["--target-size", "1MB", "--sparsity", "0.5"],
            "sparsity and target_size both set the budget",
        ),
        (["--sparsity", "0.5", "--widths", "loss"], "this rule is for ragged layers"),
        (["--sparsity", "0.5", "--keep-layers", "0"], "need layout = ragged"),
        (["--layout", "ragged", "--keep-layers", "0,x"], "write layers as 0,1,-1"),
        (["--layout", "ragged", "--keep-layers", "3"], "there is no layer 3; the model has 3"),
        (["--layout", "ragged", "--keep-layers", "0,1,-1"], "no layer is left to cut"),
        (["--loss-aware", "--criterion", "flap"], "criterion flap does not score output errors"),
        (["--layout", "wavy"], "wavy"),
    ],
)
def test_a_budget_or_layout_that_cannot_be_is_refused_in_one_line(
    extra: list[str], message: str, tiny: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, job(tiny, text, Path("out"), *extra), message)


def test_counts_and_sizes_are_read_as_they_are_spoken() -> None:
    for spelled, count in (("5000000", 5_000_000), ("350M", 350_000_000), ("1.5b", 1_500_000_000)):
        assert parse_count(spelled, "x") == count
    for spelled, size in (("2GB", 2 * 10**9), ("900 MB", 9 * 10**8), ("1.5GiB", 3 * 2**29)):
        assert parse_size(spelled, "x") == size


def test_auto_layout_takes_ragged_only_where_it_gains_enough_and_says_so(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = ["--layout", "auto", "--sparsity", "0.5", "--json"]
    assert _exit_code(job(tiny, text, tmp_path / "out", *extra)) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    trials = result["layout_trials"]
    assert set(trials) == {"uniform", "networks", "networks 0.5", "networks 0.75"}
    worth = result["width_rule"] != "uniform"
    if worth:
        assert result["width_rule"] == min(trials, key=trials.get)
        assert trials[result["width_rule"]] <= 0.9 * trials["uniform"]
    assert "trust_remote_code" in captured.err
    assert ("ragged (" in captured.err) == worth
    assert (tmp_path / "out" / "modeling_ragged.py").exists() == worth


def five_of_each_layer(adapter: ModelAdapter) -> list[MlpCut]:
    generator = torch.Generator().manual_seed(0)
    kept, biased = torch.tensor([1, 4, 5, 9, 20]), adapter.family.accepts_bias(adapter.model.config)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [MlpCut(kept, random(HIDDEN, 5), random(HIDDEN) if biased else None)] * LAYERS


def everything(model: PreTrainedModel) -> dict[str, object]:
    """The parameters themselves, what modules say of their sizes, hooks, and the config."""
    found: dict[str, object] = {"config": model.config.to_dict()}
    for name, module in model.named_modules():
        found |= {f"{name}.{part}": id(each) for part, each in module._parameters.items()}
        found[f"{name} sizes"] = [getattr(module, key, None) for key in SIZES]
        found[f"{name} hooks"] = len(module._forward_pre_hooks), len(module._forward_hooks)
    return found


SIZES = ("in_features", "out_features", "nx", "nf")


@pytest.mark.parametrize("name", [*PATHS, "llama-mlp-bias", "falcon-bias"])
def test_a_model_as_if_cut_is_the_cut_model_and_then_itself_again(name: str) -> None:
    model, other = make_model(name), make_model(name)
    adapter, cut_one = ModelAdapter(model), ModelAdapter(other)
    cuts = five_of_each_layer(adapter)
    for layer, cut in enumerate(cuts):
        cut_one.cut(layer, cut, round_to=torch.float16)
    was, weights = everything(model), copy.deepcopy(model.state_dict())
    before = logits(model)
    with adapter.trying(cuts, round_to=torch.float16):
        for _ in range(2):
            assert torch.equal(logits(model), logits(other))
    assert torch.equal(logits(model), before)
    assert everything(model) == was
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("where", ["in the cut", "in the layer", "between layers"])
def test_a_model_as_if_cut_is_itself_again_wherever_it_breaks_off(name: str, where: str) -> None:
    model = make_model(name)
    adapter = ModelAdapter(model)
    cuts = five_of_each_layer(adapter)
    was, weights = everything(model), copy.deepcopy(model.state_dict())
    before = logits(model)

    def breaks_off(*_: object) -> None:
        raise KeyboardInterrupt

    broken = [*cuts[:1], replace(cuts[1], down_weight=cuts[1].down_weight * 1e300), *cuts[2:]]
    module = {
        "in the cut": None,
        "in the layer": adapter.output_module(1),
        "between layers": adapter.layers[1],
    }[where]
    hook = None if module is None else module.register_forward_hook(breaks_off)
    with (
        pytest.raises(FbnPruneError if hook is None else KeyboardInterrupt),
        adapter.trying(broken if hook is None else cuts),
    ):
        logits(model)
    if hook is not None:
        hook.remove()
    assert everything(model) == was
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert torch.equal(logits(model), before)


def test_a_forward_pass_that_broke_off_does_not_reach_into_the_next() -> None:
    model, other = make_model("llama"), make_model("llama")
    adapter, cut_one = ModelAdapter(model), ModelAdapter(other)
    cuts = five_of_each_layer(adapter)
    for layer, cut in enumerate(cuts):
        cut_one.cut(layer, cut)

    def breaks_off(*_: object) -> None:
        raise RuntimeError("once")

    with adapter.trying(cuts):
        hook = adapter.output_module(1).register_forward_hook(breaks_off)
        with pytest.raises(RuntimeError, match="once"):
            logits(model)
        hook.remove()
        assert torch.equal(logits(model), logits(other))


def test_the_blocks_a_trial_is_measured_on_are_not_those_it_is_shaped_by() -> None:
    blocks = tuple(torch.full((4,), index) for index in range(20))
    rest, apart = TokenBlocks(blocks, CONTEXT, ("x",)).split(8)
    assert [int(b[0]) for b in apart.blocks] == [0, 8, 16]
    assert sorted(int(b[0]) for b in (*rest.blocks, *apart.blocks)) == list(range(20))


def test_a_rule_must_surely_beat_the_even_split() -> None:
    even = torch.linspace(1, 3, 400, dtype=torch.float64)
    noise = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise -= noise.mean()
    assert _surely_less(even - 0.2 + noise, even)  # four standard errors
    assert not _surely_less(even - 0.05 + noise, even)  # one
    assert not _surely_less(even, even)
    assert not _surely_less(even + 0.1, even)


@pytest.mark.parametrize(("tokens", "every"), [(100, 2), (24_576, 3), (131_072, 8), (10**7, 8)])
def test_of_little_text_a_larger_share_is_tried_on(tokens: int, every: int) -> None:
    assert _tried_every(tokens) == every


def test_a_trial_without_the_room_for_it_is_refused(
    tiny: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choices, "trial_bytes", lambda *_: 10**18)
    args = job(tiny, text, tmp_path / "out", "--layout", "auto", "--sparsity", "0.5")
    refused(capsys, args, "the folder of temporary files")
    assert not (tmp_path / "out").exists()
