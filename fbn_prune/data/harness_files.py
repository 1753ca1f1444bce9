"""Make tasks of lm-evaluation-harness from local files, without a network.

The fields of a JSON-lines file's first line decide the kind of task: multiple choice in the formats of ARC, OpenBookQA,
PIQA, SciQ and WinoGrande, or as ``{"question", "choices": [...], "answer": index or text}``; LAMBADA's
``{"context", "continuation"}``; ``{"question", "answer"}`` with exact match; and ``{"text"}``, like a .txt file, for
perplexity. The prompts are those of the harness's own tasks. A .yaml file is a task definition of the harness.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fbn_prune.data.file_kinds import kind_of_name, open_file
from fbn_prune.data.harness_tasks import TaskConfig, task_from_yaml
from fbn_prune.data.records import read_records
from fbn_prune.errors import InvalidInput

ANSWER_TOKENS = 48
"""Most tokens generated for an exact answer, which ends at the line end."""

_ACCURACY = [
    {"metric": name, "aggregation": "mean", "higher_is_better": True}
    for name in ("acc", "acc_norm")
]


def task_from_file(path: Path) -> TaskConfig:
    """Return the harness's config of a task for a .jsonl, .txt or .yaml file.

    Raises
    ------
    InvalidInput
        The file is missing or of another type, or its fields fit no kind of task.
    """
    if not path.is_file():
        raise InvalidInput(f"task file {path} does not exist: give one that does")
    if path.suffix in (".yaml", ".yml"):
        return task_from_yaml(path)
    source: TaskConfig = {"task": path.stem, "test_split": "test"}
    if path.suffix.lower() == ".txt":
        return source | _text_data(path) | _perplexity()
    if kind_of_name(path) != "json":
        raise InvalidInput(
            f"task file {path}: must be a .jsonl, .json, .txt or .yaml file; convert it to one of them"
        )
    fields = _first_record(path)
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path.resolve())}}}
    for needed, config in _KINDS:
        if needed <= fields.keys():
            return source | data | config(fields)
    raise InvalidInput(
        f"{path}: no kind of task has the fields {', '.join(sorted(fields))}; "
        "use for example question and answer, question, choices and answer, or text"
    )


def _first_record(path: Path) -> dict[str, Any]:
    with open_file(path, f"task file {path}") as file:
        records = read_records(file, is_record=lambda record: True)
        where, record = next(records, (f"task file {path}", None))
        records.close()
    if not isinstance(record, dict):
        raise InvalidInput(f"{where}: not a JSON object; give one question a line")
    return record


def _text_data(path: Path) -> TaskConfig:
    return {
        "dataset_path": "text",
        "dataset_kwargs": {"data_files": {"test": str(path.resolve())}, "sample_by": "document"},
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
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": ANSWER_TOKENS},
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
"""(Required fields, task); the first entry whose fields are all present applies."""
