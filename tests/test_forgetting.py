"""A skill's neurons are told apart and cut; text like its examples is left out of what the rest is fitted on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fbn_prune.api import predict, prune_checkpoint
from fbn_prune.errors import InvalidInput
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.networks.forgetting import (
    activity_ratio,
    alike,
    between,
    candidate_sizes,
    key_neurons,
    largest_within,
    marked,
    selectivity,
    strengths_between,
)
from fbn_prune.pruning import second_order
from fbn_prune.pruning.criteria import CRITERIA, LayerEvidence
from fbn_prune.recipe import build_recipe


def test_networks_that_only_the_rest_engages_do_not_count() -> None:
    selective = selectivity(torch.tensor([4.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 9.0]))
    torch.testing.assert_close(selective, torch.tensor([4.0, 1.0, 1.0]).double().log())
    maps = torch.tensor([[3.0, 0, 0], [0, 3.0, 0], [0, 0, 3.0]])
    scores = key_neurons(maps, selective)
    assert scores.argmax() == 0
    assert scores[1:].tolist() == [0, 0]


def test_a_silent_neuron_has_no_infinite_ratio() -> None:
    ratio = activity_ratio(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 1.0, 1.0]))
    assert ratio.tolist() == pytest.approx([0, 1, 2], abs=1e-4)


def test_text_like_the_examples_is_found_however_much_of_it_there_is() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = 0.3 * torch.randn(70, 6, generator=generator)
    skill = torch.zeros(70, 6)
    skill[:, :3] = 5
    examples = noise[:10] + skill[:10]
    for count in (0, 5, 20, 40):
        generic = noise[10:] + torch.where(torch.arange(60)[:, None] < count, skill[10:], 0)
        found = alike(generic, examples)
        assert found[:count].all()
        assert int(found[count:].sum()) <= 12  # noise alone makes some alike


def test_the_search_stops_at_the_first_size_that_costs_too_much() -> None:
    sizes = candidate_sizes(4608)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == 1152
    costs = [(8, 0.001), (16, 0.01), (32, 0.03), (64, 0.015)]
    assert largest_within(costs, 0.02) == 16
    assert largest_within(costs, 0.0005) == 0
    assert between(16, 32) == [19, 22, 26, 29]
    assert between(16, 17) == []
    assert strengths_between(1e-3, 1e-2, 1) == pytest.approx([10**-2.5])
    worth = marked(torch.tensor([1.0, 5.0, 3.0]), 2)
    assert (worth < 0).tolist() == [False, True, True]


def test_what_is_forgotten_is_silent_and_what_stays_is_refitted() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator).double()
    weight = torch.randn(4, 6, generator=generator).double()
    evidence = LayerEvidence(
        weight=weight, bias=None, gram=x.T @ x / 200, mean=x.mean(0), tokens=200, shortfall=None,
        loss_root=None, damping=1e-2, refit_damping=1e-3, layer=0, input_norms=weight[0],
        can_have_bias=False, seed=0,
        membership=torch.tensor([1.0, -1.0, 2.0, -3.0, 3.0, 1.0]).double(),
    )  # fmt: skip
    cut = CRITERIA["membership-refit"](evidence, 5)
    assert cut.kept.tolist() == [0, 1, 2, 4, 5]
    assert cut.down_weight[:, 1].abs().max() == 0
    live = torch.tensor([0, 2, 4, 5])
    expected = second_order.refit(weight, evidence.gram, live, damping=1e-3)
    torch.testing.assert_close(cut.down_weight[:, [0, 2, 3, 4]], expected, atol=0.05, rtol=0.05)


def test_what_is_erased_does_little_on_the_skill_and_the_same_on_the_rest() -> None:
    generator = torch.Generator().manual_seed(0)
    rest = torch.randn(400, 8, generator=generator).double()
    rest[:, :3] *= 0.01
    skill = torch.randn(400, 8, generator=generator).double()
    weight = torch.randn(4, 8, generator=generator).double()
    grams = [x.T @ x / 400 for x in (rest, torch.cat([skill[:, :3], 0 * skill[:, 3:]], 1))]
    changed = second_order.erased(weight, *grams, strength=10.0, damping=1e-4)
    torch.testing.assert_close(rest @ changed.T, rest @ weight.T, atol=0.2, rtol=0)
    assert (skill[:, :3] @ changed[:, :3].T).abs().max() < 0.1
    weak = second_order.erased(weight, *grams, strength=1e-9, damping=1e-4)
    torch.testing.assert_close(weak, weight, atol=1e-4, rtol=0)


def written(folder: Path, texts: list[str], name: str) -> Path:
    path = folder / name
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.mark.parametrize(
    ("by", "layout"), [("erasing", "uniform"), ("neurons", "uniform"), ("networks", "ragged")]
)
def test_a_run_forgets_within_its_cost(by: str, layout: str, tiny: Path, tmp_path: Path) -> None:
    skill = [f"{i}+{i * 3}={i * 4} {i + 5}-{i}=5" for i in range(40)]
    rest = [
        f"apples and pears and plums, ripe ones of {chr(97 + i % 26) * (1 + i)}" for i in range(80)
    ]
    recipe = build_recipe(
        {"model": str(tiny), "output": tmp_path / "out", "layout": layout, "forget_cost": 0.5}
        | {"forget_by": by}
        | {"calibration": str(written(tmp_path, skill + rest, "text.jsonl")), "context": 32}
        | {"forget": written(tmp_path, skill[:12], "skill.jsonl"), "tokens": 3000}
        | {"networks": 6, "network_tokens": 400, "held_out": 0.2}
    )
    with pytest.raises(InvalidInput, match="no --dry-run"):
        predict(recipe.model_copy(update={"output": None}))
    result = prune_checkpoint(recipe=recipe)
    found = result.to_json()["forgotten"]
    dial = found["strength"] if by == "erasing" else found["neurons"]
    assert dial > 0
    assert dict(map(tuple, found["trials"]))[dial] <= 0.5
    assert found["blocks_left_out"] > 20
    written_model = Checkpoint.open(tmp_path / "out")
    total = sum(written_model.family.widths(written_model.config))
    if layout == "ragged":
        assert total == result.neurons_total - found["neurons"]
    else:
        assert len(set(result.widths)) == 1
    if by == "erasing":
        assert total == result.neurons_total


@pytest.mark.parametrize(
    ("more", "key"),
    [({"sparsity": 0.3}, "sparsity"), ({"recover": True}, "recover"), ({"layout": "auto"}, "layout"),
     ({"criterion": "flap"}, "criterion"), ({"sequential": True}, "sequential")],
)  # fmt: skip
def test_what_does_not_go_with_forgetting_is_refused(more: dict[str, object], key: str) -> None:
    with pytest.raises(InvalidInput, match=key):
        build_recipe({"forget": "skill.jsonl", **more})


def test_a_cost_without_a_skill_is_refused() -> None:
    with pytest.raises(InvalidInput, match="forget_cost"):
        build_recipe({"forget_cost": 0.1})
