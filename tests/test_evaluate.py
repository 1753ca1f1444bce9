"""Claims about evaluation: the harness's own figures from local files, side by side, never on questions seen."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_runs import refused, run_json
from tiny_models import logits, make_tokenizer, save_tiny
from transformers import AutoModelForCausalLM

pytest.importorskip("lm_eval")

from fbn_prune.cli.main import _exit_code
from fbn_prune.data.examples import RECORD_NAME, Example, record
from fbn_prune.data.harness_files import task_from_file
from fbn_prune.errors import InvalidInput
from fbn_prune.runs.evaluate import Evaluation, Figure, resolve_tasks
from fbn_prune.runs.evaluation_card import with_evaluation

AB = {"text": ["1", "none"], "label": ["A", "B"]}
LINES: dict[str, list[dict[str, Any]]] = {
    "published": [
        {"question": f"Which is {i}?", "choices": AB, "answerKey": "AB"[i % 2]} for i in range(6)
    ],
    "stems": [{"question_stem": "One is", "choices": AB, "answerKey": "A"}],
    "plain": [
        {"question": "Up?", "choices": ["yes", "no", "so"], "answer": i % 3} for i in range(4)
    ],
    "named": [{"question": "Up?", "choices": ["yes", "no"], "answer": "no"}],
    "goals": [{"goal": "Boil water", "sol1": "heat it", "sol2": "cool it", "label": 0}],
    "science": [
        {"question": "Which?", "correct_answer": "d", "support": ""}
        | {f"distractor{i}": "abc"[i - 1] for i in (1, 2, 3)}
    ],
    "schemas": [
        {"sentence": "He saw her as _ left.", "option1": "he", "option2": "she", "answer": "2"}
    ],
    "last_words": [{"context": f"one two {i}", "continuation": "three"} for i in range(4)],
    "exact": [{"question": f"{i}+1=", "answer": str(i + 1)} for i in range(4)],
    "texts": [{"text": "some words of text"}, {"text": "and more of them"}],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tasks")
    paths = {}
    for name, lines in LINES.items():
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(line) + "\n" for line in lines))
    paths["words"] = folder / "words.txt"
    paths["words"].write_text("The words of a text, on two lines.\nThis is the second.\n")
    return paths


def plain_run(model: Path, configs: list[dict[str, Any]]) -> dict[str, Any]:
    """What the harness gives for these tasks without fbn-prune."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    result = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": "float32"},
        device="cpu",
        tasks=configs,
        task_manager=TaskManager(include_defaults=False),
        batch_size=1,
        bootstrap_iters=0,
        log_samples=False,
    )
    assert result is not None
    return result["results"]


def test_local_files_give_a_plain_harness_runs_figures_to_the_last_digit(
    tiny: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = [task_from_file(path) for path in files.values()]
    expected = plain_run(tiny, configs)
    task_file = tmp_path / "again.yaml"
    task_file.write_text(yaml.safe_dump(task_from_file(files["published"]) | {"task": "again"}))
    named = [f"--tasks={path}" for path in (*files.values(), task_file)]
    command = ["evaluate", "--model", str(tiny), "--batch-size", "1", *named]
    result = run_json(capsys, *command)["tasks"]
    assert set(result) == {*files, "again"}
    assert result["again"] == result["published"]
    checked = 0
    for task, metrics in expected.items():
        for metric, entry in result[task].items():
            assert entry["value"] == metrics[f"{metric},none"], (task, metric)
            checked += 1
    assert checked >= 20
    assert result["published"]["acc"]["stderr"] > 0


def test_perplexity_of_a_text_is_the_models_own(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "few.txt"
    text.write_text("abc def")
    command = ["evaluate", "--model", str(tiny), "--tasks", str(text)]
    result = run_json(capsys, *command)["tasks"]["few"]
    ids = torch.tensor([[256, *make_tokenizer()("abc def")["input_ids"]]])
    model = AutoModelForCausalLM.from_pretrained(tiny)
    logs = logits(model, ids)[:, :-1].log_softmax(-1)
    total = float(logs.gather(2, ids[:, 1:, None]).sum())
    assert result["byte_perplexity"]["value"] == pytest.approx(math.exp(-total / 7), rel=1e-4)


def test_two_models_stand_side_by_side_and_in_the_card(
    tiny: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_tiny(tmp_path / "other", seed=1)
    (other / "README.md").write_text("# A model\n\n## Load it\n")
    more = ["--tasks", f"{files['exact']},{files['texts']}", "--compare", str(tiny), "--card"]
    output = tmp_path / "raw.json"
    logs = ["--output-path", str(output), "--log-samples", "--limit", "2"]
    assert _exit_code(["evaluate", "--model", str(other), *more, *logs]) == 0
    assert "difference" in capsys.readouterr().out
    card = (other / "README.md").read_text()
    assert "| exact | exact_match |" in card
    assert card.startswith("# A model")
    raw = json.loads(output.read_text())
    assert len(raw[str(other)]["samples"]["exact"]) == 2
    assert _exit_code(["evaluate", "--model", str(other), *more, "--limit", "2"]) == 0
    assert (other / "README.md").read_text() == card


def test_a_new_evaluation_takes_the_old_ones_place_and_no_more() -> None:
    figure = Figure("task", "acc", 0.5, None, True)
    first = with_evaluation("# Title\n", [Evaluation("a", [figure], {})])
    later = f"{first}\n## Cite\n\nme\n"
    second = with_evaluation(later, [Evaluation("b", [figure], {})])
    assert second.count("## Evaluation") == 1
    assert "| b |" in second
    assert "| a |" not in second
    assert second.endswith("## Cite\n\nme\n")


def test_a_checkpoint_is_not_tested_on_its_own_examples(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny(tmp_path / "model")
    seen = record([Example("1 + 1 =2", "1+1=")], source="task.jsonl", tokens=5, networks=[0])
    (model / RECORD_NAME).write_text(seen)
    command = ["evaluate", "--model", str(model), "--tasks"]
    refused(capsys, [*command, str(files["exact"])], "1 of 4 questions")
    assert _exit_code([*command, str(files["last_words"])]) == 0


def test_an_answer_that_no_context_holds_is_refused_in_one_line(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = tmp_path / "long.jsonl"
    long.write_text(
        json.dumps({"question": "Up?", "choices": ["x" * 80, "no"], "answer": 1}) + "\n"
    )
    command = ["evaluate", "--model", str(tiny), "--tasks", str(long)]
    assert _exit_code(command) == 1
    error = capsys.readouterr().err
    assert "longer than the model's 64 tokens" in error
    assert len(error.splitlines()) == 1
    assert _exit_code([*command, "--max-length", "128"]) == 0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"colour": "red"}', "colour"),
        ("a.jsonl", "nothing", "not JSON"),
        ("a.yaml", "metric: acc", "names no task"),
        ("missing.jsonl", None, "does not exist"),
    ],
)
def test_a_file_that_is_no_task_is_refused_in_one_line(
    name: str, content: str | None, message: str, tiny: Path, tmp_path: Path, capsys: Any
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    command = ["evaluate", "--model", str(tiny), "--tasks", str(tmp_path / name)]
    refused(capsys, command, message)


def test_two_files_of_one_name_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    twin = tmp_path / files["exact"].name
    twin.write_text(files["exact"].read_text())
    with pytest.raises(InvalidInput, match="'exact'"):
        resolve_tasks([str(files["exact"]), str(twin)])
