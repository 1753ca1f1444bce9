"""The figure of the table of removed skills is read off the curve where the rest first costs too much."""

from __future__ import annotations

import pytest
from forget_table import at_cost


@pytest.mark.parametrize(
    ("curve", "figure"),
    [
        ([[1, 0.02, 1.0], [2, 0.08, 4.0]], 2.5),
        ([[1, 0.1, 1.0]], 0.5),
        # The rest of the second point is better than that of the first, by chance: the line starts there.
        ([[1, 0.04, 1.0], [2, -0.05, 3.0], [3, 0.15, 5.0]], 4.0),
        ([[1, 0.01, 1.0], [2, 0.02, 2.0]], 2.0),
    ],
)
def test_the_skills_rise_is_interpolated_at_the_first_crossing(
    curve: list[list[float]], figure: float
) -> None:
    assert at_cost(curve, 0.05) == pytest.approx(figure)
