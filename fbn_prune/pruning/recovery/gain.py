"""The gain in perplexity from healing a cut model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recovery:
    """Perplexity on the held-out share before and after healing, and the passes over how many tokens it took.

    `gap_closed` is the share of the cut's rise in perplexity that healing reversed; None if the perplexity did not
    rise. `kept` says whether the healed model is the result: not if healing raised the perplexity.
    """

    perplexity_cut: float
    perplexity_recovered: float
    gap_closed: float | None
    passes: int
    tokens: int
    kept: bool = True

    @classmethod
    def measured(
        cls, dense: float, cut: float, recovered: float, passes: int, tokens: int
    ) -> Recovery:
        """Return the gain for the perplexities of the dense, the cut and the recovered model."""
        closed = (cut - recovered) / (cut - dense) if cut > dense else None
        return cls(cut, recovered, closed, passes, tokens, recovered <= cut)
