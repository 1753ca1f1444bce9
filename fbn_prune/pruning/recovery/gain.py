"""The gain in perplexity from healing a cut model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Recovery:
    """Perplexity on the held-out share before and after healing, and the passes over how many tokens it took.

    `gap_closed` is the share of the cut's rise in perplexity that healing reversed; None if the perplexity did not
    rise. `kept` says whether the healed model is the result: not if healing raised the perplexity, or ended in NaN or
    Inf, when `perplexity_recovered` is None. `curve` is that of :class:`fbn_prune.pruning.recovery.healing.Healed`.
    """

    perplexity_cut: float
    perplexity_recovered: float | None
    gap_closed: float | None
    passes: int
    tokens: int
    kept: bool = True
    curve: list[tuple[int, float]] = field(default_factory=list)

    @classmethod
    def measured(
        cls,
        dense: float,
        cut: float,
        recovered: float | None,
        passes: int,
        tokens: int,
        curve: Sequence[tuple[int, float]] = (),
    ) -> Recovery:
        """Return the gain for the perplexities of the dense, the cut and the recovered model."""
        if recovered is None:
            return cls(cut, None, None, passes, tokens, False, list(curve))
        closed = (cut - recovered) / (cut - dense) if cut > dense else None
        return cls(cut, recovered, closed, passes, tokens, recovered <= cut, list(curve))
