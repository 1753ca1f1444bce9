"""What healing a cut model brought."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recovery:
    """Perplexity on the held-out share before and after healing, and what it took.

    `gap_closed` is the share of the perplexity that the cut had cost and that came back; None where it had cost none.
    """

    perplexity_cut: float
    perplexity_recovered: float
    gap_closed: float | None
    passes: int
    tokens: int

    @classmethod
    def measured(
        cls, dense: float, cut: float, recovered: float, passes: int, tokens: int
    ) -> Recovery:
        closed = (cut - recovered) / (cut - dense) if cut > dense else None
        return cls(cut, recovered, closed, passes, tokens)
