"""Run lm-evaluation-harness on checkpoints, pruned or not."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from fbn_prune.data import builtin
from fbn_prune.data.examples import fingerprint, question_of, recorded_fingerprints
from fbn_prune.data.harness_files import TaskConfig, task_from_file
from fbn_prune.data.harness_tasks import document_question, load_tasks, task_manager
from fbn_prune.errors import FbnPruneError, InvalidInput, counted
from fbn_prune.model.layerwise import check_runs
from fbn_prune.model.mixture_checkpoint import open_any
from fbn_prune.model.opening import live_adapter
from fbn_prune.networks.intervention_effects import TaskFigures
from fbn_prune.recipe import DtypeName
from fbn_prune.runs.early_checks import TASK_SUFFIXES
from fbn_prune.runs.machine import chosen_device

if TYPE_CHECKING:
    from lm_eval.api.task import Task

BOOTSTRAPS = 100_000
"""Bootstrap samples for standard errors without a closed form; the harness's default, so that results agree."""

FEWSHOT_SEED = 1234
"""Seed of the few-shot examples; the harness's default, so that they are the same."""


@dataclass(frozen=True)
class HarnessOptions:
    """Options of lm-evaluation-harness, and the device and dtype of the models.

    Attributes
    ----------
    limit
        Questions per task, or a share below 1.
    fewshot
        Examples in the prompt. Default: the task's own number.
    batch_size
        A number or "auto".
    log_samples
        Whether to include the result of every question in `Evaluation.raw`.
    device, dtype
        As in a recipe; "auto" is float32, and a GPU if there is one.
    max_length
        Longest prompt in tokens. Default: the model's context length.
    """

    limit: float | None = None
    fewshot: int | None = None
    batch_size: str = "8"
    log_samples: bool = False
    device: str = "auto"
    dtype: DtypeName = "auto"
    max_length: int | None = None


@dataclass(frozen=True)
class Figure:
    """One metric of one task; `stderr` is None if the harness has no standard error for it."""

    task: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool | None


