"""Sizes of all layers within a budget, from what each size of each layer costs; pure numbers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from fbn_prune.errors import InvalidInput
from fbn_prune.pruning.costs import Costs
from fbn_prune.pruning.layout import LayoutRequest, even_layout
from fbn_prune.pruning.solver import cheapest

LAYERS, HEADS = "layers", "heads"
"""What may go besides neurons."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model's layers.

    Attributes
    ----------
    widths
        Neurons of each layer; a layer of width 0 is left out.
    heads
        For each layer the place of its number of head groups in `HeadLevels`; empty if all keep all heads.
    """

    widths: list[int]
    heads: tuple[int, ...] = ()

    @property
    def left_out(self) -> set[int]:
        """The layers that are left out."""
        return {layer for layer, width in enumerate(self.widths) if width == 0}

    def apart(self, other: Sizes) -> int:
        """Return the neurons by which the widths of two models differ."""
        return sum(abs(a - b) for a, b in zip(self.widths, other.widths, strict=True))


@dataclass(frozen=True)
class EqualWidths:
    """A model with one width for all layers that stay, and the sum of its costs."""

    name: str
    sizes: Sizes
    cost: float


class Candidates:
    """Sizes of all layers that fit the budget of a request.

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
        self._rest = request.rest or (0,) * len(grid)
        # Where nothing but neurons may go, all candidates are as large as the even widths.
        only_neurons = not request.rest
        self._budget = sum(self._even) if only_neurons else request.budget + sum(request.rest)

    def even(self) -> Sizes | None:
        """Return the even widths; None if they exceed the budget."""
        if not self._request.narrows:
            return None
        fits = sum(self._even) + sum(self._rest) <= self._budget
        return Sizes(self._even, self._all_heads()) if fits else None

    def halfway(self, sizes: Sizes) -> Sizes:
        """Return the widths of the grid about halfway between these and the even ones; all else stays."""
        levels: list[int] = []
        for grid, width, even in zip(self._grid, sizes.widths, self._even, strict=True):
            goal = (width + even) / 2
            levels.append(min(range(len(grid)), key=lambda level: abs(grid[level] - goal)))
        here = [layer for layer, width in enumerate(sizes.widths) if width]
        room = self._budget - sum(self._rest_of(layer, sizes) for layer in here)
        while sum(self._grid[layer][levels[layer]] for layer in here) > room:
            wide = [layer for layer in here if levels[layer] > 0]
            if not wide:
                break
            cheapest_step = min(wide, key=lambda layer: self._step(layer, levels[layer]))
            levels[cheapest_step] -= 1
        widths = [
            self._grid[layer][levels[layer]] if width else 0
            for layer, width in enumerate(sizes.widths)
        ]
        return replace(sizes, widths=widths)

    def _step(self, layer: int, level: int) -> float:
        """What a layer's next narrower width costs more, for each neuron that it saves."""
        costs, grid = self._costs[layer].of_widths, self._grid[layer]
        return (costs[level - 1] - costs[level]) / (grid[level] - grid[level - 1])

    def _all_heads(self) -> tuple[int, ...]:
        heads = self._request.heads
        return () if heads is None else (len(heads.groups) - 1,) * len(self._grid)

    def _rest_of(self, layer: int, sizes: Sizes) -> int:
        """What a layer that stays has besides its neurons, in neurons."""
        heads = self._request.heads
        saved = 0 if heads is None or not sizes.heads else heads.saved[sizes.heads[layer]]
        return self._rest[layer] - saved

    def summed(self, sizes: Sizes) -> float:
        """Return the sum of the costs of these sizes."""
        total = 0.0
        for layer, width in enumerate(sizes.widths):
            costs = self._costs[layer]
            total += self._cost(layer, width) if width else costs.left_out
            if width and sizes.heads:
                total += costs.of_heads[sizes.heads[layer]]
        return total

    def share(self, sizes: Sizes) -> float:
        """Return the share of the whole size that these sizes keep."""
        kept = sum(
            width + self._rest_of(layer, sizes) for layer, width in enumerate(sizes.widths) if width
        )
        return kept / (sum(self._request.full) + sum(self._rest))

    def parts(self, sizes: Sizes | None = None) -> list[tuple[int, int, int]]:
        """Return what each layer keeps: neurons, attention and all else, in neurons that have as many parameters.

        Without `sizes`, what the whole layers have. Attention counts as all else where no heads may go.
        """
        found: list[tuple[int, int, int]] = []
        heads = self._request.heads
        whole = 0 if heads is None else heads.whole
        for layer, full in enumerate(self._request.full):
            width = full if sizes is None else sizes.widths[layer]
            saved = 0
            if heads is not None and sizes is not None:
                saved = heads.saved[sizes.heads[layer]]
            other = self._rest[layer] - whole
            found.append((width, whole - saved, other) if width else (0, 0, 0))
        return found

    def curve(self, shares: Sequence[float]) -> list[tuple[float, float]]:
        """Return the sum of costs of the best model for each of these shares of the whole size that can be reached."""
        full = sum(self._request.full) + sum(self._rest)
        found: list[tuple[float, float]] = []
        for share in shares:
            with suppress(InvalidInput):
                if self._request.layout == "uniform":
                    models = self.with_fewer_layers(round(share * full))
                    found.append((share, min(model.cost for model in models)))
                else:
                    sizes = self.by_costs([1.0], budget=round(share * full))
                    found.append((share, self.summed(sizes)))
        return found

    def by_costs(
        self,
        scales: Sequence[float],
        parts: frozenset[str] = frozenset({LAYERS, HEADS}),
        budget: int | None = None,
    ) -> Sizes:
        """Return the cheapest sizes after multiplying the costs of each region of layers by its scale.

        Parameters
        ----------
        scales
            One factor for each region; the regions divide the layers evenly, from the first to the last.
        parts
            What may go besides neurons, if the request allows it.
        budget
            Size in neurons, where a layer's other parameters count as the neurons that have as many. Default: the
            budget of the request.

        Raises
        ------
        InvalidInput
            No sizes fit.
        """
        entries: list[list[tuple[int, int]]] = []  # of each layer: width and level of the heads
        sizes: list[list[int]] = []
        prices: list[list[float]] = []
        layers = len(self._grid)
        for layer, costs in enumerate(self._costs):
            scale = scales[layer * len(scales) // layers]
            choice = self._entries(layer, heads=HEADS in parts)
            sizes.append([size for _, size, _ in choice])
            prices.append([scale * cost for _, _, cost in choice])
            entries.append([entry for entry, _, _ in choice])
            if LAYERS in parts and self._can_go(layer):
                entries[-1].append((0, 0))
                sizes[-1].append(0)
                prices[-1].append(scale * costs.left_out)
        chosen = cheapest(sizes, prices, self._budget if budget is None else budget)
        picked = [each[index] for each, index in zip(entries, chosen, strict=True)]
        levels = tuple(level for _, level in picked) if self._request.heads is not None else ()
        return Sizes([width for width, _ in picked], levels)

    def _entries(self, layer: int, *, heads: bool) -> list[tuple[tuple[int, int], int, float]]:
        """The sizes of a layer that stays: width and level of its heads, size in neurons, and cost."""
        grid, costs, rest = self._grid[layer], self._costs[layer], self._rest[layer]
        levels, may_go = self._request.heads, heads and layer not in self._request.whole
        found: list[tuple[tuple[int, int], int, float]] = []
        last = 0 if levels is None else len(levels.groups) - 1
        for level in range(0 if may_go else last, last + 1):
            if levels is not None and layer == 0 and not levels.first_layer(level):
                continue
            saved = 0 if levels is None else levels.saved[level]
            more = 0.0 if levels is None else costs.of_heads[level]
            found += [
                ((width, level), width + rest - saved, cost + more)
                for width, cost in zip(grid, costs.of_widths, strict=True)
            ]
        return found

    def with_fewer_layers(self, budget: int | None = None) -> list[EqualWidths]:
        """Return the models of equal widths, from that with all layers on, leaving out the cheapest layer each time.

        Parameters
        ----------
        budget
            As in :meth:`by_costs`.
        """
        budget = self._budget if budget is None else budget
        request, rest = self._request, self._rest
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
            found.append(EqualWidths(_name(count), Sizes(widths), cost))
            if width == narrowest:  # nothing is left to narrow
                break
        if not found:
            raise InvalidInput("no model of equal widths is that small: ask for a larger one")
        return found

    def _can_go(self, layer: int) -> bool:
        """Whether a layer can be left out: the first one has none before it that could make up for it."""
        return self._request.leaves_out and layer > 0 and layer not in self._request.whole

    def _cost(self, layer: int, width: int) -> float:
        grid = self._grid[layer]
        nearest = min(range(len(grid)), key=lambda level: abs(grid[level] - width))
        return self._costs[layer].of_widths[nearest]


def _name(left_out: int) -> str:
    return "uniform" if not left_out else f"{left_out} layers left out"
