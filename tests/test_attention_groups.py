"""Claims about layers that keep different numbers of attention head groups, down to none, in every architecture."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import arguments, blocks, cut_live, export, random_cuts, refused, run_json
from tiny_models import FAMILY_CONFIGS, HIDDEN, LAYERS, TOKENS, WIDTH, logits, save_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fbn_prune import PruningConfig, prune
from fbn_prune.errors import InvalidInput
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.attention_blocks import leaving_out_attention, require_attention
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.depth import Depth, leaving_out
from fbn_prune.model.families import family_of
from fbn_prune.model.head_groups import head_groups
from fbn_prune.model.heads import HeadCut
from fbn_prune.model.kept_neurons import KEPT_FILE, KeptNeurons
from fbn_prune.model.layerwise import LayerwiseForward
from fbn_prune.model.perplexity import mean_loss
from fbn_prune.model.streaming import StreamedModel
from fbn_prune.model.surgery import MlpCut
from fbn_prune.serving import load as load_bundle
from fbn_prune.serving.tasks import task_of_pruned

WITH_HEADS = [name for name, config in FAMILY_CONFIGS.items() if family_of(config()).attention]
ONE_OF_EACH = ("llama", "phi3", "gemma2")
"""Separate projections; all in one tensor, with numbers of heads in the module; a norm after the attention."""

ALL, SIZE, QUERIES = 2, 4, 2
"""Groups of a layer, channels of a head, query heads of a group."""

UNEQUAL = [[1], [], [0, 1]]
"""The groups that each layer keeps: one, none, both."""

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _modules_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: Any) -> None:
    """Code files are cached by folder name; a test must not meet another one's."""
    folder = tmp_path_factory.mktemp("modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder))


def head_cut(kept: Sequence[int]) -> HeadCut:
    """A cut with output weights that no head had before, as a refit gives them."""
    generator = torch.Generator().manual_seed(len(kept))
    channels = len(kept) * QUERIES * SIZE
    weight = torch.randn(HIDDEN, channels, generator=generator, dtype=torch.float64)
    return HeadCut(torch.tensor(kept, dtype=torch.int64), weight)


def cuts_of(
    source: Checkpoint,
    groups: Sequence[Sequence[int] | None] = UNEQUAL,
    widths: Sequence[int] = (16, 16, 16),
) -> list[MlpCut]:
    """Cuts to these groups, where None leaves a layer's attention as it is."""
    return [
        MlpCut(cut.kept, cut.down_weight, heads=None if kept is None else head_cut(kept))
        for cut, kept in zip(random_cuts(source, widths), groups, strict=True)
    ]


def load(folder: Path, **more: Any) -> PreTrainedModel:
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **more
    )
    assert not any(report.values()), report
    return model.eval()


def streamed(source: Checkpoint) -> StreamedModel:
    return StreamedModel(source, CPU, torch.float32, scratch=source.path)


def layerwise(adapter: ModelAdapter) -> Tensor:
    """Logits of the model that runs layer by layer."""
    forward = LayerwiseForward(adapter, blocks(20).batches(100))
    for _ in range(adapter.num_layers):
        forward.advance()
    return forward.logits(forward.hidden[0])


def generated(model: PreTrainedModel, ids: Tensor = TOKENS[:, :6], **more: Any) -> Tensor:
    """Ten tokens that the model continues with."""
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, **more}
    return model.generate(ids, **options)[:, ids.shape[1] :]


@pytest.mark.parametrize("name", WITH_HEADS)
def test_the_written_model_is_the_live_and_the_streamed_one(name: str, tmp_path: Path) -> None:
    source = Checkpoint.open(save_tiny(tmp_path / "in", name))
    cuts = cuts_of(source)
    out = export(source, cuts, tmp_path / "out")
    live, loaded = cut_live(source, cuts), load(out)
    expected = logits(live)
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5)
    family = source.family
    assert head_groups(family, live.config) == head_groups(family, loaded.config) == [1, 0, 2]
    cut = streamed(source)
    for layer, each in enumerate(cuts):
        cut.cut(layer, each)
    assert torch.equal(layerwise(cut), layerwise(ModelAdapter(live)))
    written = Checkpoint.open(out)
    assert torch.equal(layerwise(streamed(written)), layerwise(ModelAdapter(live)))
    assert torch.equal(logits(written.load_model("cpu", torch.float32)), expected)
    # A layer without attention keeps the norm before it, but nothing of the attention.
    of_layer = [key for key in written.names if ".layers.1." in key]
    assert any("input_layernorm" in key for key in of_layer)
    assert not any("self_attn" in key for key in of_layer)
    assert written.total_parameters == sum(each.numel() for each in live.parameters())
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(loaded))


