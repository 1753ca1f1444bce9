"""Read the data of a report: the files of an output folder, and the JSON output of `compare`, `ablate` and `evaluate`.

All data come from files, so that the page that a run writes and a page made later from the same folder are identical.
Files are validated as they are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError

from fbn_prune.errors import InvalidInput
from fbn_prune.export.published import public_name, without_paths
from fbn_prune.model.kept_experts import KEPT_EXPERTS, read_kept_experts
from fbn_prune.model.kept_neurons import KEPT_FILE, KeptNeurons
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.networks.ranking import strongest_first

RESULT_NAME = "result.json"
"""The file in an output folder with the results of the run."""
PLACES = ("output", "overwrite", "work_dir")
"""Recipe keys that set where a result is written and do not affect its content."""


class Recovered(BaseModel):
    """The JSON form of :class:`fbn_prune.pruning.recovery.gain.Recovery`."""

    perplexity_cut: float
    gap_closed: float | None
    kept: bool = True
    curve: list[tuple[int, float]] = []


class Vocabulary(BaseModel):
    """The JSON form of :class:`fbn_prune.runs.vocabulary.VocabularyFigures`."""

    tokens_before: int
    tokens_after: int


class Search(BaseModel):
    """What a search of widths found, see :func:`fbn_prune.pruning.search.search_layout`."""

    summed: float | None = None
    predicted: float
    measured: float | None = None
    share: float
    curve: list[tuple[float, float]]
    whole_parts: list[tuple[int, int, int]] = []
    kept_parts: list[tuple[int, int, int]] = []


class RunResult(BaseModel):
    """The content of `result.json`, the JSON form of :class:`fbn_prune.runs.result.PruneResult`."""

    model: str
    criterion: str
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    perplexity_before: float
    perplexity_after: float
    neurons_kept: int
    neurons_total: int
    heads_kept: int = 0
    heads_total: int = 0
    widths: list[int] = Field(min_length=1)
    width_rule: str
    experts: tuple[int, int] | None = None
    layers_left_out: list[int] = []
    head_groups: list[int] | None = None
    layout_trials: dict[str, float] = {}
    search: Search | None = None
    kept_networks: list[int]
    ranked_networks: list[int] = []
    calibration_tokens: int
    held_out_tokens: int
    calibration_fingerprint: str
    task: dict[str, Any] | None = None
    warning: str | None = None
    recovery: Recovered | None = None
    vocabulary: Vocabulary | None = None

    @property
    def neurons_by_layer(self) -> list[int]:
        """The neurons that each layer keeps; in a mixture those of all its experts."""
        experts = 1 if self.experts is None else self.experts[1]
        return [experts * width for width in self.widths]


class Budget(BaseModel):
    """One budget of a comparison: the share of neurons kept, and the perplexity of each criterion."""

    kept: float
    networks: int | None = None
    perplexity: dict[str, float]


class Comparison(BaseModel):
    """The output of `compare --json`."""

    model: str
    facts: dict[str, Any] = {}
    dense: float
    budgets: list[Budget]

    @property
    def criteria(self) -> list[str]:
        """All measured criteria, in order of perplexity at the smallest budget."""
        by_budget = sorted(self.budgets, key=lambda budget: budget.kept)
        names = dict.fromkeys(name for budget in by_budget for name in budget.perplexity)
        smallest = by_budget[0].perplexity if by_budget else {}
        return sorted(names, key=lambda name: (smallest.get(name, float("inf")), name))


class Ablated(BaseModel):
    """An ablated set of neurons and its effect; `id` is that of the network, None for other sets."""

    id: int | None = None
    neurons: int
    perplexity: float
    rise_by_text: dict[str, float] = {}
    tasks: dict[str, dict[str, float]] = {}


class Spread(BaseModel):
    """Mean and standard deviation over random draws."""

    mean: float
    std: float


class RandomBand(BaseModel):
    """Mean and standard deviation over `n` random sets of `neurons` neurons."""

    neurons: int
    mean: float
    std: float
    n: int
    rise_by_text: dict[str, float] = {}
    tasks: dict[str, dict[str, Spread]] = {}


class GrowingStep(Ablated):
    """The first `n` networks, with random sets and principal components of as many neurons."""

    n: int
    random: RandomBand
    components: Ablated | None = None


class Ablation(BaseModel):
    """The output of `ablate --json`."""

    model: str
    action: str
    rank: str = ""
    dense: float
    tokens: dict[str, int] = {}
    dense_tasks: dict[str, dict[str, float]] = {}
    networks: list[Ablated] = Field(min_length=1)
    ratio_to_random: float | None = None
    random: RandomBand
    components: list[Ablated] = []
    growing: dict[str, list[GrowingStep]] = {}

    @property
    def strongest_first(self) -> list[Ablated]:
        sign = 1 if self.action == "retain" else -1
        return sorted(self.networks, key=lambda one: sign * one.perplexity)


class Figure(BaseModel):
    """One metric of one task, with its standard error."""

    value: float
    stderr: float | None = None


class Evaluation(BaseModel):
    """The output of `evaluate --json`; `compare` holds the second model."""

    model: str
    tasks: dict[str, dict[str, Figure]]
    compare: Evaluation | None = None


@dataclass(frozen=True, eq=False)
class ReportFacts:
    """The data of a report; the page leaves out what is None.

    Attributes
    ----------
    order
        All networks in the order of their rank, strongest first; empty without networks.
    widths_before
        Number of neurons in each layer of the source model; empty without a run.
    kept_experts
        The experts that each decoder layer has kept, by their numbers in the source; empty but for a mixture.
    """

    name: str
    result: RunResult | None
    networks: FunctionalNetworks | None
    order: list[int]
    recipe: str | None
    widths_before: Sequence[int] = ()
    kept_experts: Mapping[int, Sequence[int]] = field(default_factory=dict)
    comparison: Comparison | None = None
    ablation: Ablation | None = None
    evaluation: Evaluation | None = None

    @property
    def members_kept(self) -> list[int]:
        """For K = 1, 2, ... the number of neurons that are members of at least one of the first K networks."""
        if self.networks is None:
            return []
        counts, union = [], self.networks.union([])
        for network in self.order:
            union |= self.networks.members(network)
            counts.append(int(union.sum()))
        return counts


def read_facts(
    folder: Path,
    *,
    compare: Path | None = None,
    ablate: Path | None = None,
    evaluate: Path | None = None,
) -> ReportFacts:
    """Read an output folder of the main job or of `discover`, and the JSON files of other commands.

    Parameters
    ----------
    folder
        The output folder.
    compare, ablate, evaluate
        Files with the JSON output of these commands.

    Raises
    ------
    InvalidInput
        The folder holds neither a result nor networks, or a file is damaged or of the wrong kind.
    """
    result = _read(folder / RESULT_NAME, RunResult) if (folder / RESULT_NAME).exists() else None
    artifact = folder / "networks.safetensors"
    networks = FunctionalNetworks.load(artifact) if artifact.exists() else None
    if result is None and networks is None:
        raise InvalidInput(
            f"{folder} holds neither {RESULT_NAME} nor networks.safetensors: give the output of a run or of discover"
        )
    experts = folder / KEPT_EXPERTS
    return ReportFacts(
        name=public_name(_model(result, networks)),
        result=result,
        networks=networks,
        order=[] if networks is None else _order(networks, result),
        recipe=_recipe(folder / "recipe.yaml"),
        kept_experts=read_kept_experts(experts) if experts.is_file() else {},
        widths_before=() if result is None else _widths_before(folder / KEPT_FILE, result),
        comparison=None if compare is None else _read(compare, Comparison),
        ablation=None if ablate is None else _read(ablate, Ablation),
        evaluation=None if evaluate is None else _read(evaluate, Evaluation),
    )


def read_ablation(path: Path) -> Ablation:
    """Read the JSON output of `ablate`.

    Raises
    ------
    InvalidInput
        The file is missing, damaged or of the wrong kind.
    """
    return _read(path, Ablation)


def _widths_before(kept: Path, result: RunResult) -> Sequence[int]:
    """Return the widths in the file of kept neurons; without one, all layers of the source are taken to be equal."""
    if kept.is_file():
        return KeptNeurons.load(kept).widths
    return [result.neurons_total // len(result.widths)] * len(result.widths)


def _model(result: RunResult | None, networks: FunctionalNetworks | None) -> str:
    if result is not None:
        return result.model
    assert networks is not None
    return str(networks.header.get("model", "a model"))


def _order(networks: FunctionalNetworks, result: RunResult | None) -> list[int]:
    """Return the run's ranking; without a run, the order of energy, or else that of the artifact."""
    every = list(range(len(networks.maps)))
    if result is not None and sorted(result.ranked_networks) == every:
        return result.ranked_networks
    return every if networks.energy is None else strongest_first(networks.energy)


def _recipe(path: Path) -> str | None:
    """Return the recipe without the keys that only set where files are written."""
    if not path.exists():
        return None
    try:
        keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise InvalidInput(
            f"{path} is not a recipe, correct it: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(keys, dict):
        raise InvalidInput(f"{path} is not a recipe: it must be a mapping of keys to values")
    kept = {key: value for key, value in keys.items() if key not in PLACES}
    return yaml.safe_dump(without_paths(kept), sort_keys=False, allow_unicode=True)


_COMMANDS: dict[type[BaseModel], str] = {
    RunResult: "a run",
    Comparison: "compare",
    Ablation: "ablate",
    Evaluation: "evaluate",
}
_Kind = TypeVar("_Kind", bound=BaseModel)


def _read(path: Path, kind: type[_Kind]) -> _Kind:
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InvalidInput(
            f"cannot read {path}: {error.strerror or error}; check its name and permissions"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InvalidInput(
            f"{path} is not the JSON output of {_COMMANDS[kind]}: {place or 'the file'}: {first['msg']}; "
            "write it again with --json"
        ) from None
