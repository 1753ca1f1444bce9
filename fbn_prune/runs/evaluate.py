"""Runs of lm-evaluation-harness on checkpoints, pruned or not, one beside the other."""

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
from fbn_prune.errors import FbnPruneError, InvalidInput
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.networks.intervention_effects import TaskFigures

if TYPE_CHECKING:
    from lm_eval.api.task import Task

BOOTSTRAPS = 100_000
"""Resamples behind the standard errors that have no closed form: the harness's own default, so that its figures come
out the same."""

FEWSHOT_SEED = 1234
"""The harness's own default, so that it shows the same examples."""


@dataclass(frozen=True)
class HarnessOptions:
    """The harness's own options; see its documentation."""

    limit: float | None = None
    fewshot: int | None = None
    batch_size: str = "8"
    log_samples: bool = False
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    max_length: int | None = None


@dataclass(frozen=True)
class Figure:
    """One metric of one task; `stderr` is None where the harness has none."""

    task: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool | None


@dataclass(frozen=True)
class Evaluation:
    """A model's figures, and the harness's whole result."""

    model: str
    figures: list[Figure]
    raw: dict[str, Any] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
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
    """Harness tasks for what the user named: files, `builtin` for the embedded model's skills, standard names.

    Raises
    ------
    InvalidInput
        A file that is no task, or nothing named.
    """
    tasks: list[str | TaskConfig] = []
    for name in names:
        if name == "builtin":
            for skill, path in builtin.held_out_files().items():
                tasks.append(task_from_file(path) | {"task": f"{skill}_text"})
            for skill, path in builtin.question_files().items():
                tasks.append(task_from_file(path) | {"task": f"{skill}_questions"})
        elif Path(name).suffix in (".jsonl", ".txt", ".yaml", ".yml"):
            tasks.append(task_from_file(Path(name)))
        else:
            tasks.append(name)
    if not tasks:
        raise InvalidInput("no task named: give task files, builtin, or names of the harness")
    named = [task["task"] for task in tasks if isinstance(task, dict)]
    for name in named:
        if named.count(name) > 1:
            raise InvalidInput(f"two task files give a task called {name!r}: rename one")
    return tasks


def evaluate(model: str, tasks: Sequence[str | TaskConfig], options: HarnessOptions) -> Evaluation:
    """Run the harness on a checkpoint (a folder, a hub id, or `builtin`).

    Raises
    ------
    InvalidInput
        The checkpoint cannot be read, a task is unknown, or a test question was among the examples the checkpoint
        was made from.
    FbnPruneError
        lm-evaluation-harness is not installed, or a task cannot be loaded.
    """
    checkpoint = Checkpoint.open(str(builtin.model_path()) if model == "builtin" else model)
    seen = recorded_fingerprints(checkpoint.path)
    require_unseen_lines(checkpoint.path, seen, tasks)
    loaded = load_tasks(tasks)
    require_unseen_documents(checkpoint.path, seen, loaded["tasks"])
    bench = checkpoint.load_model(torch.device(options.device), options.dtype)
    raw = _run(bench, checkpoint.load_tokenizer(), _top_level(loaded), options)
    return Evaluation(model, _figures(raw), raw)


def measure_on_tasks(
    names: Sequence[str], options: HarnessOptions
) -> Callable[[Any], Callable[[PreTrainedModel], TaskFigures]]:
    """What measures a model on tasks again and again, as an ablation does; tasks are loaded once, here.

    Parameters
    ----------
    names
        As for :func:`resolve_tasks`; of a group each of its tasks is measured.

    Returns
    -------
    From a tokenizer to a function of the model, which gives metrics by task without standard errors.

    Raises
    ------
    InvalidInput, FbnPruneError
        As :func:`resolve_tasks` and :func:`evaluate`.
    """
    with redirect_stderr(io.StringIO()):  # what reads data sets draws bars wherever it runs
        loaded = load_tasks(resolve_tasks(names))["tasks"]

    def with_tokenizer(tokenizer: Any) -> Callable[[PreTrainedModel], TaskFigures]:
        def measure(model: PreTrainedModel) -> TaskFigures:
            # It draws bars and prints wherever it runs.
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
    """One whole run of the harness on a loaded model."""
    from lm_eval import simple_evaluate

    wrapped = _wrapped(model, tokenizer, options)
    with _said_in_a_line(wrapped.max_length):
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
    """The figures alone. A whole run describes the machine as well, which takes seconds each time."""
    from lm_eval.evaluator import evaluate as evaluate_tasks

    for task in tasks.values():
        of_task = task.get_config("num_fewshot")
        shots = of_task if options.fewshot is None or of_task == 0 else options.fewshot
        task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    wrapped = _wrapped(model, tokenizer, options)
    with _said_in_a_line(wrapped.max_length):
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
        device=options.device,
        max_length=options.max_length,
    )


@contextmanager
def _said_in_a_line(max_length: int) -> Iterator[None]:
    """Turn what the harness raises into one line."""
    try:
        yield
    except (OSError, ConnectionError, ValueError, KeyError) as error:
        line = " ".join(str(error).split())
        raise FbnPruneError(f"the harness failed: {line[:300]}") from error
    except AssertionError as error:
        # It asserts, without a word, that no answer is longer than the model's context.
        raise FbnPruneError(
            f"the harness refuses a question: is an answer longer than the {max_length} tokens that the "
            "model takes? --max-length raises that where the model allows it"
        ) from error


def _top_level(loaded: dict[str, Any]) -> list[Any]:
    """Groups, which bring their own tasks and figures, and the tasks that are in none."""
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
    """Refuse to test a checkpoint on lines of local files that it was made from, before anything is loaded.

    Raises
    ------
    InvalidInput
        A line of a local task file asks what an example of the checkpoint asked.
    """
    for path in (path for task in tasks if seen for path in _test_files(task)):
        asked = _questions(path)
        known = sum(fingerprint(question) in seen for question in asked)
        if known:
            raise InvalidInput(
                f"{known} of {len(asked)} questions of {path} are examples that {checkpoint} "
                "was made from: test on others"
            )


def require_unseen_documents(checkpoint: Path, seen: set[str], tasks: dict[str, Task]) -> None:
    """The same for the documents that tasks of any kind are tested on.

    Raises
    ------
    InvalidInput
        A task asks what an example of the checkpoint asked.
    """
    for name, task in tasks.items() if seen else ():
        asked = [document_question(task, doc) for doc in task.eval_docs]
        known = sum(fingerprint(question) in seen for question in asked)
        if known:
            raise InvalidInput(
                f"{known} of {len(asked)} questions of task {name} are examples that {checkpoint} "
                "was made from: test on others"
            )


def _test_files(task: str | TaskConfig) -> list[Path]:
    """Local JSON-lines files that a task is tested on."""
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
