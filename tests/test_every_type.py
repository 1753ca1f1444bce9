"""Every causal model type of transformers passes the identities on a tiny copy, or is refused with a reason."""

from __future__ import annotations

import pytest
from model_types import PAGE, TYPES, Outcome, outcome
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fbn_prune.model.families import FAMILIES

LEAST = 90
"""Types that pass at the least."""


def row_of(model_type: str) -> str:
    """The row that the page has for a type."""
    rows = PAGE.read_text(encoding="utf-8").splitlines()
    (row,) = [row for row in rows if row.startswith(f"| {model_type} |")]
    return row


def test_the_page_names_every_type_and_enough_of_them_pass() -> None:
    rows = [row_of(model_type) for model_type in TYPES]
    assert set(TYPES) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert sum(row.endswith("| passes |") for row in rows) >= LEAST
    assert all(row.count("|") == 5 and not row.endswith("|  |") for row in rows)


@pytest.mark.parametrize("model_type", TYPES)
def test_a_type_passes_the_identities_or_is_refused_as_the_page_says(model_type: str) -> None:
    found = outcome(model_type)
    assert found.row == row_of(model_type), "run eval/robustness/model_types.py --write"
    _agrees_with_its_entry(found)


def _agrees_with_its_entry(found: Outcome) -> None:
    """Where an entry declares the type, structure finds the same."""
    for family in FAMILIES:
        if found.model_type not in family.model_types:
            continue
        assert found.reason is None
        assert found.family is not None
        for fact in ("layers", "inputs", "output", "width_key"):
            assert getattr(found.family, fact) == getattr(family, fact), fact
