"""One typed, validated description of a whole run: a YAML file and the command line's flags are two spellings of it."""

from __future__ import annotations

import difflib
import re
import reprlib
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fbn_prune.data.text_files import is_text, read_text
from fbn_prune.errors import InvalidInput

MOST_BYTES = 2**20
"""A recipe larger than that is none."""

CriterionName = Literal[
    "networks",
    "second-order",
    "flap",
    "wanda",
    "membership",
    "membership-bias",
    "magnitude",
    "random",
]
RankName = Literal["energy", "knockout", "task"]
Scope = Literal["global", "layer"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]

LayoutName = Literal["uniform", "ragged", "auto"]
WidthRule = Literal["networks", "loss", "members", "auto"]

BUDGET_KEYS = ("sparsity", "target_params", "target_size")
"""What may state how much stays instead of the kept networks."""

CRITERION_NAMES: tuple[str, ...] = get_args(CriterionName)


class Recipe(BaseModel):
    """Everything that decides the result of a run. Each field is a recipe key and, with dashes, a flag."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str = Field("builtin", description="Checkpoint folder, hub id, or `builtin`.")
    output: Path | None = Field(None, description="Folder to write; it must not exist.")
    calibration: tuple[str, ...] = Field(
        ("builtin",),
        description="Text: FILE.txt, FILE.jsonl[:field], a folder, "
        "hf:dataset[:config[:split[:field]]] or `builtin`. Repeat for several.",
    )
    tokens: int = Field(
        131072, ge=1, le=10**12, description="Calibration tokens, shared evenly by sources."
    )
    context: int | None = Field(
        None, ge=8, description="Tokens of a block. Default: the model's, at most 2048."
    )
    held_out: float = Field(
        0.1, gt=0, lt=1, description="Share of text kept from calibration for before/after figures."
    )
    networks: int = Field(64, ge=1, le=10**6, description="Functional networks to discover.")
    network_tokens: int = Field(
        8192, ge=2, le=10**9, description="Tokens that the networks are found on."
    )
    scope: Scope = Field("global", description="One ICA over all layers, or one for each layer.")
    networks_from: Path | None = Field(
        None, description="A networks.safetensors to use instead of discovering anew."
    )
    keep_networks: int | None = Field(
        None, description="Networks to keep: the size dial. Default 10."
    )
    sparsity: float | None = Field(
        None, description="Share of MLP neurons to remove, instead of --keep-networks's budget."
    )
    head_sparsity: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of attention heads to remove besides, the same number in every layer; key-value heads go "
        "with the query heads that read them. Default: none.",
    )
    rank: RankName | None = Field(
        None,
        description="Order of networks: output energy, loss rise when knocked out, or how far they "
        "stand out on the task. Default: task with --task, else energy.",
    )
    task: str | None = Field(
        None,
        description="The task to keep: a few examples in FILE.jsonl (text, or question and answer), the training split "
        "of a task of lm-evaluation-harness (lm_eval:NAME or lm_eval:FILE.yaml), or builtin:SKILL.",
    )
    task_examples: int = Field(
        64,
        ge=1,
        description="Examples to draw of lm_eval: and builtin: tasks; a file is used whole.",
    )
    task_test: Path | None = Field(
        None,
        description="Questions of the task, as in a FILE.jsonl, that must not calibrate; measured on. "
        "lm_eval: and builtin: tasks bring their own.",
    )
    criterion: CriterionName = Field("networks", description="Which neurons go.")
    target_params: str | None = Field(
        None, description="Parameters of the result, as 5000000, 350M or 1.5B: sets the budget."
    )
    target_size: str | None = Field(
        None, description="Largest size of the result's weights, as 2GB or 900MB: sets the budget."
    )
    layout: LayoutName = Field(
        "uniform",
        description="The same width in every layer, which every loader takes; or widths of their own (ragged: better, "
        "loads with trust_remote_code); or ragged only where a trial shows that it gains enough (auto).",
    )
    widths: WidthRule = Field(
        "networks",
        description="Ragged widths by all networks, by the loss's removal curves, by membership in the kept networks, "
        "or the best of the first two and an even split in a trial (auto).",
    )
    loss_aware: bool = Field(
        False, description="Score errors as the loss feels them (takes a backward pass)."
    )
    keep_layers: str | None = Field(
        None, description="Layers to leave whole, as 0,1,-1. Needs --layout ragged."
    )
    width_multiple: int | None = Field(
        None, ge=1, description="Widths are multiples of this. Default: 64, or 8 below width 2048."
    )
    sequential: bool = Field(
        False, description="Fit each layer on the output of the layers already pruned."
    )
    recover: bool = Field(
        False,
        description="Train the cut model towards the dense one on the calibration text: its layers' outputs, then its "
        "predictions (low-rank adapters, merged).",
    )
    recover_passes: int = Field(
        2, ge=1, description="Passes over the calibration text in each of the two steps."
    )
    recover_rank: int = Field(32, ge=1, description="Rank of the adapters.")
    damping: float = Field(1e-2, gt=0, description="Share of mean diag(H) added while choosing.")
    refit_damping: float = Field(
        1e-3, gt=0, description="The same share while refitting; more where tokens are few."
    )
    max_shard_size: str = Field("5GB", description="Largest safetensors shard to write.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of every random choice.")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    dtype: DtypeName = Field("auto", description="Compute type. The checkpoint keeps its own.")
    memory_budget: str | None = Field(
        None,
        description="Most memory to take, as 4GB: a model that does not fit is read layer by layer, and what else "
        "does not fit goes to disk. Default: what is free.",
    )
    trust_remote_code: bool = Field(
        False, description="Let the tokenizer be code from the checkpoint; the model never is."
    )
    overwrite: bool = Field(False, description="Replace an existing output folder.")
    work_dir: Path | None = Field(
        None,
        description="Where finished stages lie until the output stands: a run that died goes on from there. "
        "Default: .NAME.work beside the output.",
    )

    @property
    def kept_networks_or_default(self) -> int:
        return 10 if self.keep_networks is None else self.keep_networks

    @field_validator(
        "model", "output", "calibration", "task", "task_test", "networks_from", "work_dir"
    )
    @classmethod
    def _names_of_files(cls, value: Any) -> Any:
        """No file has such a name, and asking for it is no clean error everywhere."""
        for name in value if isinstance(value, tuple) else (value,):
            if name is not None and not is_text(str(name)):
                raise ValueError("a name cannot hold a NUL or half a character")
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
        """Whether the result depends on the networks at all."""
        return (
            self.task is not None
            or self.stated_budget is None
            or self.criterion in ("networks", "membership", "membership-bias")
            or (self.layout != "uniform" and self.widths != "loss")
        )

    @property
    def needs_gradients(self) -> bool:
        """Whether a backward pass is needed."""
        by_loss = self.layout != "uniform" and self.widths in ("loss", "auto")
        return self.loss_aware or by_loss

    @property
    def needs_whole_model(self) -> bool:
        """Whether the model cannot be read a layer at a time: gradients flow through all of it."""
        return self.needs_gradients or self.recover

    def to_yaml(self) -> str:
        """The resolved recipe, every key spelled out that has a part in the result."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude={"work_dir"}), sort_keys=False)


