"""Claims about recipes: one description, two spellings, nothing unknown."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fbn_prune.errors import InvalidInput
from fbn_prune.recipe import Recipe, build_recipe, load_recipe


def test_a_resolved_recipe_reads_back_as_itself(tmp_path: Path) -> None:
    recipe = build_recipe({"keep-networks": 7, "calibration": ["a.txt", "b.txt"], "output": "x"})
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    assert load_recipe(path) == recipe


def test_flags_win_over_the_file_and_dashes_are_underscores(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("keep-networks: 5\nseed: 3\n")
    recipe = load_recipe(path, {"seed": 9})
    assert (recipe.keep_networks, recipe.seed) == (5, 9)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"keep_network": 5}, "unknown key 'keep_network'; did you mean 'keep_networks'"),
        ({"zzz": 5}, "unknown key 'zzz'; known: tokens"),
        ({"keep_networks": 0}, "at least one network"),
        ({"keep_networks": -3}, "at least one network"),
        ({"keep_networks": 65}, "only 64 networks"),
        ({"sparsity": 0.0}, "between 0 and 1"),
        ({"sparsity": 1.0}, "between 0 and 1"),
        ({"sparsity": -0.5}, "between 0 and 1"),
        ({"sparsity": float("nan")}, "should be a finite number"),
        ({"networks": 100, "network_tokens": 100}, "allow at most"),
        ({"criterion": "luck"}, "criterion = luck"),
        ({"criterion": "networks"}, "this criterion is now called second-order"),
        ({"task": "t.jsonl", "task_networks": 65}, "task_networks = 65: only 64 networks"),
        ({"task_networks": 5}, "no task to match"),
        ({"tokens": "many"}, "tokens = 'many'"),
        ({"calibration": []}, "calibration is empty"),
    ],
)
def test_a_bad_value_is_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        build_recipe(values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_size_dial_and_the_match_to_a_task_are_two_settings() -> None:
    task = {"task": "examples.jsonl", "sparsity": 0.5}
    assert build_recipe(task).task_networks_or_default == 10
    assert build_recipe(task | {"keep_networks": 4}).task_networks_or_default == 4
    both = build_recipe(task | {"keep_networks": 4, "task_networks": 7})
    assert (both.kept_networks_or_default, both.task_networks_or_default) == (4, 7)


ON_MEMBERS = {"layout": "ragged", "widths": "members"}


@pytest.mark.parametrize(
    ("values", "needed", "dial_counts"),
    [
        ({}, False, False),
        ({"report_networks": True}, True, False),
        ({"criterion": "wanda"}, False, False),
        ({"criterion": "membership"}, True, True),
        ({"layout": "ragged"}, True, False),
        ({"layout": "ragged", "widths": "loss"}, False, False),
        (ON_MEMBERS, True, True),
        ({"task": "examples.jsonl"}, True, True),
        ({"task": "examples.jsonl", "task_networks": 5}, True, False),
    ],
)
def test_a_recipe_says_which_of_its_keys_cannot_change_a_stated_size(
    values: dict[str, object], needed: bool, dial_counts: bool
) -> None:
    recipe = build_recipe({"sparsity": 0.5, "keep_networks": 3, **values})
    notes = "\n".join(recipe.notes)
    assert recipe.needs_networks == needed
    assert ("no networks are discovered" in notes) == (not needed)
    assert ("keep_networks = 3 does not change the model" in notes) == (not dial_counts)
    assert build_recipe({"keep_networks": 3}).notes == []


@pytest.mark.parametrize(
    "text", ["- a list", "a: [unclosed", "just words", "", "? !!python/object x", "?", "1: 2"]
)
def test_what_is_no_recipe_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(InvalidInput) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


@given(content=st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_no_bytes_do_more_than_be_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_bytes(content)
    refusal = ""
    try:
        assert isinstance(load_recipe(path), Recipe)
    except InvalidInput as error:
        refusal = str(error)
    assert "\n" not in refusal
