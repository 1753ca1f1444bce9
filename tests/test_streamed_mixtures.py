"""Mixtures of experts read layer by layer, resumed, cut by networks and for a task: as the run in memory cuts them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import MIXTURES, mixture_config
from safetensors.torch import load_file
from small_runs import blocks
from test_found_families import config as tiny_text_config
from tiny_models import logits, make_model, make_tokenizer, save_tiny
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeForConditionalGeneration

from fbn_prune import api
from fbn_prune.errors import InvalidInput
from fbn_prune.model.layerwise import LayerwiseForward
from fbn_prune.model.mixture_adapter import MixtureAdapter
from fbn_prune.model.mixture_checkpoint import open_mixture
from fbn_prune.model.opening import live_adapter, streamed_adapter
from fbn_prune.model.streamed_mixture import StreamedMixture
from fbn_prune.model.tiny_copy import tiny_model
from fbn_prune.recipe import PruningConfig, build_recipe
from fbn_prune.runs import memory
from fbn_prune.runs.memory import possible_plans
from fbn_prune.store import Store

CPU = torch.device("cpu")
TEXT = "".join(
    f"{number} apples and {number * 3} pears, {number % 7} plums\n" for number in range(300)
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


def opened(folder: Path, **options: bool) -> tuple[MixtureAdapter, StreamedMixture]:
    """The same checkpoint in memory and streamed."""
    checkpoint = open_mixture(folder)
    whole = live_adapter(checkpoint.load_model(CPU, torch.float32), checkpoint.family)
    settings = {"spill_hidden": False, **options}
    streamed = streamed_adapter(checkpoint, CPU, torch.float32, scratch=folder, **settings)
    assert isinstance(whole, MixtureAdapter)
    assert isinstance(streamed, StreamedMixture)
    return whole, streamed


def prune(folder: Path, text: Path, output: Path, **settings: Any) -> Any:
    common = {"calibration": str(text), "tokens": 800, "context": 32, "device": "cpu"}
    values = {"model": str(folder), "output": output, **common, **settings}
    return api.prune_checkpoint(recipe=build_recipe(values))


def frugal(*args: Any) -> memory.MemoryPlan:
    plans = [p for p in possible_plans(*args) if p.streamed and p.batch_tokens == 4096]
    assert not plans[-1].keep_hidden
    return plans[-1]


def files(output: Path) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in output.iterdir()}
    del found["recipe.yaml"]  # it names the output
    return found


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("form", ["apiece", "fused"])
def test_a_streamed_mixture_has_the_logits_of_the_whole_one(
    name: str, form: str, tmp_path: Path
) -> None:
    model = make_model("", config=mixture_config(name))
    model.save_pretrained(tmp_path, save_original_format=form == "apiece")
    make_tokenizer().save_pretrained(tmp_path)
    whole, streamed = opened(tmp_path)
    assert torch.equal(logits(whole.model), logits(streamed.model))
    streamed.release()
    for layer in streamed.layers:
        assert all(parameter.is_meta for parameter in layer.parameters())


def test_one_layer_is_in_memory_at_a_time(tmp_path: Path) -> None:
    _, adapter = opened(save_tiny(tmp_path / "model", config=mixture_config("glm4_moe")))
    forward = LayerwiseForward(adapter, blocks(20, 48, 48, 33).batches(100))
    present = []
    for _ in range(adapter.num_layers):
        forward.advance()
        present.append([not next(layer.parameters()).is_meta for layer in adapter.layers])
    assert torch.equal(torch.tensor(present), torch.eye(2, dtype=torch.bool))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3", "lfm2_moe"])
@pytest.mark.parametrize("sequential", [False, True])
def test_streaming_writes_the_bytes_of_the_run_in_memory(
    name: str, sequential: bool, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path / "model", config=mixture_config(name))
    settings = {"sparsity": 0.5, "experts": 4, "sequential": sequential}
    whole = prune(folder, text, tmp_path / "whole", **settings)
    monkeypatch.setattr("fbn_prune.runs.mixture_setup.plan_memory", frugal)
    streamed = prune(folder, text, tmp_path / "streamed", **settings)
    for name in ("model.safetensors", "kept_experts.safetensors", "config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (
            tmp_path / "streamed" / name
        ).read_bytes()
    assert streamed.perplexity_after == pytest.approx(whole.perplexity_after, rel=1e-6)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("writes", [1, 2, 3, 4, 5])
def test_a_killed_run_goes_on_and_writes_the_same(
    sequential: bool, writes: int, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path / "model", config=mixture_config("qwen3_moe"))
    settings = {"sparsity": 0.5, "sequential": sequential}
    prune(folder, text, tmp_path / "whole", **settings)
    kept: list[str] = []
    write = Store.write

    def killed_at(most: int) -> Callable[..., None]:
        def count(self: Store, name: str, *others: Any, **more: Any) -> None:
            write(self, name, *others, **more)
            kept.append(name)
            if len(kept) == most:
                raise Killed

        return count

    monkeypatch.setattr(Store, "write", killed_at(writes))
    with pytest.raises(Killed):
        prune(folder, text, tmp_path / "again", **settings)
    before = list(kept)
    monkeypatch.setattr(Store, "write", killed_at(1000))
    prune(folder, text, tmp_path / "again", **settings)
    assert not set(before) & set(kept[writes:]), "what was finished is not computed again"
    assert files(tmp_path / "whole") == files(tmp_path / "again")


def test_the_memory_budget_is_planned_and_refused_below_the_least(
    text: Path, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "model", config=mixture_config("qwen3_moe"))
    with pytest.raises(InvalidInput, match="this run needs at least"):
        prune(folder, text, tmp_path / "out", sparsity=0.5, memory_budget="100MB")
    plan = api.predict(
        build_recipe({"model": str(folder), "calibration": str(text), "tokens": 800, "experts": 3})
    )
    assert plan.peak_memory_bytes > 500e6
    result = prune(folder, text, tmp_path / "out", experts=3)
    assert (plan.parameters_after, plan.bytes_after, plan.neurons_kept) == (
        result.parameters_after,
        result.bytes_after,
        result.neurons_kept,
    )


def test_networks_say_how_much_of_a_mixture_stays(text: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", config=mixture_config("qwen3_moe"))
    small = {"networks": 12, "network_tokens": 400}
    widths = [
        prune(folder, text, tmp_path / f"out-{count}", keep_networks=count, **small).widths[0]
        for count in (1, 12)
    ]
    assert widths == [8, 8]  # the only width below 16 that the kernels take
    report = (tmp_path / "out-12" / "report.html").read_text(encoding="utf-8")
    assert "Each layer with experts keeps 6 of 6, and each of these 8 of 16 neurons." in report
    assert (tmp_path / "out-12" / "networks.safetensors").exists()


def test_a_task_weights_the_tokens_of_the_experts(text: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", config=mixture_config("qwen3_moe"))
    task = tmp_path / "task.jsonl"
    lines = [json.dumps({"text": f"{i} pears, {i} apples. " * 3}) for i in range(4)]
    task.write_text("\n".join(lines) + "\n", encoding="utf-8")
    small = {"networks": 6, "network_tokens": 400, "sparsity": 0.5}
    plain = prune(folder, text, tmp_path / "plain", **small)
    result = prune(folder, text, tmp_path / "out", task=str(task), **small)
    assert result.task is not None
    assert result.task["examples"] == 4
    assert result.calibration_fingerprint != plain.calibration_fingerprint
    weights = [load_file(tmp_path / n / "model.safetensors") for n in ("plain", "out")]
    assert any(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.moe_intermediate_size == 8


def test_the_report_lists_the_experts_of_each_layer(text: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", config=mixture_config("glm4_moe"))
    prune(folder, text, tmp_path / "out", experts=4, expert_criterion="frequency")
    report = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "keeps 4 of 6" in report
    kept = load_file(tmp_path / "out" / "kept_experts.safetensors")["layers.2.experts"].tolist()
    assert f"<tr><td>2</td><td>4</td><td>{', '.join(map(str, kept))}</td></tr>" in report
    api.write_report(tmp_path / "out", tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == report


def test_networks_of_a_live_mixture_are_found_and_masked() -> None:
    model, tokenizer = make_model("", config=mixture_config("mixtral")), make_tokenizer()
    settings = PruningConfig(
        networks=6, keep_networks=1, network_tokens=400, tokens=600, context=32
    )
    networks = api.discover(model, tokenizer, TEXT.splitlines(), settings)
    assert list(networks.widths) == [6 * 16] * 2
    before = logits(model)
    with api.mask_networks(model, networks, [0]):
        assert not torch.allclose(logits(model), before)
    assert torch.equal(logits(model), before)


def test_what_is_around_a_mixture_in_a_multimodal_model_is_written_as_it_was(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(tiny_text_config("qwen3_5_moe", 4))
    model.generation_config = GenerationConfig(bos_token_id=256, eos_token_id=257, pad_token_id=257)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    settings = {"experts": 2, "allow_untrained": True}
    prune(folder, text, tmp_path / "whole", **settings)
    monkeypatch.setattr("fbn_prune.runs.mixture_setup.plan_memory", frugal)
    prune(folder, text, tmp_path / "streamed", **settings)
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "whole" / "model.safetensors")
    assert any("visual" in name for name in before)
    for name, tensor in before.items():
        if "mlp.experts" not in name and "mlp.gate." not in name:
            assert torch.equal(after[name], tensor), name
    streamed = load_file(tmp_path / "streamed" / "model.safetensors")
    for name, tensor in after.items():
        torch.testing.assert_close(streamed[name], tensor, rtol=1e-4, atol=1e-4)
    loaded = Qwen3_5MoeForConditionalGeneration.from_pretrained(tmp_path / "whole").eval()
    new = loaded.generate(torch.tensor([[72, 105]]), max_new_tokens=4, do_sample=False)
    assert new.shape[1] > 2
