"""One typed, validated description of a run: Python arguments, a YAML file and flags are three spellings of it.

Longer than other modules because every setting is declared here, once, with the words that help and docs show.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fbn_prune.data.text_files import is_text, read_text, read_yaml
from fbn_prune.errors import InvalidInput

MOST_BYTES = 2**20
"""A recipe larger than that is none."""

CRITERION_NAMES = (
    "second-order",
    "flap",
    "wanda",
    "membership",
    "membership-bias",
    "magnitude",
    "random",
)
"""Criteria that need no look into the registry (:mod:`fbn_prune.pruning.criteria`), which imports torch."""

RankName = Literal["energy", "knockout", "task"]
Scope = Literal["global", "layer"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]

LayoutName = Literal["uniform", "ragged", "auto"]
WidthRule = Literal["networks", "loss", "members", "auto"]

BUDGET_KEYS = ("sparsity", "target_params", "target_size")
"""What may state how much stays instead of the kept networks."""

MODEL, CALIBRATION, CUT = "Model and output", "Calibration", "What to cut"
QUALITY, MACHINE = "Quality", "Machine"


def _key(group: str, default: Any = None, *, more: bool = False, **limits: Any) -> Any:
    """A recipe key and the panel that its flag stands in, of `--help` or only of `--help-all`."""
    return Field(default, json_schema_extra={"group": group, "advanced": more}, **limits)


_more = partial(_key, more=True)


class PruningConfig(BaseModel):
    """The settings of the method, for :func:`fbn_prune.prune` and as keys of a recipe alike; frozen.

    Every field has a default: ``PruningConfig(sparsity=0.5)`` removes half of the MLP neurons.

    Raises
    ------
    InvalidInput
        An unknown setting, or a value that is not accepted.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    tokens: int = _key(CALIBRATION, 131072, ge=1, le=10**12)
    """Calibration tokens, shared evenly by sources."""
    context: int | None = _more(CALIBRATION, ge=8)
    """Tokens of a block. Default: the model's, at most 2048."""
    held_out: float = _more(CALIBRATION, 0.1, gt=0, lt=1)
    """Share of text kept from calibration for before/after figures."""
    networks: int = _more(CUT, 64, ge=1, le=10**6)
    """Functional networks to discover."""
    network_tokens: int = _more(CUT, 8192, ge=2, le=10**9)
    """Tokens that the networks are found on."""
    scope: Scope = _more(CUT, "global")
    """One ICA over all layers, or one for each layer."""
    networks_from: Path | None = _more(CUT)
    """A networks.safetensors to use instead of discovering anew."""
    report_networks: bool = _more(CUT, False)
    """Discover the networks for the report, even where the result does not depend on them."""
    keep_networks: int | None = _key(CUT)
    """Keep as many neurons as belong to this many networks: the size dial. Default: 10."""
    sparsity: float | None = _key(CUT)
    """Share of MLP neurons to remove, instead of --keep-networks."""
    head_sparsity: float | None = _more(CUT, gt=0, lt=1)
    """Share of attention heads to remove besides, the same number in every layer; key-value heads go with the
    query heads that read them. Default: none."""
    rank: RankName | None = _more(CUT)
    """Order of networks: output energy, loss rise when knocked out, or how far they stand out on the task.
    Default: task with --task, else energy."""
    task: str | None = _key(CALIBRATION)
    """The task to keep: a few examples in FILE.jsonl (text, or question and answer), the training split of a task
    of lm-evaluation-harness (lm_eval:NAME or lm_eval:FILE.yaml), or builtin:SKILL."""
    task_examples: int = _more(CALIBRATION, 64, ge=1)
    """Examples to draw of lm_eval: and builtin: tasks; a file is used whole."""
    task_networks: int | None = _more(CALIBRATION, ge=1)
    """Networks on which calibration text is matched to the task. Default: as many as --keep-networks, or 10."""
    task_test: Path | None = _more(CALIBRATION)
    """Questions of the task, as in a FILE.jsonl, that must not calibrate; measured on. lm_eval: and builtin: tasks
    bring their own."""
    criterion: str = _more(CUT, "second-order")
    """Which neurons go: by second-order, flap, wanda, membership, membership-bias, magnitude, random, or a
    registered criterion."""
    target_params: str | None = _key(CUT)
    """Parameters of the result, as 5000000, 350M or 1.5B: sets the budget."""
    target_size: str | None = _key(CUT)
    """Largest size of the result's weights, as 2GB or 900MB: sets the budget."""
    layout: LayoutName = _key(CUT, "uniform")
    """The same width in every layer, which every loader takes; or widths of their own (ragged: better, loads with
    trust_remote_code); or ragged only where a trial shows that it gains enough (auto)."""
    widths: WidthRule = _more(CUT, "networks")
    """Ragged widths by all networks, by the loss's removal curves, by membership in the kept networks, or the
    best of the first two and an even split in a trial (auto)."""
    loss_aware: bool = _key(QUALITY, False)
    """Score errors as the loss feels them (takes a backward pass)."""
    keep_layers: str | None = _more(CUT)
    """Layers to leave whole, as 0,1,-1. Needs --layout ragged."""
    width_multiple: int | None = _more(CUT, ge=1)
    """Widths are multiples of this. Default: 64, or 8 below width 2048."""
    sequential: bool = _key(QUALITY, False)
    """Fit each layer on the output of the layers already pruned."""
    recover: bool = _key(QUALITY, False)
    """Train the cut model towards the dense one on the calibration text: its layers' outputs, then its
    predictions (low-rank adapters, merged)."""
    recover_passes: int = _more(QUALITY, 2, ge=1)
    """Passes over the calibration text in each of the two steps."""
    recover_rank: int = _more(QUALITY, 32, ge=1)
    """Rank of the adapters."""
    damping: float = _more(QUALITY, 1e-2, gt=0)
    """Share of mean diag(H) added while choosing."""
    refit_damping: float = _more(QUALITY, 1e-3, gt=0)
    """The same share while refitting; more where tokens are few."""
    seed: int = _key(MACHINE, 0, ge=0, lt=2**32)
    """Seed of every random choice."""

    if not TYPE_CHECKING:

        def __init__(self, **values: Any) -> None:
            known = type(self).model_fields
            values = {recipe_key(name, known): value for name, value in values.items()}
            try:
                super().__init__(**values)
            except ValidationError as error:
                first = error.errors()[0]
                name = ".".join(str(part) for part in first["loc"])
                value = reprlib.repr(first["input"])
                raise InvalidInput(f"{name} = {value}: {first['msg']}") from None
            _check(self)

    @property
    def kept_networks_or_default(self) -> int:
        return 10 if self.keep_networks is None else self.keep_networks

    @property
    def task_networks_or_default(self) -> int:
        return self.task_networks or self.kept_networks_or_default

    @field_validator("task", "task_test", "networks_from")
    @classmethod
    def _names_of_files(cls, value: Any) -> Any:
        """No file has such a name, and asking for it is no clean error everywhere."""
        for name in value if isinstance(value, tuple) else (value,):
            if name is not None and not is_text(str(name)):
                raise ValueError("a name cannot hold a NUL or half a character")
        return value

    @field_validator("criterion", mode="before")
    @classmethod
    def _former_names(cls, value: Any) -> Any:
        if value == "networks":
            raise ValueError("this criterion is called second-order")
        return value

    @field_validator("target_params", "target_size", "keep_layers", mode="before")
    @classmethod
    def _numbers_are_words_too(cls, value: Any) -> Any:
        """YAML reads 5000000, and a single layer, as a number."""
        whole = isinstance(value, int | float) and not isinstance(value, bool)
        return format(value, "d" if isinstance(value, int) else "f") if whole else value

    @property
    def stated_budget(self) -> str | None:
        """The key that sets the budget; None where the kept networks do."""
        return next((key for key in BUDGET_KEYS if getattr(self, key) is not None), None)

    @property
    def rank_or_default(self) -> RankName:
        return self.rank or ("energy" if self.task is None else "task")

    @property
    def needs_networks(self) -> bool:
        """Whether the result depends on the networks, or a report of them is asked for."""
        return (
            self.report_networks
            or self.task is not None
            or self.stated_budget is None
            or self._cuts_by_kept_networks
            or (self.layout != "uniform" and self.widths != "loss")
        )

    @property
    def _cuts_by_kept_networks(self) -> bool:
        """Whether it matters which networks are kept, beside how many neurons they have."""
        by_members = self.layout != "uniform" and self.widths == "members"
        if self.criterion in CRITERION_NAMES:
            return by_members or self.criterion.startswith("membership")
        from fbn_prune.pruning.criteria import NEED_NETWORKS  # a registered one: torch is there

        return by_members or self.criterion in NEED_NETWORKS

    @property
    def notes(self) -> list[str]:
        """What its user should know of keys that do not change the result, a line each."""
        lines, budget = [], self.stated_budget
        matched = self.task is not None and self.task_networks is None
        if self.keep_networks and budget and not (matched or self._cuts_by_kept_networks):
            kept = f"keep_networks = {self.keep_networks}"
            lines.append(f"{kept} does not change the model: {budget} sets its size")
        if not self.needs_networks and self.networks_from is None:
            remedy = "--report-networks discovers them for the report"
            lines.append(
                f"no networks are discovered: the result does not depend on them ({remedy})"
            )
        return lines

    @property
    def needs_gradients(self) -> bool:
        """Whether a backward pass is needed."""
        by_loss = self.layout != "uniform" and self.widths in ("loss", "auto")
        return self.loss_aware or by_loss

    @property
    def needs_whole_model(self) -> bool:
        """Whether the model cannot be read a layer at a time: gradients flow through all of it."""
        return self.needs_gradients or self.recover


