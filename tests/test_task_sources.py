"""Claims about tasks from the harness and from the embedded model: what is drawn, what is never drawn, what is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_runs import refused, run_json

pytest.importorskip("lm_eval")

from fbn_prune.cli.main import _exit_code
from fbn_prune.data.examples import Example, TestQuestions, fingerprint, recorded_fingerprints
from fbn_prune.data.harness_tasks import require_known, training_and_test
from fbn_prune.data.tasks import Task
from fbn_prune.errors import FbnPruneError, InvalidInput

STANDARD = ["arc_easy", "piqa", "lambada_openai", "hellaswag", "mmlu", "gsm8k"]


def lines(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def sums(numbers: range) -> list[dict[str, Any]]:
    return [{"question": f"{i}+{i}=", "answer": str(2 * i)} for i in numbers]


EXACT = {
    "output_type": "generate_until",
    "doc_to_text": "Add: {{question}}",
    "doc_to_target": "{{answer}}",
    "target_delimiter": " ",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def task_file(
    folder: Path, name: str, splits: dict[str, list[dict[str, Any]]], **config: Any
) -> Path:
    """A task of the harness over local JSON lines, as a user writes one."""
    files = {split: lines(folder / f"{name}-{split}.jsonl", splits[split]) for split in splits}
    content = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        **{{"train": "training_split"}.get(split, f"{split}_split"): split for split in splits},
        **config,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def adding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty sums to train on, of which five are test questions and two are validation questions."""
    splits = {
        "train": sums(range(30)),
        "validation": sums(range(28, 34)),
        "test": sums(range(25, 28)),
    }
    splits["test"] += [{"question": "3 + 3 =", "answer": "6"}, {"question": "7+7=", "answer": "14"}]
    splits["train"][3]["question"] = "3 + 3 ="
    return task_file(tmp_path_factory.mktemp("tasks"), "adding", splits, **EXACT)


def test_a_training_split_gives_examples_as_the_harness_shows_them(adding: Path) -> None:
    training, test = training_and_test(str(adding))
    assert len(training) == 30
    assert training[1] == Example("Add: 1+1= 2\n", "1+1=")
    assert {one.question for one in test} == {f"{i}+{i}=" for i in (7, *range(25, 34))} | {
        "3 + 3 ="
    }


def test_choices_are_answered_and_questions_are_found_whatever_the_prompt(tmp_path: Path) -> None:
    choices = {
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
    }
    records = [{"question": "Up?", "choices": ["yes", "no"], "answer": 1}]
    path = task_file(tmp_path, "choosing", {"train": records, "test": records}, **choices)
    training, _ = training_and_test(str(path))
    assert training == [Example("Question: Up?\nAnswer: no\n", "Up?")]
    schema = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{label}}",
        "doc_to_choice": "{{['He saw ' + one, 'He saw ' + two]}}",
        "doc_to_target": "leave.",
    }
    schemas = [{"one": "her", "two": "him", "label": 1}]
    path = task_file(tmp_path, "schemas", {"train": schemas, "test": schemas}, **schema)
    training, _ = training_and_test(str(path))
    assert training[0].text == "He saw him leave.\n"
    assert training[0].question == training[0].text


def test_no_test_question_is_ever_drawn(adding: Path) -> None:
    """Whatever the seed, and though the split holds some: by another spelling too."""
    for seed in range(5):
        task = Task.read(f"lm_eval:{adding}", None, drawn=1000, seed=seed)
        assert len(task.examples) == 30 - 7
        assert task.passed_over == 7
        asked = TestQuestions(task.test)
        assert not any(asked.in_example(example) for example in task.examples)
    few = Task.read(f"lm_eval:{adding}", None, drawn=4, seed=0)
    assert len(few.examples) == 4
    assert few.examples == Task.read(f"lm_eval:{adding}", None, drawn=4, seed=0).examples
    assert few.examples != Task.read(f"lm_eval:{adding}", None, drawn=4, seed=1).examples


def test_questions_of_a_file_are_kept_out_beside_the_tasks_own(
    adding: Path, tmp_path: Path
) -> None:
    more = Path(lines(tmp_path / "more.jsonl", sums(range(10, 12))))
    task = Task.read(f"lm_eval:{adding}", more, drawn=1000, seed=0)
    assert {"10+10=", "11+11="}.isdisjoint({one.question for one in task.examples})
    assert len(task.examples) == 30 - 9