@pytest.mark.parametrize(
    ("name", "groups"),
    [(name, [[1], [], [0]]) for name in WITH_HEADS]
    + [(name, [[], [1], [0, 1]]) for name in ("llama", "gemma3_text")],
)
def test_text_is_the_same_with_and_without_a_cache(
    name: str, groups: list[list[int]], tmp_path: Path
) -> None:
    source = Checkpoint.open(save_tiny(tmp_path / "in", name))
    model = cut_live(source, cuts_of(source, groups))
    plain = generated(model, use_cache=False)
    assert torch.equal(generated(model, use_cache=True), plain)
    prompts = torch.cat([TOKENS[:, :6], torch.tensor([[257, 257, 257, 5, 6, 7]])])
    mask = (prompts != 257).long()
    both = generated(model, prompts, use_cache=True, attention_mask=mask)
    assert torch.equal(both[:1], plain)
    assert torch.equal(both[1:], generated(model, prompts[1:, 3:], use_cache=False))


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_every_kind_of_cache_and_attention_works(name: str, tmp_path: Path) -> None:
    config = FAMILY_CONFIGS[name]()
    if name == "gemma3_text":
        config.sliding_window = 4
        config.layer_types = ["sliding_attention", "full_attention", "full_attention"]
    source = Checkpoint.open(save_tiny(tmp_path / "in", name, config=config))
    # The first layer of the second kind has no attention: masks are made from the length of its cache.
    model = load(export(source, cuts_of(source), tmp_path / "out"))
    plain = generated(model, use_cache=False)
    assert torch.equal(generated(model, cache_implementation="static", disable_compile=True), plain)
    assert torch.equal(
        generated(model, num_beams=2), generated(model, num_beams=2, use_cache=False)
    )
    if name == "llama":
        assert torch.equal(generated(model, prompt_lookup_num_tokens=2), plain)  # crops the cache
    before = logits(model)
    model.set_attn_implementation("eager")
    assert model.model.layers[0].self_attn.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    model.gradient_checkpointing_enable()
    model.train()
    model(TOKENS, labels=TOKENS).loss.backward()
    unused = [key for key, each in model.named_parameters() if each.grad is None]
    assert unused == ["model.layers.1.input_layernorm.weight"]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_stock_classes_refuse_it_instead_of_making_up_an_attention(
    name: str, tmp_path: Path
) -> None:
    source = Checkpoint.open(save_tiny(tmp_path / "in", name))
    out = export(source, cuts_of(source, [None, [], None], [WIDTH] * LAYERS), tmp_path / "out")
    with pytest.raises(RuntimeError, match="num_key_value_heads"):
        AutoModelForCausalLM.from_pretrained(out)
    again = load(out)
    again.save_pretrained(tmp_path / "again")
    with pytest.raises(RuntimeError, match="num_key_value_heads"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(again))


def test_heads_and_widths_may_differ_together_and_also_with_layers_left_out(tmp_path: Path) -> None:
    source = Checkpoint.open(save_tiny(tmp_path / "in"))
    cuts = cuts_of(source, [[0], [1], []], [24, 8, 16])
    out = export(source, cuts, tmp_path / "out", depth=Depth(LAYERS, frozenset({1})))
    config = json.loads((out / "config.json").read_text())
    assert config["attention_groups"] == [1, 0]
    assert config["num_attention_heads"] == ALL * QUERIES
    adapter = ModelAdapter(source.load_model("cpu", torch.float32))
    LayerwiseForward(adapter, [])  # learns what its layers return
    with leaving_out(adapter, [1]):
        for layer, cut in enumerate(cuts):
            adapter.cut(layer, cut)
        expected = logits(adapter.model)
    Depth(LAYERS, frozenset({1})).apply(adapter.model, adapter.family)
    loaded = load(out)
    assert adapter.model.config.attention_groups == [1, 0]
    assert torch.equal(logits(adapter.model), expected)
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5)
    assert torch.equal(generated(adapter.model), generated(loaded))
    # What differs is left out, so that the rest is a stock model again.
    one = Checkpoint.open(out)
    eight = MlpCut(torch.arange(8), torch.randn(HIDDEN, 8))
    rest = export(one, [eight, eight], tmp_path / "rest", depth=Depth(2, frozenset({1})))
    assert "attention_groups" not in json.loads((rest / "config.json").read_text())
    assert AutoModelForCausalLM.from_pretrained(rest).config.num_key_value_heads == 1


