"""Runs of lm-evaluation-harness on checkpoints, pruned or not, one beside the other."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fbn_eval.task_files import TaskConfig, question_of, task_from_file
from fbn_prune import builtin
from fbn_prune.errors import FbnPruneError, InvalidInput
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.task_data import fingerprint, recorded_fingerprints

BOOTSTRAPS = 100_000
"""Resamples behind the standard errors that have no closed form: the harness's own default, so that its figures come
out the same."""


@dataclass(frozen=True)
class HarnessOptions:
    """The harness's own options; see its documentation."""

    limit: float | None = None
    fewshot: int | None = None
    batch_size: str = "8"
    log_samples: bool = False
    device: str = "cpu"
    dtype: torch.dtype = torch.float32


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
    # Its advice on how to write tasks, and on being handed a loaded model, is none for users of ready tasks.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise FbnPruneError(
            "lm-evaluation-harness is missing: pip install 'fbn-prune[eval]'"
        ) from None
    checkpoint = Checkpoint.open(str(builtin.model_path()) if model == "builtin" else model)
    require_unseen_questions(checkpoint.path, tasks)
    manager = TaskManager(include_defaults=any(isinstance(task, str) for task in tasks))
    for task in tasks:
        if isinstance(task, str) and not manager.match_tasks([task]):
            raise InvalidInput(f"the harness knows no task {task!r}, and there is no such file")
    device = torch.device(options.device)
    loaded = HFLM(
        pretrained=checkpoint.load_model(device, options.dtype),
        tokenizer=checkpoint.load_tokenizer(),
        batch_size=int(options.batch_size) if options.batch_size.isdigit() else options.batch_size,
        device=options.device,
    )
    try:
        raw = simple_evaluate(
            model=loaded,
            tasks=list(tasks),
            num_fewshot=options.fewshot,
            limit=options.limit,
            log_samples=options.log_samples,
            bootstrap_iters=BOOTSTRAPS,
            task_manager=manager,
        )
    except (OSError, ConnectionError, ValueError, KeyError) as error:
        line = " ".join(str(error).split())
        raise FbnPruneError(f"the harness failed: {line[:300]}") from error
    assert raw is not None
    return Evaluation(model, _figures(raw), dict(raw))


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


def require_unseen_questions(checkpoint: Path, tasks: Sequence[str | TaskConfig]) -> None:
    """Refuse to test a checkpoint on questions that it was made from, as it records itself.

    Raises
    ------
    InvalidInput
        A line of a local task file asks what an example of the checkpoint asked.
    """
    seen = recorded_fingerprints(checkpoint)
    if not seen:
        return
    for task in tasks:
        for path in _data_files(task):
            asked = _questions(path)
            known = sum(fingerprint(question) in seen for question in asked)
            if known:
                raise InvalidInput(
                    f"{known} of {len(asked)} questions of {path} are examples that {checkpoint} "
                    "was made from: test on others"
                )


def _data_files(task: str | TaskConfig) -> list[Path]:
    if isinstance(task, str) or task.get("dataset_path") != "json":
        return []
    files = (task.get("dataset_kwargs") or {}).get("data_files") or {}
    listed = files.values() if isinstance(files, dict) else [files]
    flat = [one for entry in listed for one in (entry if isinstance(entry, list) else [entry])]
    return [Path(one) for one in flat if Path(one).is_file()]


def _questions(path: Path) -> list[str]:
    with path.open(encoding="utf-8") as file:
        records = [json.loads(line) for line in file if line.strip()]
    return [asked for record in records if (asked := question_of(record)) is not None]