def build_recipe(values: dict[str, Any], *, where: str = "command line") -> Recipe:
    """Validate `values` (keys with dashes or underscores) and check what one field alone cannot show.

    Raises
    ------
    InvalidInput
        One line that names the key, the offending value and what is accepted.
    """
    keys = {str(key).replace("-", "_"): value for key, value in values.items()}
    for key in keys:
        if key not in Recipe.model_fields:
            near = difflib.get_close_matches(key, Recipe.model_fields, n=1)
            hint = (
                f"did you mean {near[0]!r}?" if near else f"known: {', '.join(Recipe.model_fields)}"
            )
            raise InvalidInput(f"{where}: unknown key {key!r}; {hint}")
    if isinstance(keys.get("calibration"), str):
        keys["calibration"] = (keys["calibration"],)
    try:
        recipe = Recipe(**keys)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        value = reprlib.repr(first["input"])
        raise InvalidInput(f"{where}: {name} = {value}: {first['msg']}") from None
    _check(recipe, where)
    return recipe


def _check(recipe: Recipe, where: str) -> None:
    if recipe.keep_networks is not None and recipe.keep_networks < 1:
        raise InvalidInput(
            f"{where}: keep_networks = {recipe.keep_networks}: at least one network must be kept"
        )
    discovered = recipe.networks if recipe.networks_from is None else None
    if (
        recipe.keep_networks is not None
        and discovered is not None
        and recipe.scope == "global"
        and recipe.keep_networks > discovered
    ):
        raise InvalidInput(
            f"{where}: keep_networks = {recipe.keep_networks}: only {discovered} networks "
            "are discovered; keep fewer or raise networks"
        )
    if recipe.sparsity is not None and not 0 < recipe.sparsity < 1:
        raise InvalidInput(
            f"{where}: sparsity = {recipe.sparsity}: the share of neurons to remove lies between 0 and 1"
        )
    parse_size(recipe.max_shard_size, f"{where}: max_shard_size")
    _check_budget(recipe, where)
    _check_layout(recipe, where)
    if recipe.rank == "task" and recipe.task is None:
        raise InvalidInput(f"{where}: rank = task: name the task's examples with task")
    if recipe.task_test is not None and recipe.task is None:
        raise InvalidInput(f"{where}: task_test = {recipe.task_test}: there is no task to test")
    if not recipe.calibration:
        raise InvalidInput(f"{where}: calibration is empty: name at least one source of text")
    if recipe.networks > recipe.network_tokens - 1 or recipe.networks > recipe.tokens - 1:
        raise InvalidInput(
            f"{where}: networks = {recipe.networks}: "
            f"{min(recipe.network_tokens, recipe.tokens)} tokens allow fewer than that many; "
            "lower networks or raise tokens and network_tokens"
        )


