"""The settings of a run, typed and validated; they come from Python arguments, a YAML file or command-line flags.

Longer than 400 lines because it declares every setting, once, with the text that the help and the docs show.
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

from fbn_prune.data.text_files import GENERATED, is_text, read_text, read_yaml
from fbn_prune.errors import InvalidInput
from fbn_prune.pruning.recovery import Weights

MOST_BYTES = 2**20
"""Largest recipe file that is read."""

CRITERION_NAMES = (
    "second-order",
    "flap",
    "wanda",
    "membership",
    "membership-bias",
    "magnitude",
    "random",
)
"""The built-in criteria; listed here because their registry (:mod:`fbn_prune.pruning.criteria`) imports torch."""

ExpertCriterion = Literal["second-order", "reap", "frequency", "random"]
RankName = Literal["energy", "knockout", "task"]
Scope = Literal["global", "layer"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]

LayoutName = Literal["uniform", "ragged", "auto"]
WidthRule = Literal["networks", "search", "loss", "members", "auto"]

BUDGET_KEYS = ("sparsity", "target_params", "target_size")
"""Keys that set the size of the result, instead of `keep_networks`; `experts` may go with `sparsity`."""

STRUCTURES = ("neurons", "heads", "attention", "layers", "vocabulary")
"""What may be removed to reach a size."""

RECOVERY_STEPS = ("match", "distil")

MODEL, CALIBRATION, CUT = "Model and output", "Calibration", "What to cut"
QUALITY, MACHINE = "Quality", "Machine"


def _key(group: str, default: Any = None, *, more: bool = False, **limits: Any) -> Any:
    """Declare a recipe key and the panel of its flag; with `more`, only `--help-all` shows the flag."""
    return Field(default, json_schema_extra={"group": group, "advanced": more}, **limits)


_more = partial(_key, more=True)


class PruningConfig(BaseModel):
    """The settings of the pruning method; immutable. All have defaults.

    ``PruningConfig(sparsity=0.5)`` removes half of the MLP neurons.

    Raises
    ------
    InvalidInput
        If a setting is unknown or its value is not accepted.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    tokens: int = _key(CALIBRATION, 131072, ge=1, le=10**12)
    """Calibration tokens, divided evenly among the sources."""
    context: int | None = _more(CALIBRATION, ge=8)
    """Tokens per block. Default: the model's context length, at most 2048."""
    held_out: float = _more(CALIBRATION, 0.1, gt=0, lt=1)
    """Share of the text to keep out of calibration; perplexity before and after is measured on it."""
    networks: int = _more(CUT, 64, ge=1, le=10**6)
    """Number of functional networks to discover."""
    network_tokens: int = _more(CUT, 8192, ge=2, le=10**9)
    """Tokens that the networks are discovered on."""
    scope: Scope = _more(CUT, "global")
    """One ICA over all layers, or one for each layer."""
    networks_from: Path | None = _more(CUT)
    """A networks.safetensors to use instead of discovering networks."""
    report_networks: bool = _more(CUT, False)
    """Discover the networks for the report, even if the pruned model does not depend on them."""
    keep_networks: int | None = _key(CUT)
    """Keep as many neurons as this many networks have as members: the size dial. Default: 10, or all
    if there are fewer."""
    sparsity: float | None = _key(CUT)
    """Share of MLP neurons to remove, instead of --keep-networks; in a mixture of experts, of the neurons of each
    expert."""
    experts: int | None = _key(CUT, ge=1)
    """Number of experts to keep in each layer of a mixture of experts; with --sparsity, those are narrowed too."""
    expert_criterion: ExpertCriterion = _more(CUT, "second-order")
    """Criterion that selects the experts to remove: second-order (with a refit of those that stay), reap (gate times
    output), frequency (number of tokens) or random."""
    head_sparsity: float | None = _more(CUT, gt=0, lt=1)
    """Share of attention heads to remove as well, the same number in every layer; each key-value head is removed
    with its query heads. Default: none."""
    rank: RankName | None = _more(CUT)
    """Order of the networks: by output energy, by the rise of the loss when they are knocked out, or by how much
    the task's activity differs from generic text. Default: task with --task, else energy."""
    task: str | None = _key(CALIBRATION)
    """The task to keep: a few examples in a FILE (text, question and answer, or conversations), the training split
    of a task of lm-evaluation-harness (lm_eval:NAME or lm_eval:FILE.yaml), or builtin:SKILL."""
    task_examples: int = _more(CALIBRATION, 64, ge=1)
    """Number of examples to draw from lm_eval: and builtin: tasks; a file is used completely."""
    task_networks: int | None = _more(CALIBRATION, ge=1)
    """Number of networks used to match calibration text to the task. Default: --keep-networks, or 10."""
    task_test: Path | None = _more(CALIBRATION)
    """FILE.jsonl with test questions of the task: kept out of calibration, and measured. lm_eval: and builtin:
    tasks have their own."""
    forget: Path | None = _more(CUT)
    """FILE with examples of a skill to remove, in the forms of --task. All weights that change are fitted to
    calibration text unlike the examples, within --forget-cost."""
    forget_by: Literal["erasing", "neurons", "networks"] = _more(CUT, "erasing")
    """How --forget removes the skill: by output weights that do little on the examples, with all neurons kept; by
    cutting the neurons that are more active on the examples than on other text; or by cutting those of the networks
    that the examples engage."""
    forget_cost: float = _more(CUT, 0.02, gt=0)
    """Most that the loss on the other text may rise by --forget, in nats a token."""
    criterion: str = _more(CUT, "second-order")
    """Criterion that selects the neurons to remove: second-order, flap, wanda, membership, membership-bias,
    magnitude, random, or a registered one."""
    target_params: str | None = _key(CUT)
    """Largest number of parameters of the result, as 5000000, 350M or 1.5B; instead of --keep-networks."""
    target_size: str | None = _key(CUT)
    """Largest size of the result's weights, as 2GB or 900MB; instead of --keep-networks."""
    layout: LayoutName = _key(CUT, "uniform")
    """One width for all layers (uniform: every loader accepts it), a width per layer (ragged: lower loss, needs
    trust_remote_code to load), or ragged only if a trial shows enough gain (auto)."""
    widths: WidthRule = _more(CUT, "networks")
    """Rule for ragged widths: all networks, the divergence from the dense model that each layer's widths cost
    (search), how the loss rises as neurons are removed (loss), membership in the kept networks (members), or the best
    of networks, loss and equal widths in a trial (auto)."""
    structures: str = _more(CUT, "neurons")
    """What may be removed, separated by commas: neurons, layers (whole decoder layers), vocabulary (as --vocabulary 1)
    and, with --layout ragged, heads (groups of attention heads) and attention (whole attention blocks), or all. What
    goes is searched where it costs least, and each layer is fitted on those already pruned."""
    loss_aware: bool = _key(QUALITY, False)
    """Weigh output errors by their effect on the loss (needs a backward pass)."""
    keep_layers: str | None = _more(CUT)
    """Layers to leave uncut, as 0,1,-1. Needs --layout ragged."""
    width_multiple: int | None = _more(CUT, ge=1)
    """Make widths multiples of this. Default: 64, or 8 for models with widths below 2048."""
    sequential: bool = _key(QUALITY, False)
    """Fit each layer on the output of the layers that are already pruned."""
    recover: bool = _key(QUALITY, False)
    """After pruning, train the model on the calibration text to match the original model's layer outputs and then its
    predictions."""
    recover_steps: str = _more(QUALITY, "match,distil")
    """Steps of --recover, in order: match trains the MLPs of one layer after another to reproduce the dense layer's
    output, distil trains all layers to predict what the dense model predicts."""
    recover_cuts: int = _more(QUALITY, 1, ge=1, le=16)
    """Cut in as many steps and train after each, on its own part of the text."""
    recover_text: tuple[str, ...] = _more(QUALITY, ())
    """Text to train on, in the forms of --calibration. Repeat for several. Default: the calibration text."""
    recover_tokens: int | None = _more(QUALITY, ge=1)
    """Tokens to train on in each step, over as many passes as the text needs. Default: recover_passes passes."""
    recover_passes: int | None = _more(QUALITY, ge=1)
    """Passes over the text in each step, instead of recover_tokens. Default: 2."""
    recover_minutes: float | None = _more(QUALITY, gt=0)
    """Longest time of the step distil, whose learning rate then falls to zero by that time."""
    recover_text_loss: float = _more(QUALITY, 0.0, ge=0, le=1)
    """Weight, in the step distil, of the text's own loss; the rest is the divergence from the dense model."""
    recover_weights: Weights = _more(QUALITY, "adapters")
    """What the step distil trains: low-rank adapters, which are merged, or all weights of the linear maps of layers.
    These take 20 more bytes of memory each."""
    recover_rank: int | None = _more(QUALITY, ge=1)
    """Rank of the adapters of --recover. Default: 32."""
    damping: float = _more(QUALITY, 1e-2, gt=0)
    """Damping while neurons are selected, as a share of the mean diagonal of H."""
    refit_damping: float = _more(QUALITY, 1e-3, gt=0)
    """Damping of the refit, as a share of the mean diagonal of H; raise it if tokens are few."""
    allow_untrained: bool = _more(MODEL, False)
    """Go on with a model whose dense perplexity is no better than guessing, such as one with random weights."""
    seed: int = _key(MACHINE, 0, ge=0, lt=2**32)
    """Seed of all random choices."""

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
    def recover_steps_in_order(self) -> tuple[str, ...]:
        return tuple(step.strip() for step in self.recover_steps.split(","))

    @property
    def leaves_out_layers(self) -> bool:
        """Whether whole layers may be removed."""
        return "layers" in self.removable

    @property
    def removes_heads(self) -> bool:
        """Whether layers may lose attention heads of their own, or their whole attention."""
        return not self.removable.isdisjoint(("heads", "attention"))

    @property
    def removable(self) -> frozenset[str]:
        """The names in `structures`; of `all`, those that the layout has a form for."""
        if self.structures.strip() == "all":
            apart = () if self.layout == "ragged" else ("heads", "attention")
            return frozenset(STRUCTURES).difference(apart)
        return frozenset(part.strip() for part in self.structures.split(","))

    @property
    def searches_widths(self) -> bool:
        """Whether what goes is searched by the divergence that it costs."""
        more = self.leaves_out_layers or self.removes_heads
        return more or (self.layout != "uniform" and self.widths == "search")

    @property
    def fits_in_sequence(self) -> bool:
        """Whether each layer is fitted on the output of those that are already pruned."""
        return self.sequential or self.leaves_out_layers or self.removes_heads

    @property
    def distils(self) -> bool:
        """Whether the recovery trains the whole model at once."""
        return self.recover and "distil" in self.recover_steps_in_order

    @property
    def recover_passes_or_default(self) -> int:
        return self.recover_passes or 2

    @property
    def recover_rank_or_default(self) -> int:
        return self.recover_rank or 32

    @property
    def kept_networks_or_default(self) -> int:
        """`keep_networks`, or the default: 10, or all where fewer are discovered."""
        if self.keep_networks is not None:
            return self.keep_networks
        counted = self.networks_from is None and self.scope == "global"
        return min(10, self.networks) if counted else 10

    @property
    def task_networks_or_default(self) -> int:
        return self.task_networks or self.kept_networks_or_default

    @field_validator("recover_text", mode="before")
    @classmethod
    def _one_text(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("task", "task_test", "networks_from", "recover_text", "forget")
    @classmethod
    def _file_names(cls, value: Any) -> Any:
        """Refuse strings that cannot be file names; the operating system's own error is not always clear."""
        for name in value if isinstance(value, tuple) else (value,):
            if name is not None and not is_text(str(name)):
                raise ValueError("a name cannot contain a NUL or half a surrogate pair")
        return value

    @field_validator("criterion", mode="before")
    @classmethod
    def _former_names(cls, value: Any) -> Any:
        if value == "networks":
            raise ValueError("this criterion is now called second-order")
        return value

    @field_validator("target_params", "target_size", "keep_layers", mode="before")
    @classmethod
    def _numbers_as_text(cls, value: Any) -> Any:
        """Accept numbers, because YAML reads 5000000 or a single layer as one."""
        whole = isinstance(value, int | float) and not isinstance(value, bool)
        return format(value, "d" if isinstance(value, int) else "f") if whole else value

    @property
    def stated_budget(self) -> str | None:
        """The key that sets the size of the result, or None if `keep_networks` does."""
        keys = (*BUDGET_KEYS, "experts")
        return next((key for key in keys if getattr(self, key) is not None), None)

    @property
    def rank_or_default(self) -> RankName:
        return self.rank or ("energy" if self.task is None else "task")

    @property
    def needs_networks(self) -> bool:
        """Whether the result depends on the networks, or `report_networks` asks for them."""
        return (
            self.report_networks
            or self.task is not None
            or self.forget is not None
            or self.stated_budget is None
            or self._cuts_by_kept_networks
            or (self.layout != "uniform" and not self.searches_widths and self.widths != "loss")
        )

    @property
    def _cuts_by_kept_networks(self) -> bool:
        """Whether the choice of kept networks affects the cut, and not only the number of their members."""
        by_members = self.layout != "uniform" and self.widths == "members"
        if self.criterion in CRITERION_NAMES:
            return by_members or self.criterion.startswith("membership")
        from fbn_prune.pruning.criteria import NEED_NETWORKS  # imports torch

        return by_members or self.criterion in NEED_NETWORKS

    @property
    def notes(self) -> list[str]:
        """One line for each key that the user set and that does not change the result."""
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
        """Whether the method needs a backward pass."""
        by_loss = self.layout != "uniform" and self.widths in ("loss", "auto")
        return self.loss_aware or (by_loss and not self.searches_widths)

    @property
    def needs_whole_model(self) -> bool:
        """Whether the whole model must be in memory, because gradients flow through it or it writes text."""
        return self.needs_gradients or self.recover


class Recipe(PruningConfig):
    """All settings of a run: those of the method, and the model, the text and the machine.

    Each field is a key of a YAML recipe and, written with dashes, a command-line flag.
    """

    model: str = _key(MODEL, "builtin")
    """Checkpoint folder, GGUF file, Hub id, or `builtin`."""
    output: Path | None = _key(MODEL)
    """Folder to write; it must not exist."""
    vocabulary: int | None = _more(CUT, ge=1)
    """Also trim the vocabulary to the tokens that the calibration text uses at least this often. Default: all stay."""
    vocabulary_texts: tuple[str, ...] = _more(CUT, ())
    """Further texts whose tokens stay, in the forms of --calibration. Repeat for several."""
    vocabulary_chars: str = _more(CUT, "")
    """Characters whose tokens stay in any case, as äöü."""
    vocabulary_ascii: bool = _more(CUT, False)
    """Keep all tokens of ASCII characters, whether the texts use them or not: for English and code."""
    calibration: tuple[str, ...] = _key(CALIBRATION, ("builtin",))
    """Calibration text: FILE[:field] (plain text, JSON, CSV, Parquet or Arrow, compressed or not), a folder,
    hf:dataset[:config[:split[:field]]], `builtin`, or `generated`: text that the model itself writes first. Repeat for
    several."""
    max_shard_size: str = _more(MODEL, "5GB")
    """Size of the largest safetensors shard to write."""
    keep_unused_tensors: bool = _more(MODEL, False)
    """Also write tensors of the checkpoint that the model does not use, such as those of an adapter or a value head."""
    device: str = _key(MACHINE, "auto")
    """auto, cpu, cuda or cuda:N."""
    dtype: DtypeName = _more(MACHINE, "auto")
    """Dtype of the computation. The checkpoint keeps its own."""
    memory_budget: str | None = _key(MACHINE)
    """Memory limit, as 4GB: a model that does not fit is read layer by layer, and activations that do not fit are
    written to disk. Default: the free memory."""
    trust_remote_code: bool = _more(MODEL, False)
    """Allow the tokenizer to run code from the checkpoint; the model's code is never run."""
    overwrite: bool = _key(MODEL, False)
    """Replace an existing output folder."""
    work_dir: Path | None = _more(MACHINE)
    """Folder for finished stages, from which the same command continues after a failure. Default: .NAME.work
    beside the output."""

    @field_validator("model", "output", "calibration", "vocabulary_texts", "work_dir")
    @classmethod
    def _places(cls, value: Any) -> Any:
        return cls._file_names(value)

    @field_validator("calibration", "vocabulary_texts", mode="before")
    @classmethod
    def _one_source(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @property
    def writes_text(self) -> bool:
        """Whether the model is to write text before anything else."""
        return GENERATED in (*self.calibration, *self.recover_text)

    @property
    def needs_whole_model(self) -> bool:
        return super().needs_whole_model or self.writes_text

    @property
    def least_uses(self) -> int | None:
        """How often a token must be used to stay; None if all stay."""
        return 1 if self.vocabulary is None and "vocabulary" in self.removable else self.vocabulary

    def to_yaml(self) -> str:
        """Return the recipe as YAML, with the value of every key but `work_dir`."""
        values = self.model_dump(mode="json", exclude={"work_dir"})
        ordered = {key: values[key] for key in RECIPE_KEYS if key in values}
        return yaml.safe_dump(ordered, sort_keys=False)


def _in_order() -> tuple[str, ...]:
    own = [key for key in Recipe.model_fields if key not in PruningConfig.model_fields]
    groups = [MODEL, CALIBRATION, CUT, QUALITY, MACHINE]

    def place(key: str) -> int:
        extra = Recipe.model_fields[key].json_schema_extra
        return groups.index(str(extra["group"])) if isinstance(extra, dict) else len(groups)

    return tuple(sorted([*own, *PruningConfig.model_fields], key=place))


RECIPE_KEYS = _in_order()
"""All keys, in the order in which help and recipe files show them."""


def recipe_key(name: object, known: Collection[str]) -> str:
    """Return the known key that `name` spells, with dashes or underscores.

    Raises
    ------
    InvalidInput
        If there is no such key; the message suggests the closest one.
    """
    key = str(name).replace("-", "_")
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        raise InvalidInput(f"unknown key {key!r}; {hint}")
    return key


def recipe_setting(text: str, known: Collection[str]) -> tuple[str, Any]:
    """Read `KEY=VALUE`, with the value written as in a YAML recipe.

    Parameters
    ----------
    text
        The argument of the flag `--set`.
    known
        Keys that may be set.

    Raises
    ------
    InvalidInput
        If the text has another form, or the key is unknown.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise InvalidInput(f"--set {text}: write KEY=VALUE")
    try:
        return recipe_key(name.strip(), known), read_yaml(value, text)
    except InvalidInput as error:
        raise InvalidInput(f"--set: {error}") from None


def build_recipe(values: dict[str, Any], *, where: str = "command line") -> Recipe:
    """Return the recipe with these keys, written with dashes or underscores.

    Parameters
    ----------
    values
        Value by key; all other keys get their defaults.
    where
        Where the keys come from; error messages begin with it.

    Raises
    ------
    InvalidInput
        If a key is unknown or a value is not accepted; the message names the key, the value and what is accepted.
    """
    try:
        return Recipe(**values)
    except InvalidInput as error:
        raise InvalidInput(f"{where}: {error}") from None


def _refuse(config: PruningConfig, key: str, why: str) -> NoReturn:
    raise InvalidInput(f"{key} = {getattr(config, key)}: {why}")


def _check(recipe: PruningConfig) -> None:
    """Refuse values that a field's own validation cannot refuse, such as two keys that exclude each other."""
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
        refuse("sparsity", "the share of neurons to remove must be between 0 and 1")
    if recipe.expert_criterion != "second-order" and recipe.experts is None:
        refuse("expert_criterion", "say how many experts stay with experts")
    _check_sizes(recipe)
    _check_layout(recipe)
    if recipe.rank == "task" and recipe.task is None:
        refuse("rank", "give the task's examples with task")
    for key, verb in (("task_test", "test"), ("task_networks", "match")):
        if getattr(recipe, key) is not None and recipe.task is None:
            refuse(key, f"there is no task to {verb}")
    _check_forgetting(recipe)
    if isinstance(recipe, Recipe):
        if not recipe.calibration:
            raise InvalidInput("calibration is empty: name at least one source of text")
        for key in ("calibration", "recover_text"):
            if getattr(recipe, key).count(GENERATED) > 1:
                refuse(
                    key, f"the model writes as much text as is asked for: name {GENERATED!r} once"
                )
        for key in ("vocabulary_texts", "vocabulary_chars", "vocabulary_ascii"):
            if getattr(recipe, key) and recipe.least_uses is None:
                refuse(key, "add vocabulary = 1 to trim the vocabulary")
        if recipe.least_uses and (recipe.writes_text or GENERATED in recipe.vocabulary_texts):
            raise InvalidInput(
                "the tokens that stay are counted before the model can write: with vocabulary, give text instead of "
                f"{GENERATED!r}"
            )
    tokens = min(recipe.network_tokens, recipe.tokens)
    if recipe.needs_networks and recipe.networks >= tokens:
        refuse(
            "networks",
            f"{tokens} tokens allow at most {tokens - 1}; lower networks, or raise tokens and network_tokens",
        )


def _check_forgetting(recipe: PruningConfig) -> None:
    if recipe.forget is None:
        for key in ("forget_cost", "forget_by"):
            if getattr(recipe, key) != type(recipe).model_fields[key].default:
                _refuse(recipe, key, "give the examples of the skill to remove with forget")
        return
    for key in (*BUDGET_KEYS, "keep_networks", "head_sparsity", "task", "keep_layers"):
        if getattr(recipe, key) is not None:
            _refuse(recipe, key, "forget sets what is cut: prune its result in a second run")
    if recipe.recover:
        _refuse(recipe, "recover", "training towards the whole model would bring the skill back")
    if recipe.criterion != "second-order" or recipe.loss_aware:
        key = "loss_aware" if recipe.loss_aware else "criterion"
        _refuse(recipe, key, "forget chooses the neurons itself, see forget_by")
    if recipe.sequential and recipe.forget_by == "erasing":
        _refuse(recipe, "sequential", "erasing fits every layer to the whole model")
    if recipe.leaves_out_layers or recipe.removes_heads:
        _refuse(recipe, "structures", "forget removes neurons only")
    if recipe.layout == "auto" or recipe.widths != "networks":
        key = "layout" if recipe.layout == "auto" else "widths"
        _refuse(recipe, key, "forget sets the widths: give layout uniform or ragged alone")


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
    _check_structures(recipe)
    if recipe.layout == "uniform" and recipe.widths != "networks":
        why = "this rule is for ragged layers: add layout = ragged or auto"
        refuse("widths", why)
    if recipe.keep_layers is not None:
        if recipe.layout != "ragged":
            refuse("keep_layers", "uncut layers beside cut ones need layout = ragged")
        parse_layers(recipe.keep_layers, "keep_layers")
        if recipe.head_sparsity is not None:
            why = "head_sparsity removes heads from every layer: give one of the two"
            refuse("keep_layers", why)
    steps = recipe.recover_steps_in_order
    if not steps or len(set(steps)) < len(steps) or not set(steps) <= set(RECOVERY_STEPS):
        refuse(
            "recover_steps",
            f"give {' and '.join(RECOVERY_STEPS)}, or one of them, separated by commas",
        )
    if recipe.recover_tokens is not None and recipe.recover_passes is not None:
        raise InvalidInput(
            "recover_tokens and recover_passes both set the training's length: give one of them"
        )
    for key in (
        "recover_text",
        "recover_tokens",
        "recover_passes",
        "recover_minutes",
        "recover_rank",
    ):
        if getattr(recipe, key) and not recipe.recover:
            refuse(key, "add recover = true to train the model")
    if recipe.recover_minutes is not None and "distil" not in steps:
        refuse("recover_minutes", "only the step distil has a time limit")
    if recipe.recover_cuts > 1:
        if not recipe.recover:
            refuse("recover_cuts", "add recover = true to train the model after each cut")
        if recipe.removes_heads or recipe.leaves_out_layers or recipe.head_sparsity is not None:
            refuse("recover_cuts", "heads and layers go in one cut: remove neurons alone")
    if recipe.recover_weights == "all":
        if not recipe.recover or "distil" not in steps:
            refuse("recover_weights", "only the step distil of recover trains all weights")
        if recipe.recover_rank is not None:
            refuse("recover_rank", "only adapters have a rank: recover_weights is all")
    if recipe.loss_aware and recipe.criterion != "second-order":
        refuse("loss_aware", f"criterion {recipe.criterion} does not score output errors")


def _check_structures(recipe: PruningConfig) -> None:
    refuse = partial(_refuse, recipe)
    if not recipe.removable <= set(STRUCTURES) or recipe.removable == {"vocabulary"}:
        alone = " (vocabulary alone is `fbn-prune trim-vocabulary`)"
        refuse("structures", f"give {', '.join(STRUCTURES)}, several of them, or all{alone}")
    heads, layers = recipe.removes_heads, recipe.leaves_out_layers
    if heads and recipe.layout != "ragged":
        why = "layers with different attention heads need layout ragged; head_sparsity removes the same from each"
        refuse("structures", why)
    if heads and recipe.head_sparsity is not None:
        refuse("head_sparsity", "structures lets the search choose the heads: give one of the two")
    if "neurons" not in recipe.removable and not (layers or heads):
        refuse("structures", "give neurons, heads, attention or layers as well")
    if "neurons" not in recipe.removable and recipe.layout == "ragged" and not heads:
        refuse("layout", "where no neurons go, the layers that stay are equal: use uniform")
    if (layers or heads) and recipe.widths not in ("networks", "search"):
        why = "where more than neurons can go, widths are searched: remove this key"
        refuse("widths", why)
    if recipe.leaves_out_layers and recipe.layout == "auto":
        refuse("layout", "where layers can be left out, give uniform or ragged")


def parse_count(text: str, name: str) -> int:
    """Return the number that a text such as 5000000, 350M or 1.5B gives.

    Raises
    ------
    InvalidInput
        If it has another form; `name` is the key in the message.
    """
    return _parse(text, {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}, name, "5000000, 350M or 1.5B")


def parse_size(text: str, name: str) -> int:
    """Return the bytes that a text such as 2GB, 900MB or 1.5GiB gives; `name` and errors as in :func:`parse_count`."""
    units = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    units |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    return _parse(text, units, name, "2GB, 900MB or 1.5GiB")


def _parse(text: str, units: dict[str, int], name: str, examples: str) -> int:
    match = re.fullmatch(r"(\d{1,18}(?:\.\d*)?)\s*([A-Z]*)", text.strip().upper(), re.ASCII)
    if match is None or match[2] not in units or float(match[1]) <= 0:
        raise InvalidInput(f"{name} = {text!r}: write it as {examples}")
    return int(float(match[1]) * units[match[2]])


def parse_layers(text: str, name: str) -> tuple[int, ...]:
    """Return the layers in a text such as 0,1,-1; -1 is the last. `name` and errors as in :func:`parse_count`."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InvalidInput(f"{name} = {text!r}: write layers as 0,1,-1") from None


def load_recipe(path: Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe from a YAML file.

    Parameters
    ----------
    path
        The file.
    overrides
        Values that replace those of the file, such as the user's flags.

    Raises
    ------
    InvalidInput
        If the file is missing or not a YAML mapping, or has an unknown key or a bad value.
    """
    name = f"recipe {path}"
    values = read_yaml(read_text(path, name, most_bytes=MOST_BYTES), name)
    if not isinstance(values, dict):
        raise InvalidInput(f"{name} must be a mapping of keys to values")
    for key in values:
        if not isinstance(key, str):
            raise InvalidInput(f"{name}: the key {key!r} is no text; remove it")
    return build_recipe({**values, **(overrides or {})}, where=str(path))