def test_a_skills_examples_hold_none_of_its_questions() -> None:
    task = Task.read("builtin:arithmetic", None, drawn=6, seed=0)
    assert len(task.examples) == 6
    assert len(task.test) == 200
    together = "\n".join(example.text for example in task.examples)
    assert not any(one.question in together for one in task.test)


def test_an_example_file_that_holds_a_test_question_in_its_text_is_refused(tmp_path: Path) -> None:
    seen = [{"text": "We know that 3+3=6 and more."}]
    examples = lines(tmp_path / "examples.jsonl", [{"text": "nothing"}, *seen])
    test = Path(lines(tmp_path / "test.jsonl", sums(range(3, 5))))
    with pytest.raises(InvalidInput, match=r"example 2 of .* is or contains a test question"):
        Task.read(examples, test, drawn=9, seed=0)


@pytest.mark.parametrize(
    ("splits", "name", "message"),
    [
        ({"test": sums(range(3))}, None, "no training split"),
        ({"train": sums(range(3)), "test": sums(range(3))}, None, "every example"),
        ({"test": sums(range(3))}, "nowhere.yaml", "nowhere.yaml"),
    ],
)
def test_a_task_that_gives_no_example_is_refused(
    splits: dict[str, list[dict[str, Any]]], name: str | None, message: str, tmp_path: Path
) -> None:
    path = task_file(tmp_path, "wrong", splits, **EXACT)
    with pytest.raises(InvalidInput, match=message):
        Task.read(f"lm_eval:{name or path}", None, drawn=3, seed=0)


def test_data_that_cannot_be_loaded_is_said_in_one_line(tmp_path: Path) -> None:
    path = task_file(tmp_path, "gone", {"train": sums(range(3)), "test": sums(range(3))}, **EXACT)
    (tmp_path / "gone-train.jsonl").unlink()
    with pytest.raises(FbnPruneError, match="cannot load gone"):
        training_and_test(str(path))


def test_the_harness_knows_its_standard_tasks_by_name_without_loading_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("data were loaded")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    require_known(STANDARD)
    with pytest.raises(InvalidInput, match="'arc_eazy'"):
        require_known([*STANDARD, "arc_eazy"])
    with pytest.raises(InvalidInput, match="no_such_task_at_all"):
        Task.read("lm_eval:no_such_task_at_all", None, drawn=3, seed=0)


def test_a_run_for_a_task_of_the_harness_is_not_tested_on_what_it_saw(
    adding: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = lines(
        tmp_path / "text.jsonl",
        [{"text": f"{i} pears and {i + 1} apples, and 7+7=14 plums."} for i in range(150)]
        + [{"text": f"{i} pears and {i + 1} apples, and no plums."} for i in range(150)],
    )
    output = tmp_path / "out"
    small = "--tokens 9000 --network-tokens 600 --networks 6 --keep-networks 2 --context 48"
    command = ["--model", str(tiny), "--calibration", text, "--output", str(output)]
    task = ["--task", f"lm_eval:{adding}", "--task-examples", "9"]
    result = run_json(capsys, *command, *small.split(), *task)["task"]
    assert (result["file"], result["examples"]) == (f"lm_eval:{adding}", 9)
    assert result["left_out"] > 0
    assert result["test_perplexity_after"] > 0
    seen = recorded_fingerprints(output)
    assert len(seen) == 9
    training, test = training_and_test(str(adding))
    assert seen <= {one.fingerprint for one in training}
    assert not seen & {one.fingerprint for one in test}
    config = yaml.safe_load(adding.read_text())
    peeking = adding.with_name("peeking.yaml")
    peeking.write_text(yaml.safe_dump(config | {"task": "peeking", "test_split": "train"}))
    evaluate = ["evaluate", "--model", str(output), "--limit", "1", "--tasks"]
    refused(capsys, [*evaluate, str(peeking)], "9 of 30 questions")
    assert _exit_code([*evaluate, str(adding)]) == 0


def test_a_question_is_the_same_in_a_file_and_in_a_task_of_the_harness(adding: Path) -> None:
    training, _ = training_and_test(str(adding))
    assert training[1].fingerprint == fingerprint(" 1+1= ")
