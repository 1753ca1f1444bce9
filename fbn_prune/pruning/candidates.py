"""Widths of all layers within a budget, from what each width of each layer costs; pure numbers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from fbn_prune.errors import InvalidInput
from fbn_prune.pruning.costs import Costs
from fbn_prune.pruning.layout import LayoutRequest, even_layout
from fbn_prune.pruning.solver import cheapest


@dataclass(frozen=True)
class EqualWidths:
    """A model with one width for all layers that stay, and the sum of its costs."""

    name: str
    widths: list[int]
    cost: float


class Candidates:
    """Widths of all layers that fit the budget of a request; a layer of width 0 is left out.

    Parameters
    ----------
    grid
        For each layer the widths that can be chosen, ascending.
    costs
        For each layer.

    Raises
    ------
    InvalidInput
        Even the smallest model exceeds the budget.
    """

    def __init__(
        self, request: LayoutRequest, grid: Sequence[Sequence[int]], costs: Sequence[Costs]
    ) -> None:
        self._request, self._grid, self._costs = request, grid, costs
        self._even = even_layout(request)
        # Without layers to leave out, all candidates are as large as the even widths.
        self._budget = sum(self._even) if not request.rest else request.budget + sum(request.rest)

    def even(self) -> list[int] | None:
        """Return the even widths; None if they exceed the budget."""
        if not self._request.narrows:
            return None
        fits = sum(self._even) + sum(self._request.rest) <= self._budget
        return self._even if fits else None

    def halfway(self, widths: Sequence[int]) -> list[int]:
        """Return the widths of the grid about halfway between these and the even ones; left-out layers stay so."""
        levels: list[int] = []
        for grid, width, even in zip(self._grid, widths, self._even, strict=True):
            goal = (width + even) / 2
            levels.append(min(range(len(grid)), key=lambda level: abs(grid[level] - goal)))
        rest = self._request.rest or [0] * len(widths)
        here = [layer for layer, width in enumerate(widths) if width]
        room = self._budget - sum(rest[layer] for layer in here)
        while sum(self._grid[layer][levels[layer]] for layer in here) > room:
            wide = [layer for layer in here if levels[layer] > 0]
            if not wide:
                break
            cheapest_step = min(wide, key=lambda layer: self._step(layer, levels[layer]))
            levels[cheapest_step] -= 1
        return [
            self._grid[layer][levels[layer]] if width else 0 for layer, width in enumerate(widths)
        ]

    def _step(self, layer: int, level: int) -> float:
        """What a layer's next narrower width costs more, for each neuron that it saves."""
        costs, grid = self._costs[layer].of_widths, self._grid[layer]
        return (costs[level - 1] - costs[level]) / (grid[level] - grid[level - 1])

    def summed(self, widths: Sequence[int]) -> float:
        """Return the sum of the costs of these widths."""
        return sum(
            self._cost(layer, width) if width else self._costs[layer].left_out
            for layer, width in enumerate(widths)
        )

    def share(self, widths: Sequence[int]) -> float:
        """Return the share of the whole size that these widths keep."""
        rest = self._request.rest or [0] * len(widths)
        kept = sum(width + rest[layer] for layer, width in enumerate(widths) if width)
        return kept / (sum(self._request.full) + sum(rest))

    def curve(self, shares: Sequence[float]) -> list[tuple[float, float]]:
        """Return the sum of costs of the best model for each of these shares of the whole size that can be reached."""
        full = sum(self._request.full) + sum(self._request.rest)
        found: list[tuple[float, float]] = []
        for share in shares:
            with suppress(InvalidInput):
                if self._request.layout == "uniform":
                    models = self.with_fewer_layers(round(share * full))
                    found.append((share, min(model.cost for model in models)))
                else:
                    widths = self.by_costs([1.0], round(share * full))
                    found.append((share, self.summed(widths)))
        return found

    def by_costs(self, scales: Sequence[float], budget: int | None = None) -> list[int]:
        """Return the cheapest widths after multiplying the costs of each region of layers by its scale.

        Parameters
        ----------
        scales
            One factor for each region; the regions divide the layers evenly, from the first to the last.
        budget
            Size in neurons, where a layer's other parameters count as the neurons that have as many. Default: the
            budget of the request.
        """
        sizes: list[list[int]] = []
        prices: list[list[float]] = []
        layers = len(self._grid)
        for layer, (grid, costs) in enumerate(zip(self._grid, self._costs, strict=True)):
            scale = scales[layer * len(scales) // layers]
            rest = self._request.rest[layer] if self._request.rest else 0
            sizes.append([width + rest for width in grid])
            prices.append([scale * cost for cost in costs.of_widths])
            if self._can_go(layer):
                sizes[-1].append(0)
                prices[-1].append(scale * costs.left_out)
        chosen = cheapest(sizes, prices, self._budget if budget is None else budget)
        return [[*grid, 0][index] for grid, index in zip(self._grid, chosen, strict=True)]

    def with_fewer_layers(self, budget: int | None = None) -> list[EqualWidths]:
        """Return the models of equal widths, from that with all layers on, leaving out the cheapest layer each time.

        Parameters
        ----------
        budget
            As in :meth:`by_costs`.
        """
        budget = self._budget if budget is None else budget
        request, rest = self._request, self._request.rest
        cheapest_first = sorted(
            filter(self._can_go, range(len(self._grid))),
            key=lambda layer: self._costs[layer].left_out,
        )
        found: list[EqualWidths] = []
        for count in range(len(cheapest_first) + 1):
            gone = set(cheapest_first[:count])
            stay = [layer for layer in range(len(self._grid)) if layer not in gone]
            room = (budget - sum(rest[layer] for layer in stay)) // len(stay)
            narrowest = min(request.full)
            width = min(room // request.multiple * request.multiple, narrowest)
            least = min(request.multiple, narrowest) if request.narrows else narrowest
            if width < least:
                continue
            cost = sum(self._costs[layer].left_out for layer in gone)
            cost += sum(self._cost(layer, width) for layer in stay)
            widths = [0 if layer in gone else width for layer in range(len(self._grid))]
            found.append(EqualWidths(_name(count), widths, cost))
            if width == narrowest:  # nothing is left to narrow
                break
        if not found:
            raise InvalidInput("no model of equal widths is that small: ask for a larger one")
        return found

    def _can_go(self, layer: int) -> bool:
        """Whether a layer can be left out: the first one has none before it that could make up for it."""
        return bool(self._request.rest) and layer > 0 and layer not in self._request.whole

    def _cost(self, layer: int, width: int) -> float:
        grid = self._grid[layer]
        nearest = min(range(len(grid)), key=lambda level: abs(grid[level] - width))
        return self._costs[layer].of_widths[nearest]


def _name(left_out: int) -> str:
    return "uniform" if not left_out else f"{left_out} layers left out"
