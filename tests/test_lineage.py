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
from fbn_prune.networks.lineage import (
    beyond_words,
    linear_cka,
    shared_networks,
    span_overlap,
)
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


def test_spaces_overlap_whatever_their_basis_and_not_by_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(400, 8, generator=generator) for _ in range(2))
    mixed = a @ torch.randn(8, 8, generator=generator)
    assert span_overlap(a, mixed) == pytest.approx(1)
    assert abs(span_overlap(a, b)) < 0.1
    assert span_overlap(a, torch.cat([mixed[:, :4], b[:, :4]], 1)) == pytest.approx(0.5, abs=0.1)


def test_models_that_only_respond_to_the_same_words_share_nothing_beyond_them() -> None:
    generator = torch.Generator().manual_seed(0)
    spellings = ["the", "Of", "cat,", "12", "(x", "longer-word", "=="]
    which = torch.randint(0, len(spellings), (600,), generator=generator)
    words = [(spellings[int(w)], i % 30) for i, w in enumerate(which)]
    of_words = torch.randn(len(spellings), 5, generator=generator)[which] * 5
    place = torch.tensor([place for _, place in words]).add(1).log()[:, None]
    a, b = (of_words + place + torch.randn(600, 5, generator=generator) for _ in range(2))
    assert shared_networks(a, b).score > 0.8
    assert span_overlap(a, b) > 0.8
    left_of_a, left_of_b = beyond_words(a, words), beyond_words(b, words)
    assert abs(shared_networks(left_of_a, left_of_b).score) < 0.1
    assert abs(span_overlap(left_of_a, left_of_b)) < 0.1
    copy_of_a = a + 0.1 * torch.randn(600, 5, generator=generator)
    assert span_overlap(left_of_a, beyond_words(copy_of_a, words)) > 0.9


def test_of_a_word_that_is_there_n_times_one_part_in_n_and_one_of_its_mean_is_left() -> None:
    words = [("same", 0)] * 9 + [("once", 0)]
    courses = torch.tensor([[1.0]] * 9 + [[-9.0]])
    left = beyond_words(courses, words)
    assert left[:, 0].tolist() == pytest.approx([0.1] * 9 + [-4.5])


def test_every_token_of_a_word_counts_for_it_and_white_space_for_none() -> None:
    passages = cut_passages(["one two  three " * 40], 60, 100)
    assert len(passages.spelled()) == passages.words
    assert passages.spelled()[:3] == [("one", 0), ("two", 1), ("three", 2)]
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
    assert found.span > 0.99
    assert found.related
    facts = found.to_json()
    assert len(facts["networks"]) == 6
    assert facts["words"] > 100


def test_a_model_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code(["fingerprint", "builtin", "./nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