class Recipe(PruningConfig):
    """Everything that decides the result of a run: the settings of the method, the model, its text, the machine.

    Each field is a recipe key and, with dashes, a flag of the command line.
    """

    model: str = _key(MODEL, "builtin")
    """Checkpoint folder, hub id, or `builtin`."""
    output: Path | None = _key(MODEL)
    """Folder to write; it must not exist."""
    calibration: tuple[str, ...] = _key(CALIBRATION, ("builtin",))
    """Text: FILE.txt, FILE.jsonl[:field], a folder, hf:dataset[:config[:split[:field]]] or `builtin`. Repeat for
    several."""
    max_shard_size: str = _more(MODEL, "5GB")
    """Largest safetensors shard to write."""
    device: str = _key(MACHINE, "auto")
    """auto, cpu, cuda or cuda:N."""
    dtype: DtypeName = _more(MACHINE, "auto")
    """Compute type. The checkpoint keeps its own."""
    memory_budget: str | None = _key(MACHINE)
    """Most memory to take, as 4GB: a model that does not fit is read layer by layer, and what else does not fit
    goes to disk. Default: what is free."""
    trust_remote_code: bool = _more(MODEL, False)
    """Let the tokenizer be code from the checkpoint; the model never is."""
    overwrite: bool = _key(MODEL, False)
    """Replace an existing output folder."""
    work_dir: Path | None = _more(MACHINE)
    """Where finished stages lie until the output stands: a run that died goes on from there. Default: .NAME.work
    beside the output."""

    @field_validator("model", "output", "calibration", "work_dir")
    @classmethod
    def _places(cls, value: Any) -> Any:
        return cls._names_of_files(value)

    @field_validator("calibration", mode="before")
    @classmethod
    def _one_source(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def to_yaml(self) -> str:
        """The resolved recipe, every key spelled out that has a part in the result."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude={"work_dir"}), sort_keys=False)


def recipe_key(name: object, known: Collection[str]) -> str:
    """The one of the `known` keys that `name` spells, with dashes or underscores.

    Raises
    ------
    InvalidInput
        There is none.
    """
    key = str(name).replace("-", "_")
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        raise InvalidInput(f"unknown key {key!r}; {hint}")
    return key


def build_recipe(values: dict[str, Any], *, where: str = "command line") -> Recipe:
    """A recipe from keys with dashes or underscores.

    Parameters
    ----------
    where
        Where the keys come from: what an error begins with.

    Raises
    ------
    InvalidInput
        One line that names the key, the offending value and what is accepted.
    """
    try:
        return Recipe(**values)
    except InvalidInput as error:
        raise InvalidInput(f"{where}: {error}") from None


def _refuse(config: PruningConfig, key: str, why: str) -> NoReturn:
    raise InvalidInput(f"{key} = {getattr(config, key)}: {why}")


def _check(recipe: PruningConfig) -> None:
    """Refuse what one field alone cannot show."""
    refuse = partial(_refuse, recipe)
    if recipe.keep_networks is not None and recipe.keep_networks < 1:
        refuse("keep_networks", "at least one network must be kept")
    if recipe.criterion not in CRITERION_NAMES:
        from fbn_prune.pruning.criteria import CRITERIA

        if recipe.criterion not in CRITERIA:
            refuse("criterion", f"choose from {', '.join(CRITERIA)}")
    if recipe.networks_from is None and recipe.scope == "global":
        for key in ("keep_networks", "task_networks"):
            if (getattr(recipe, key) or 0) > recipe.networks:
                why = f"only {recipe.networks} networks are discovered; lower it or raise networks"
                refuse(key, why)
    if recipe.sparsity is not None and not 0 < recipe.sparsity < 1:
        refuse("sparsity", "the share of neurons to remove lies between 0 and 1")
    _check_sizes(recipe)
    _check_layout(recipe)
    if recipe.rank == "task" and recipe.task is None:
        refuse("rank", "name the task's examples with task")
    for key, verb in (("task_test", "test"), ("task_networks", "match")):
        if getattr(recipe, key) is not None and recipe.task is None:
            refuse(key, f"there is no task to {verb}")
    if isinstance(recipe, Recipe) and not recipe.calibration:
        raise InvalidInput("calibration is empty: name at least one source of text")
    tokens = min(recipe.network_tokens, recipe.tokens)
    if recipe.needs_networks and recipe.networks >= tokens:
        refuse(
            "networks",
            f"{tokens} tokens allow fewer than that many; lower networks or raise tokens and network_tokens",
        )


def _check_sizes(recipe: PruningConfig) -> None:
    stated = [key for key in BUDGET_KEYS if getattr(recipe, key) is not None]
    if len(stated) > 1:
        raise InvalidInput(f"{' and '.join(stated)} both set the budget: give one of them")
    if recipe.target_params is not None:
        parse_count(recipe.target_params, "target_params")
    for key in ("max_shard_size", "target_size", "memory_budget"):
        if (text := getattr(recipe, key, None)) is not None:
            parse_size(text, key)


def _check_layout(recipe: PruningConfig) -> None:
    refuse = partial(_refuse, recipe)
    if recipe.layout == "uniform" and recipe.widths != "networks":
        why = "uniform layers have no widths of their own: add layout = ragged or auto"
        refuse("widths", why)
    if recipe.keep_layers is not None:
        if recipe.layout != "ragged":
            refuse("keep_layers", "whole layers beside cut ones need layout = ragged")
        parse_layers(recipe.keep_layers, "keep_layers")
        if recipe.head_sparsity is not None:
            why = "head_sparsity takes heads from every layer alike: give one of the two"
            refuse("keep_layers", why)
    if recipe.loss_aware and recipe.criterion != "second-order":
        refuse("loss_aware", f"criterion {recipe.criterion} scores no errors")


def parse_count(text: str, name: str) -> int:
    """A number of parameters: 5000000, 350M, 1.5B.

    Raises
    ------
    InvalidInput
    """
    return _parse(text, {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}, name, "5000000, 350M or 1.5B")


def parse_size(text: str, name: str) -> int:
    """A size in bytes: 2GB, 900MB, 1.5GiB.

    Raises
    ------
    InvalidInput
    """
    units = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    units |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    return _parse(text, units, name, "2GB, 900MB or 1.5GiB")


def _parse(text: str, units: dict[str, int], name: str, examples: str) -> int:
    match = re.fullmatch(r"(\d{1,18}(?:\.\d*)?)\s*([A-Z]*)", text.strip().upper(), re.ASCII)
    if match is None or match[2] not in units or float(match[1]) <= 0:
        raise InvalidInput(f"{name} = {text!r}: write it as {examples}")
    return int(float(match[1]) * units[match[2]])


def parse_layers(text: str, name: str) -> tuple[int, ...]:
    """Layers as 0,1,-1, where -1 is the last.

    Raises
    ------
    InvalidInput
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InvalidInput(f"{name} = {text!r}: write layers as 0,1,-1") from None


def load_recipe(path: Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a YAML recipe; `overrides` (flags given by the user) win over the file.

    Raises
    ------
    InvalidInput
        The file is missing, is not YAML, is not a mapping, or holds an unknown key or a bad value.
    """
    name = f"recipe {path}"
    values = read_yaml(read_text(path, name, most_bytes=MOST_BYTES), name)
    if not isinstance(values, dict):
        raise InvalidInput(f"{name} must be a mapping of keys to values")
    return build_recipe({**values, **(overrides or {})}, where=str(path))