def _check_budget(recipe: Recipe, where: str) -> None:
    stated = [key for key in BUDGET_KEYS if getattr(recipe, key) is not None]
    if len(stated) > 1:
        raise InvalidInput(f"{where}: {' and '.join(stated)} both set the budget: give one of them")
    if recipe.target_params is not None:
        parse_count(recipe.target_params, f"{where}: target_params")
    if recipe.target_size is not None:
        parse_size(recipe.target_size, f"{where}: target_size")
    if recipe.memory_budget is not None:
        parse_size(recipe.memory_budget, f"{where}: memory_budget")


def _check_layout(recipe: Recipe, where: str) -> None:
    if recipe.layout == "uniform" and recipe.widths != "networks":
        raise InvalidInput(
            f"{where}: widths = {recipe.widths}: uniform layers have no widths of their own: "
            "add layout = ragged or auto"
        )
    if recipe.keep_layers is not None:
        if recipe.layout != "ragged":
            raise InvalidInput(
                f"{where}: keep_layers = {recipe.keep_layers}: whole layers beside cut ones need layout = ragged"
            )
        parse_layers(recipe.keep_layers, f"{where}: keep_layers")
        if recipe.head_sparsity is not None:
            raise InvalidInput(
                f"{where}: keep_layers = {recipe.keep_layers}: head_sparsity takes heads from every layer alike: "
                "give one of the two"
            )
    if recipe.loss_aware and recipe.criterion not in ("networks", "second-order"):
        raise InvalidInput(
            f"{where}: loss_aware = true: criterion {recipe.criterion} scores no errors"
        )


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
    text = read_text(path, f"recipe {path}", most_bytes=MOST_BYTES)
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise InvalidInput(f"recipe {path} refers back to its own parts (*): write them out")
        values = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        line = " ".join(str(error).split())
        raise InvalidInput(f"recipe {path} is not YAML: {line}") from None
    if not isinstance(values, dict):
        raise InvalidInput(f"recipe {path} must be a mapping of keys to values")
    return build_recipe({**values, **(overrides or {})}, where=str(path))