def test_equal_numbers_that_the_architecture_states_give_a_stock_config(tmp_path: Path) -> None:
    config = FAMILY_CONFIGS["llama"]()
    config.num_attention_heads = config.num_key_value_heads = 4
    source = Checkpoint.open(save_tiny(tmp_path / "in", config=config))
    for kept, stock in (([1, 3], True), ([0, 1, 3], False)):  # 3 heads do not divide 16 channels
        heads = HeadCut(torch.tensor(kept), torch.randn(HIDDEN, SIZE * len(kept)))
        cuts = [
            MlpCut(cut.kept, cut.down_weight, heads=heads) for cut in random_cuts(source, [8] * 3)
        ]
        out = export(source, cuts, tmp_path / f"out-{len(kept)}")
        assert (out / "modeling_ragged.py").exists() != stock
        assert ("attention_groups" in json.loads((out / "config.json").read_text())) != stock
        assert torch.equal(logits(load(out)), logits(cut_live(source, cuts)))


@pytest.mark.parametrize("name", ["llama", "phi3", "llama-mlp-bias"])
def test_a_trial_computes_what_the_cut_model_does_and_leaves_no_trace(
    name: str, tmp_path: Path
) -> None:
    source = Checkpoint.open(save_tiny(tmp_path / "in", name))
    cuts = cuts_of(source, widths=[WIDTH, 8, 16])
    expected = layerwise(ModelAdapter(cut_live(source, cuts)))
    for adapter in (ModelAdapter(source.load_model("cpu", torch.float32)), streamed(source)):
        dense = layerwise(adapter)
        modules, state = list(adapter.model.modules()), attributes(adapter)
        with adapter.trying(cuts, with_heads=True):
            assert torch.equal(layerwise(adapter), expected)
        assert (list(adapter.model.modules()), attributes(adapter)) == (modules, state)
        assert torch.equal(layerwise(adapter), dense)
        with adapter.trying(cuts):
            of_mlps = layerwise(adapter)
        whole = [MlpCut(cut.kept, cut.down_weight) for cut in cuts]
        assert torch.equal(of_mlps, layerwise(ModelAdapter(cut_live(source, whole))))
        for layer, cut in enumerate(cuts):
            with adapter.trying(cuts, alone=layer, with_heads=True):
                found = mean_loss(adapter, blocks(20, 30).batches(30))
            assert found != mean_loss(adapter, blocks(20, 30).batches(30)), cut
        assert attributes(adapter) == state


def attributes(adapter: ModelAdapter) -> list[dict[str, Any]]:
    """What the attention modules have besides their weights."""
    return [
        {
            key: value
            for key, value in vars(adapter.attention_module(layer)).items()
            if key[0] != "_"
        }
        for layer in range(adapter.num_layers)
    ]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_attention_left_out_for_a_while_adds_nothing(name: str, tmp_path: Path) -> None:
    source = Checkpoint.open(save_tiny(tmp_path / "in", name))
    whole = [torch.arange(WIDTH), torch.arange(WIDTH), torch.arange(WIDTH)]
    live = ModelAdapter(source.load_model("cpu", torch.float32))
    gone = [
        MlpCut(kept, live.down_weight(layer).clone(), heads=head_cut([]) if layer == 1 else None)
        for layer, kept in enumerate(whole)
    ]
    expected = layerwise(ModelAdapter(cut_live(source, gone)))
    for adapter in (live, streamed(source)):
        before = layerwise(adapter)
        with leaving_out_attention(adapter, [1]):
            with leaving_out_attention(adapter, [1]):
                assert torch.equal(layerwise(adapter), expected)
            assert torch.equal(layerwise(adapter), expected)
        assert torch.equal(layerwise(adapter), before)
    assert not any("forward" in vars(module) for module in live.model.modules())


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ([1, 0], "2 entries, the model has 3 layers"),
        ([1, 0, 3], "integers from 0 to 2"),
        ([1, True, 2], "integers from 0 to 2"),
        ("110", "integers from 0 to 2"),
    ],
)
def test_a_malformed_list_is_refused(stated: object, message: str) -> None:
    fields = {**FAMILY_CONFIGS["llama"]().to_dict(), "attention_groups": stated}
    with pytest.raises(InvalidInput, match=message):
        family_of(fields)


@pytest.mark.parametrize("name", ["gpt2", "opt", "falcon", "olmo2"])
def test_architectures_whose_heads_cannot_be_cut_are_refused(name: str) -> None:
    config = FAMILY_CONFIGS[name]()
    with pytest.raises(InvalidInput, match="attention heads cannot be cut"):
        require_attention(family_of(config), config)


