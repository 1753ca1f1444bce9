"""Harness tasks made from local files, which need no network.

A JSON-lines file is recognised by the fields of its lines (the first tells): questions with choices as ARC, OpenBookQA,
PIQA, SciQ and WinoGrande publish them, or as ``{"question", "choices": [...], "answer": index or text}``; LAMBADA's
``{"context", "continuation"}``; ``{"question", "answer"}`` to be answered exactly; and ``{"text"}``, of which the
perplexity is taken, as of a .txt file. Prompts are those of the harness's own tasks of these names. A .yaml file is a
task of the harness as it stands.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fbn_prune.data.harness_tasks import TaskConfig, task_from_yaml
from fbn_prune.errors import InvalidInput

ANSWER_TOKENS = 48
"""Tokens generated for an exact answer at most; it ends with the line."""

_ACCURACY = [
    {"metric": name, "aggregation": "mean", "higher_is_better": True}
    for name in ("acc", "acc_norm")
]


def task_from_file(path: Path) -> TaskConfig:
    """The harness task for a .jsonl, .txt or .yaml file.

    Raises
    ------
    InvalidInput
        The file is missing, of another kind, or its lines have fields that fit no kind of task.
    """
    if not path.is_file():
        raise InvalidInput(f"task file {path} does not exist")
    if path.suffix in (".yaml", ".yml"):
        return task_from_yaml(path)
    source: TaskConfig = {"task": path.stem, "test_split": "test"}
    if path.suffix == ".txt":
        return source | _text_data(path) | _perplexity()
    if path.suffix != ".jsonl":
        raise InvalidInput(f"task file {path}: write a .jsonl, .txt or .yaml file")
    fields = _first_record(path)
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path.resolve())}}}
    for needed, config in _KINDS:
        if needed <= fields.keys():
            return source | data | config(fields)
    raise InvalidInput(
        f"{path}: no kind of task has the fields {', '.join(sorted(fields))}; "
        "question and answer, question, choices and answer, or text would do"
    )


def _first_record(path: Path) -> dict[str, Any]:
    with path.open(encoding="utf-8") as file:
        line = next((line for line in file if line.strip()), "")
    try:
        record = json.loads(line)
    except ValueError:
        raise InvalidInput(f"{path}: its first line is not JSON") from None
    if not isinstance(record, dict):
        raise InvalidInput(f"{path}: its first line is no JSON object")
    return record


def _text_data(path: Path) -> TaskConfig:
    return {
        "dataset_path": "text",
        "dataset_kwargs": {
            "data_files": {"test": str(path.resolve())},
            "sample_by": "document",
        },
    }


def _perplexity() -> TaskConfig:
    names = {
        "word_perplexity": "weighted_perplexity",
        "byte_perplexity": "weighted_perplexity",
        "bits_per_byte": "bits_per_byte",
    }
    return {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {"metric": name, "aggregation": how, "higher_is_better": False}
            for name, how in names.items()
        ],
    }


def _choices(text: str, choices: str, target: str | int) -> TaskConfig:
    return {
        "output_type": "multiple_choice",
        "doc_to_text": text,
        "doc_to_choice": choices,
        "doc_to_target": target,
        "metric_list": _ACCURACY,
    }


def _published_choices(fields: dict[str, Any]) -> TaskConfig:
    text = "Question: {{question}}\nAnswer:" if "question" in fields else "{{question_stem}}"
    return _choices(text, "{{choices.text}}", "{{choices.label.index(answerKey)}}")


def _plain_choices(fields: dict[str, Any]) -> TaskConfig:
    target = "{{answer}}" if isinstance(fields["answer"], int) else "{{choices.index(answer)}}"
    return _choices("Question: {{question}}\nAnswer:", "{{choices}}", target)


def _piqa(fields: dict[str, Any]) -> TaskConfig:
    return _choices("Question: {{goal}}\nAnswer:", "{{[sol1, sol2]}}", "{{label}}")


def _sciq(fields: dict[str, Any]) -> TaskConfig:
    return _choices(
        "{{support.lstrip()}}\nQuestion: {{question}}\nAnswer:",
        "{{[distractor1, distractor2, distractor3, correct_answer]}}",
        3,
    )


def _winogrande(fields: dict[str, Any]) -> TaskConfig:
    config = _choices(
        "{{['1', '2'].index(answer)}}",
        "{{[sentence.split('_', 1)[0] + option1, sentence.split('_', 1)[0] + option2]}}",
        "{{sentence.split('_', 1)[1].strip()}}",
    )
    return config | {"metric_list": _ACCURACY[:1]}


def _lambada(fields: dict[str, Any]) -> TaskConfig:
    return {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{' ' + continuation}}",
        "target_delimiter": "",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    }


def _exact(fields: dict[str, Any]) -> TaskConfig:
    return {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer.strip()}}",
        "target_delimiter": "",
        "fewshot_delimiter": "\n",
        "generation_kwargs": {
            "until": ["\n"],
            "do_sample": False,
            "max_gen_toks": ANSWER_TOKENS,
        },
        "filter_list": [
            {
                "name": "none",
                "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }


_KINDS: list[tuple[set[str], Callable[[dict[str, Any]], TaskConfig]]] = [
    ({"choices", "answerKey", "question"}, _published_choices),
    ({"choices", "answerKey", "question_stem"}, _published_choices),
    ({"choices", "answer", "question"}, _plain_choices),
    ({"goal", "sol1", "sol2", "label"}, _piqa),
    ({"distractor1", "distractor2", "distractor3", "correct_answer", "support"}, _sciq),
    ({"sentence", "option1", "option2", "answer"}, _winogrande),
    ({"context", "continuation"}, _lambada),
    ({"question", "answer"}, _exact),
    ({"text"}, lambda fields: _perplexity()),
]
"""Fields of a line -> task; the first that fits is taken."""
