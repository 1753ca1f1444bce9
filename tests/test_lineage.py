"""Networks are matched by what they do in the same words, whatever the shapes and tokenizers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tiny_models import make_model, make_tokenizer

from fbn_prune.api import fingerprint
from fbn_prune.cli.main import _exit_code
from fbn_prune.data.words import by_word, cut_passages, word_blocks
from fbn_prune.errors import InvalidInput
from fbn_prune.networks.lineage import linear_cka, shared_networks
from fbn_prune.recipe import build_recipe


def test_the_same_courses_score_one_in_any_order_sign_and_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(400, 5, generator=generator)
    order = torch.tensor([3, 0, 4, 1, 2])
    b = a[:, order] * torch.tensor([1.0, -2.0, 3.0, -0.1, 5.0])
    found = shared_networks(a, b)
    assert found.score == pytest.approx(1)
    assert order[found.partner].tolist() == [0, 1, 2, 3, 4]
    fewer = shared_networks(a, b[:, :3])
    assert fewer.score == pytest.approx(1)
    assert sorted(fewer.partner.tolist()) == [-1, -1, 0, 1, 2]


def test_unrelated_courses_score_about_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(400, 8, generator=generator) for _ in range(2))
    assert abs(shared_networks(a, b).score) < 0.1


def test_cka_is_one_for_a_rotation_and_small_for_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(300, 6, generator=generator).double() for _ in range(2))
    turned = a @ torch.linalg.qr(torch.randn(6, 6, generator=generator).double())[0] * 3
    assert linear_cka(a @ a.T, turned @ turned.T) == pytest.approx(1)
    assert linear_cka(a @ a.T, b @ b.T) < 0.2


def test_every_token_of_a_word_counts_for_it_and_white_space_for_none() -> None:
    passages = cut_passages(["one two  three " * 40], 60, 100)
    assert 100 <= passages.words < 120
    assert all(len(text) <= 60 for text in passages.texts)
    tokenizer = make_tokenizer()
    found = word_blocks(passages, tokenizer, 64)
    for block, words, text in zip(found.blocks.blocks, found.word_of, passages.texts, strict=True):
        assert len(block) == len(words)
        seen = words[words >= 0].unique()
        assert len(seen) == len(text.split())
        first = tokenizer.decode(block[words == seen[0]]).strip()
        assert first == text.split()[0]
    values = [words[:, None].double() for words in found.word_of]
    means, shown = by_word(values, found.word_of, passages.words)
    assert bool(shown.all())
    assert means.flatten().tolist() == list(range(passages.words))


def test_a_text_of_few_words_is_refused() -> None:
    with pytest.raises(InvalidInput, match="only 3 words"):
        cut_passages(["one two three"], 60, 100)


def test_a_copy_with_other_neurons_is_related_and_another_model_is_not(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fbn_prune.runs.fingerprint.WORDS", 400)
    model, tokenizer = make_model("llama"), make_tokenizer()
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for layer in moved.model.layers:
            order = torch.randperm(layer.mlp.gate_proj.weight.shape[0])
            for part in (layer.mlp.gate_proj, layer.mlp.up_proj):
                part.weight.copy_(part.weight[order].clone())
            layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight[:, order].clone())
            layer.mlp.up_proj.weight.mul_(4)
            layer.mlp.down_proj.weight.div_(4)
    for name, one in (("first", model), ("moved", moved)):
        one.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    recipe = build_recipe(
        {"model": str(tmp_path / "first"), "calibration": str(text), "tokens": 600}
        | {"network_tokens": 400, "networks": 6, "keep_networks": 1, "context": 64}
    )
    found = fingerprint(recipe, str(tmp_path / "moved"))
    assert found.shared.score > 0.99
    assert found.components > 0.99
    assert found.related
    facts = found.to_json()
    assert len(facts["networks"]) == 6
    assert facts["words"] > 100


def test_a_model_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code(["fingerprint", "builtin", "./nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
