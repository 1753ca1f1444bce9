"""The Python API: a live model pruned in place, to the bits that the command line writes, and still a model."""

from __future__ import annotations

import doctest
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from sklearn.base import clone
from tiny_models import logits, make_model, make_tokenizer, save_tiny
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import fbn_prune
from fbn_prune import (
    FunctionalNetworkICA,
    FunctionalNetworks,
    InvalidInput,
    PruningConfig,
    amplify_networks,
    discover,
    mask_networks,
    prune,
    prune_checkpoint,
    register_criterion,
    retain_networks,
)
from fbn_prune.model.surgery import MlpCut
from fbn_prune.pruning import criteria
from fbn_prune.pruning.criteria import LayerEvidence

SMALL = {"tokens": 600, "networks": 4, "network_tokens": 128, "context": 32, "width_multiple": 4}
TEXTS = [f"{i} geese flew over {i % 7} hills, and {i * i} came back. " * 3 for i in range(60)]
IDS = torch.arange(24)[None]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in TEXTS))
    return file


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {"keep_networks": 2}) for name in ("llama", "gpt2")),
        *((name, {"sparsity": 0.5, "sequential": True}) for name in ("phi3", "qwen2")),
    ],
)
def test_a_live_model_gets_the_bits_that_the_command_line_writes(
    name: str, settings: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "model", name)
    config = PruningConfig(**SMALL, **settings)
    written = prune_checkpoint(folder, tmp_path / "out", str(text), config)
    model = AutoModelForCausalLM.from_pretrained(folder)
    result = prune(model, make_tokenizer(), TEXTS, config)
    assert result.model is model
    assert result.to_json()["widths"] == written.widths
    assert result.perplexity_after == written.perplexity_after
    assert result.parameters_after == written.parameters_after < result.parameters_before
    assert written.model is None
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(model.state_dict(), reloaded.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_a_pruned_live_model_trains_generates_saves_and_reloads(name: str, tmp_path: Path) -> None:
    model = make_model(name).train()
    prune(model, make_tokenizer(), TEXTS, PruningConfig(**SMALL, sparsity=0.5))
    assert model.training
    model(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval()
    assert model.generate(IDS, max_new_tokens=2, do_sample=False).shape == (1, IDS.shape[1] + 2)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_a_live_model_of_different_widths_says_that_it_cannot_be_saved() -> None:
    config = PruningConfig(**SMALL, sparsity=0.5, layout="ragged", keep_layers="0")
    result = prune(make_model("llama"), make_tokenizer(), TEXTS, config)
    assert len(set(result.widths)) > 1
    assert "only prune_checkpoint writes a folder that loads" in str(result.warning)


def test_strings_a_dataset_and_their_token_ids_calibrate_alike() -> None:
    tokenizer = make_tokenizer()
    config = PruningConfig(**SMALL, sparsity=0.5)
    rows = [torch.tensor(tokenizer(line)["input_ids"]) for line in TEXTS]
    loader: DataLoader[Any] = DataLoader(rows, batch_size=1)  # type: ignore[arg-type]
    padded = [
        {"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in rows
    ]
    table = datasets.Dataset.from_dict({"text": TEXTS})
    found = [
        prune(make_model("llama"), tokenizer, dataset, config)
        for dataset in (TEXTS, table, table.to_iterable_dataset(), loader, padded)
    ]
    assert len({result.calibration_fingerprint for result in found[:3]}) == 1
    assert len({result.calibration_fingerprint for result in found[3:]}) == 1
    assert all(result.perplexity_after > 0 for result in found)


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ([], "empty list"),
        ([torch.rand(2, 8)], "not int64"),
        ([{"ids": 1}], "no input_ids"),
        (3, "a int"),
        (datasets.Dataset.from_dict({"body": ["a"]}), "no column 'text' (found: body)"),
        ("no/such/file.txt", "does not exist"),
    ],
)
def test_data_that_cannot_be_used_is_refused_before_the_model_is_touched(
    dataset: Any, words: str
) -> None:
    model = make_model("llama")
    before = logits(model)
    with pytest.raises(InvalidInput) as refused:
        prune(model, make_tokenizer(), dataset, PruningConfig(**SMALL, sparsity=0.5))
    assert words in str(refused.value)
    assert torch.equal(logits(model), before)


def test_a_wrapped_or_quantized_live_model_is_refused_and_modes_come_back() -> None:
    config = PruningConfig(**SMALL, sparsity=0.5)
    model = make_model("llama")
    model.model.layers[1].train()
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        model.model.layers[0].mlp.up_proj.weight.to(torch.int8), requires_grad=False
    )
    with pytest.raises(InvalidInput, match=r"up_proj.weight is stored as torch.int8"):
        prune(model, make_tokenizer(), TEXTS, config)
    adapted = get_peft_model(make_model("llama"), LoraConfig(target_modules=["up_proj"]))
    with pytest.raises(InvalidInput, match=r"no tensor model.layers.0.mlp.gate_proj.weight"):
        prune(adapted, make_tokenizer(), TEXTS, config)  # type: ignore[arg-type]
    model = make_model("llama")
    model.model.layers[1].train()
    prune(model, make_tokenizer(), TEXTS, config)
    assert model.model.layers[1].training
    assert not model.training


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sparsty": 0.5}, "did you mean 'sparsity'?"),
        ({"sparsity": 1.5}, "sparsity = 1.5"),
        ({"criterion": "best"}, "criterion = best: choose from"),
    ],
)
def test_a_setting_that_cannot_be_used_is_refused_in_one_line(
    settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidInput) as refused:
        PruningConfig(**settings)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.fixture(scope="module")