def test_models_with_one_layer_or_unequal_layers_are_refused() -> None:
    config = FAMILY_CONFIGS["llama"]()
    family = family_of(config)
    require_attention(family, config)
    config.num_hidden_layers = 1
    with pytest.raises(InvalidInput, match="a single layer, whose attention must stay"):
        require_attention(family, config)
    config.num_hidden_layers, config.attention_groups = 3, [2, 1, 0]
    with pytest.raises(InvalidInput, match="which are not cut again"):
        require_attention(family, config)


@pytest.fixture(scope="module")
def unequal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with equal widths and unequal heads, to read."""
    folder = tmp_path_factory.mktemp("unequal")
    source = Checkpoint.open(save_tiny(folder / "in"))
    return export(source, cuts_of(source), folder / "out")


@pytest.mark.parametrize("layout", ["uniform", "ragged"])
def test_its_neurons_are_pruned_again(
    layout: str, unequal: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--sparsity", "0.5", "--layout", layout, "--width-multiple", "1"]
    result = run_json(capsys, *arguments(unequal, text, tmp_path / "out", *more, "--recover"))
    assert result["heads_kept"] == result["heads_total"] == QUERIES * 3
    written = Checkpoint.open(tmp_path / "out")
    assert head_groups(written.family, written.config) == [1, 0, 2]
    assert written.total_parameters == result["parameters_after"]
    expected = logits(written.load_model("cpu", torch.float32))
    torch.testing.assert_close(logits(load(tmp_path / "out")), expected, rtol=0, atol=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "trust_remote_code=True" in card
    assert "`attention_groups` in `config.json`" in card


def test_every_command_takes_it(
    unequal: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pruned = ["--sparsity", "0.5", "--recover", "--recover-passes", "1"]
    for name, flags in {
        "run": [*pruned, "--output", str(tmp_path / "pruned")],
        "discover": ["--output", str(tmp_path / "networks")],
        "rank": [],
        "compare": [],
    }.items():
        command = [] if name == "run" else [name]
        assert run_json(capsys, *command, *arguments(unequal, text, None, *flags)), name
    trim = ["--model", unequal, "--texts", text, "--output", tmp_path / "trimmed"]
    run_json(capsys, "trim-vocabulary", *trim)
    trimmed = Checkpoint.open(tmp_path / "trimmed")
    assert head_groups(trimmed.family, trimmed.config) == [1, 0, 2]
    assert torch.isfinite(load(trimmed.path)(torch.arange(5)[None]).logits).all()
    run_json(capsys, *arguments(unequal, text, tmp_path / "task", "--sparsity", "0.5"))
    bundle = ["--model", unequal, f"again={tmp_path / 'task'}", "--output", tmp_path / "bundle"]
    run_json(capsys, "bundle", *bundle)
    served = load_bundle(tmp_path / "bundle")
    torch.testing.assert_close(logits(served.model), logits(load(unequal)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["--sparsity", "0.5", "--head-sparsity", "0.5"], "which are not cut again"),
        (
            ["--sparsity", "0.5", "--layout", "ragged", "--structures", "neurons,heads"],
            "which are not cut again",
        ),
    ],
)
def test_its_heads_are_not_cut_again(
    command: list[str],
    message: str,
    unequal: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    refused(capsys, arguments(unequal, text, tmp_path / "out", *command), message)


def test_it_does_not_become_a_task(unequal: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(save_tiny(tmp_path / "in"))
    cut = Checkpoint.open(shutil.copytree(unequal, tmp_path / "cut"))
    kept = KeptNeurons((WIDTH,) * LAYERS, tuple(torch.arange(16) for _ in range(LAYERS)))
    kept.save(cut.path / KEPT_FILE)
    with pytest.raises(InvalidInput, match="attention heads were cut"):
        task_of_pruned(source, cut, "full", 8)


def test_a_live_model_is_pruned_with_them_and_its_config_tells_the_truth(
    unequal: Path, text: Path
) -> None:
    live = load(unequal)
    tokenizer = AutoTokenizer.from_pretrained(unequal)
    settings = {"sparsity": 0.5, "tokens": 600, "context": 48, "width_multiple": 4}
    result = prune(live, tokenizer, str(text), PruningConfig(**settings))
    assert result.warning is not None
    assert "the layers differ in attention heads" in result.warning
    assert live.config.attention_groups == [1, 0, 2]
    assert result.parameters_after == sum(each.numel() for each in live.parameters())
    assert ModelAdapter(live).head_groups == [1, 0, 2]
