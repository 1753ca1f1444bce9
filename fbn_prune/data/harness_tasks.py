"""Load tasks of lm-evaluation-harness by name or from a YAML file, and read their examples and test questions.

The harness is an optional dependency, imported when a task is named. A document's question excludes the prompt around
it, so that it equals the same question in a local file.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fbn_prune.data.examples import Example, question_of
from fbn_prune.errors import FbnPruneError, InvalidInput

if TYPE_CHECKING:
    from lm_eval.api.task import Task

TaskConfig = dict[str, Any]
"""The harness's definition of a task: the content of one of its YAML files."""

_MISSING = "lm-evaluation-harness is missing: pip install 'fbn-prune[eval]'"


def task_from_yaml(path: Path) -> TaskConfig:
    """Return the task definition in a YAML file, with its includes resolved.

    Raises
    ------
    InvalidInput
        The file is missing, is not YAML, or names no task.
    FbnPruneError
        lm-evaluation-harness is not installed.
    """
    try:
        from lm_eval.tasks._yaml_loader import load_yaml
    except ImportError:
        raise FbnPruneError(_MISSING) from None
    if not path.is_file():
        raise InvalidInput(f"task file {path} does not exist: give one that does")
    try:
        config = load_yaml(path, resolve_func=True)
    except (yaml.YAMLError, OSError, ValueError) as error:
        line = " ".join(str(error).split())
        raise InvalidInput(f"task file {path} cannot be read, correct it: {line}") from None
    if not isinstance(config, dict) or "task" not in config:
        raise InvalidInput(f"task file {path} names no task: give it a key `task`")
    return dict(config)


def require_known(names: Sequence[str]) -> None:
    """Refuse names that the installed harness does not know, without loading data.

    Raises
    ------
    InvalidInput
        A name is not a task, group or tag of the harness.
    FbnPruneError
        lm-evaluation-harness is not installed.
    """
    known = set(task_manager(defaults=True).all_tasks) if names else set()
    for name in names:
        if name not in known:
            raise InvalidInput(
                f"{name!r} is neither a task of lm-evaluation-harness nor a file; `lm-eval ls tasks` lists them"
            )


def load_tasks(tasks: Sequence[str | TaskConfig]) -> dict[str, Any]:
    """Load tasks with their data: a dict with `tasks` by name and the `groups` they belong to.

    Raises
    ------
    InvalidInput
        The harness does not know a name.
    FbnPruneError
        A task's data cannot be loaded, or lm-evaluation-harness is not installed.
    """
    names = [task for task in tasks if isinstance(task, str)]
    require_known(names)
    manager = task_manager(defaults=bool(names))
    try:
        return dict(manager.load(list(tasks)))
    except Exception as error:  # the Hub, the network and the files raise many types of error
        line = " ".join(str(error).split())
        shown = ", ".join(task if isinstance(task, str) else task["task"] for task in tasks)
        raise FbnPruneError(f"cannot load {shown}: {line[:300]}") from error


@cache
def task_manager(*, defaults: bool) -> Any:
    """Return an index of tasks: the harness's own if `defaults`, which takes seconds to read, else an empty one.

    Raises
    ------
    FbnPruneError
        lm-evaluation-harness is not installed.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise FbnPruneError(_MISSING) from None
    # The harness logs advice for authors of tasks, which does not concern users of existing ones.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_defaults=defaults)


def training_and_test(name: str) -> tuple[list[Example], list[Example]]:
    """Return the examples of a task's training split, and those of its validation and test splits.

    Parameters
    ----------
    name
        The harness's name of the task, or a YAML file.

    Raises
    ------
    InvalidInput
        The task is unknown, is a group, or has no training split.
    FbnPruneError
        Its data cannot be loaded, or lm-evaluation-harness is not installed.
    """
    of_file = Path(name).suffix in (".yaml", ".yml")
    loaded = load_tasks([task_from_yaml(Path(name)) if of_file else name])["tasks"]
    if len(loaded) != 1:
        shown = ", ".join(sorted(loaded)[:5])
        raise InvalidInput(f"{name!r} stands for {len(loaded)} tasks: name one of them ({shown})")
    (task,) = loaded.values()
    if not task.has_training_docs():
        raise InvalidInput(f"task {name!r} has no training split: give examples in a file")
    training = _examples(task, task.training_docs())
    if not training:
        raise InvalidInput(f"the training split of task {name!r} is empty: give examples in a file")
    test: list[Example] = []
    if task.has_validation_docs():
        test += _examples(task, task.validation_docs())
    if task.has_test_docs():
        test += _examples(task, task.test_docs())
    return training, test


def document_question(task: Task, doc: Any) -> str:
    """Return a document's question: the value of a known field, or the whole prompt if there is none."""
    known = question_of(doc) if isinstance(doc, dict) else None
    if known is not None:
        return known
    prompt = task.doc_to_text(doc)
    # In tasks like WinoGrande the prompt is the index of a choice.
    return prompt if isinstance(prompt, str) and prompt.strip() else example_text(task, doc)


def example_text(task: Task, doc: Any) -> str:
    """Return a document as the harness shows it in a few-shot prompt: question, delimiter, right answer, line end."""
    prompt, target = task.doc_to_text(doc), task.doc_to_target(doc)
    has_choices = getattr(task.config, "doc_to_choice", None) is not None
    choices = task.doc_to_choice(doc) if has_choices else None
    delimiter = getattr(task.config, "target_delimiter", "")
    if isinstance(target, list):
        target = target[0]
    if choices is not None and isinstance(prompt, int):
        return f"{choices[prompt]}{delimiter}{target}\n"
    if choices is not None and isinstance(target, int):
        target = choices[target]
    return f"{prompt}{delimiter if prompt else ''}{target}\n"


def _examples(task: Task, docs: Iterable[Any]) -> list[Example]:
    return [Example(example_text(task, doc), document_question(task, doc)) for doc in docs]