def found() -> FunctionalNetworks:
    return discover(
        make_model("llama"), make_tokenizer(), TEXTS, PruningConfig(**SMALL, keep_networks=1)
    )


def test_networks_are_silenced_kept_and_amplified_only_inside_the_context(
    found: FunctionalNetworks,
) -> None:
    model = make_model("llama")
    before = logits(model)
    everything = range(len(found.maps))
    with mask_networks(model, found, [0], z=0.5):
        assert not torch.allclose(logits(model), before)
    with retain_networks(model, found, everything, z=0.0):
        assert torch.equal(logits(model), before)
    with amplify_networks(model, found, everything, factor=1.0):
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)


def test_the_estimator_finds_saves_loads_and_transforms(
    found: FunctionalNetworks, tmp_path: Path
) -> None:
    model, tokenizer = make_model("llama"), make_tokenizer()
    estimator = clone(FunctionalNetworkICA(4, network_tokens=128))
    estimator.fit(model, tokenizer, TEXTS)
    assert estimator.components_.shape == (4, sum(found.widths))
    assert estimator.mixing_.shape == (sum(found.widths), 4)
    assert 0 < estimator.explained_variance_ratio_.sum() < 1
    assert estimator.n_iter_ > 0
    courses = estimator.transform(["the same text twice ", "the same text twice "])
    half = len(courses) // 2
    assert courses.shape[1] == 4
    assert courses[:half] == pytest.approx(courses[half:], abs=1e-6)
    estimator.save(tmp_path / "networks.safetensors")
    loaded = FunctionalNetworkICA.load(tmp_path / "networks.safetensors")
    with pytest.raises(InvalidInput, match="give transform a model"):
        loaded.transform(["text"])
    again = loaded.transform(["the same text twice "], model, tokenizer)
    assert again == pytest.approx(courses[:half], abs=1e-6)


@pytest.fixture
def registry() -> Iterator[None]:
    before = dict(criteria.CRITERIA)
    yield
    criteria.CRITERIA.clear()
    criteria.CRITERIA.update(before)


@pytest.mark.usefixtures("registry")
def test_a_criterion_of_ones_own_prunes(tiny: Path, text: Path, tmp_path: Path) -> None:
    @register_criterion("last")
    def last(evidence: LayerEvidence, width: int) -> MlpCut:
        neurons = evidence.weight.shape[1]
        return MlpCut(torch.arange(neurons - width, neurons), evidence.weight[:, -width:])

    model = make_model("llama")
    gate = model.model.layers[0].mlp.gate_proj.weight.detach().clone()
    prune(model, make_tokenizer(), TEXTS, PruningConfig(**SMALL, sparsity=0.5, criterion="last"))
    assert torch.equal(model.model.layers[0].mlp.gate_proj.weight, gate[-12:])
    config = PruningConfig(**SMALL, sparsity=0.5, criterion="last")
    prune_checkpoint(tiny, tmp_path / "out", str(text), config)
    assert "the criterion last" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(InvalidInput, match="registered already"):
        register_criterion("last")(last)


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, fbn_prune; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there_and_documented() -> None:
    for name in fbn_prune.__all__:
        assert getattr(fbn_prune, name).__doc__, name
    assert set(fbn_prune.__all__) <= set(dir(fbn_prune))
    with pytest.raises(AttributeError):
        _ = fbn_prune.nothing  # type: ignore[attr-defined]


def test_the_examples_in_the_docstrings_run() -> None:
    from fbn_prune import api
    from fbn_prune.networks import estimator as of_arrays
    from fbn_prune.runs import estimator as of_models
    from fbn_prune.runs import live

    for module in (api, live, of_arrays, of_models):
        outcome = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
        assert outcome.attempted > 3
        assert outcome.failed == 0