@dataclass(frozen=True)
class Evaluation:
    """A model's metrics, and the complete result of the harness (`raw`)."""

    model: str
    figures: list[Figure]
    raw: dict[str, Any] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return the metrics by task as JSON values, with sample counts, task versions and few-shot numbers."""
        tasks: dict[str, dict[str, Any]] = {}
        for one in self.figures:
            entry = {
                "value": one.value,
                "stderr": one.stderr,
                "higher_is_better": one.higher_is_better,
            }
            tasks.setdefault(one.task, {})[one.metric] = entry
        return {
            "model": self.model,
            "tasks": tasks,
            "samples": self.raw.get("n-samples", {}),
            "versions": self.raw.get("versions", {}),
            "fewshot": self.raw.get("n-shot", {}),
        }


def resolve_tasks(names: Sequence[str]) -> list[str | TaskConfig]:
    """Return the harness tasks for task files, "builtin" (the skills of the embedded model) and names of tasks.

    Raises
    ------
    InvalidInput
        If a file is not a task, two files have the same task name, or no task is given.
    """
    tasks: list[str | TaskConfig] = []
    for name in names:
        if name == "builtin":
            for skill, path in builtin.held_out_files().items():
                tasks.append(task_from_file(path) | {"task": f"{skill}_text"})
            for skill, path in builtin.question_files().items():
                tasks.append(task_from_file(path) | {"task": f"{skill}_questions"})
        elif Path(name).suffix in TASK_SUFFIXES:
            tasks.append(task_from_file(Path(name)))
        else:
            tasks.append(name)
    if not tasks:
        raise InvalidInput("no task given: give task files, builtin, or names of harness tasks")
    named = [task["task"] for task in tasks if isinstance(task, dict)]
    for name in named:
        if named.count(name) > 1:
            raise InvalidInput(f"two task files have a task called {name!r}: rename one")
    return tasks


def evaluate(
    models: Sequence[str], tasks: Sequence[str], options: HarnessOptions | None = None
) -> list[Evaluation]:
    """Evaluate checkpoints with lm-evaluation-harness.

    Parameters
    ----------
    models
        Checkpoint folders, Hub ids or "builtin".
    tasks
        See :func:`resolve_tasks`.
    options
        Options of the harness, and the device and dtype of the models.

    Returns
    -------
    list of Evaluation
        One per model.

    Raises
    ------
    InvalidInput
        If a model or task cannot be used, or a task tests a question that a model was made from.
    FbnPruneError
        If lm-evaluation-harness is missing or fails.
    """
    configs = resolve_tasks(tasks)
    return [_evaluate(model, configs, options or HarnessOptions()) for model in models]


def _evaluate(model: str, tasks: Sequence[str | TaskConfig], options: HarnessOptions) -> Evaluation:
    checkpoint = open_any(builtin.path_or_id(model))
    seen = recorded_fingerprints(checkpoint.path)
    require_unseen_lines(checkpoint.path, seen, tasks)
    loaded = load_tasks(tasks)
    require_unseen_documents(checkpoint.path, seen, loaded["tasks"])
    dtype = torch.float32 if options.dtype == "auto" else getattr(torch, options.dtype)
    loaded_model = checkpoint.load_model(chosen_device(options.device), dtype)
    check_runs(live_adapter(loaded_model, checkpoint.family), checkpoint.path)
    raw = _run(loaded_model, checkpoint.load_tokenizer(), _top_level(loaded), options)
    return Evaluation(model, _figures(raw), raw)


def measure_on_tasks(
    names: Sequence[str], options: HarnessOptions
) -> Callable[[Any], Callable[[PreTrainedModel], TaskFigures]]:
    """Load tasks once, and return what measures models on them repeatedly, as an ablation does.

    Parameters
    ----------
    names
        See :func:`resolve_tasks`; the tasks of a group are measured one by one.
    options
        Options of the harness.

    Returns
    -------
    callable
        Takes a tokenizer, and returns a function from a model to its metrics by task, without standard errors.

    Raises
    ------
    InvalidInput, FbnPruneError
        See :func:`resolve_tasks` and :func:`evaluate`.
    """
    # Loading data sets draws progress bars even without a terminal.
    with redirect_stderr(io.StringIO()):
        loaded = load_tasks(resolve_tasks(names))["tasks"]

    def with_tokenizer(tokenizer: Any) -> Callable[[PreTrainedModel], TaskFigures]:
        def measure(model: PreTrainedModel) -> TaskFigures:
            # The harness prints, and draws progress bars even without a terminal.
            with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
                raw = _measure(model, tokenizer, loaded, options)
            figures: TaskFigures = {}
            for one in _figures(raw):
                figures.setdefault(one.task, {})[one.metric] = one.value
            return figures

        return measure

    return with_tokenizer


def _run(
    model: PreTrainedModel, tokenizer: Any, tasks: Sequence[Any], options: HarnessOptions
) -> dict[str, Any]:
    """Run the harness on a loaded model and return its complete result."""
    from lm_eval import simple_evaluate

    wrapped = _wrapped(model, tokenizer, options)
    with _one_line_errors(wrapped.max_length):
        raw = simple_evaluate(
            model=wrapped,
            tasks=list(tasks),
            num_fewshot=options.fewshot,
            limit=options.limit,
            log_samples=options.log_samples,
            bootstrap_iters=BOOTSTRAPS,
            task_manager=task_manager(defaults=False),
        )
    assert raw is not None
    return dict(raw)


def _measure(
    model: PreTrainedModel, tokenizer: Any, tasks: dict[str, Task], options: HarnessOptions
) -> dict[str, Any]:
    """Return the metrics only; a complete run also describes the machine, which takes seconds."""
    from lm_eval.evaluator import evaluate as evaluate_tasks

    for task in tasks.values():
        of_task = task.get_config("num_fewshot")
        shots = of_task if options.fewshot is None or of_task == 0 else options.fewshot
        task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    wrapped = _wrapped(model, tokenizer, options)
    with _one_line_errors(wrapped.max_length):
        raw = evaluate_tasks(
            lm=wrapped,
            task_dict={"tasks": tasks},
            limit=options.limit,
            bootstrap_iters=0,
            log_samples=False,
        )
    assert raw is not None
    return dict(raw)


def _wrapped(model: PreTrainedModel, tokenizer: Any, options: HarnessOptions) -> Any:
    from lm_eval.models.huggingface import HFLM

    batch_size = options.batch_size
    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=int(batch_size) if batch_size.isdigit() else batch_size,
        max_length=options.max_length,
    )


@contextmanager
def _one_line_errors(max_length: int) -> Iterator[None]:
    """Turn the exceptions of the harness into one-line errors."""
    try:
        yield
    except (OSError, ConnectionError, ValueError, KeyError) as error:
        line = " ".join(str(error).split())
        raise FbnPruneError(f"the harness failed: {line[:300]}") from error
    except AssertionError as error:
        # The harness asserts, without a message, that no answer is longer than the model's context.
        raise FbnPruneError(
            f"the harness refuses a question: is an answer longer than the model's {max_length} tokens? "
            "--max-length raises this limit if the model allows it"
        ) from error


def _top_level(loaded: dict[str, Any]) -> list[Any]:
    """Return the outermost groups, which contain their tasks, and the tasks that are in no group."""
    groups: dict[str, Any] = loaded.get("groups") or {}
    inner = {name for children in (loaded.get("group_map") or {}).values() for name in children}
    grouped = {task.task_name for group in groups.values() for task in group.get_all_tasks()}
    outer = [group for name, group in groups.items() if name not in inner]
    return [*outer, *(task for name, task in loaded["tasks"].items() if name not in grouped)]


def _figures(raw: Any) -> list[Figure]:
    figures = []
    for task, metrics in raw["results"].items():
        better = raw.get("higher_is_better", {}).get(task, {})
        for key, value in metrics.items():
            metric, comma, of = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = metrics.get(f"{metric}_stderr,{of}")
            known = isinstance(error, (int, float)) and not math.isnan(error)
            name = metric if of == "none" else f"{metric} ({of})"
            figures.append(
                Figure(
                    task, name, float(value), float(error) if known else None, better.get(metric)
                )
            )
    return figures


def require_unseen_lines(
    checkpoint: Path, seen: set[str], tasks: Sequence[str | TaskConfig]
) -> None:
    """Refuse local task files with questions that the checkpoint was made from, before anything is loaded.

    Raises
    ------
    InvalidInput
        If a task file contains such a question.
    """
    for path in (path for task in tasks if seen for path in _test_files(task)):
        asked = _questions(path)
        known = sum(fingerprint(question) in seen for question in asked)
        if known:
            raise InvalidInput(
                f"{known} of {counted(len(asked), 'question')} of {path} are examples that {checkpoint} "
                "was made from: give other questions"
            )


def require_unseen_documents(checkpoint: Path, seen: set[str], tasks: dict[str, Task]) -> None:
    """Refuse tasks of any kind with test documents that the checkpoint was made from.

    Raises
    ------
    InvalidInput
        If a task tests such a question.
    """
    for name, task in tasks.items() if seen else ():
        asked = [document_question(task, doc) for doc in task.eval_docs]
        known = sum(fingerprint(question) in seen for question in asked)
        if known:
            raise InvalidInput(
                f"{known} of {counted(len(asked), 'question')} of task {name} are examples that {checkpoint} "
                "was made from: give other questions"
            )


def _test_files(task: str | TaskConfig) -> list[Path]:
    """Return the local JSON-lines files with the test questions of a task."""
    if isinstance(task, str) or task.get("dataset_path") != "json":
        return []
    files = (task.get("dataset_kwargs") or {}).get("data_files") or {}
    split = task.get("test_split") or task.get("validation_split")
    listed = files.get(split, []) if isinstance(files, dict) else files
    return [
        Path(one)
        for one in (listed if isinstance(listed, list) else [listed])
        if Path(one).is_file()
    ]


def _questions(path: Path) -> list[str]:
    with path.open(encoding="utf-8") as file:
        records = [json.loads(line) for line in file if line.strip()]
    return [asked for record in records if (asked := question_of(record)) is not None]
