"""The embedded model: small, complete, good at five skills, and honest about what it never saw."""

from __future__ import annotations

import ast
import json
import random
import re
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from builtin_model import mixture, skills, train
from builtin_model.corpus import (
    Corpus,
    Document,
    collect,
    docstrings,
    standard_library,
    without_docstrings,
)
from builtin_model.dataset import Files, training_rows, write_files
from builtin_model.measure import (
    exact_share,
    perplexity,
    read_questions,
    read_texts,
    token_rows,
)
from fbn_prune.data import builtin
from fbn_prune.model.mixture_checkpoint import open_mixture
from fbn_prune.model.mixture_family import MixtureFamily

MEGABYTE = 1_000_000
few = settings(max_examples=25, deadline=None)
SMALL_SHAPE = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(builtin.model_path())


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(builtin.model_path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """Two documents a skill, one of them held out: enough for everything that reads a corpus."""
    names = [f"module {number}" for number in range(400)]
    chosen = [
        next(name for name in names if not skills.is_held_out(name)),
        next(name for name in names if skills.is_held_out(name)),
    ]
    prose = [Document(name, f"The documentation of {name} says little. " * 60) for name in chosen]
    code = [Document(name, f"def name():\n    return '{name}'\n\n\n" * 60) for name in chosen]
    return Corpus(prose, code)


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: list[str]
) -> list[str]:
    batch = tokenizer(asked, return_tensors="pt", padding=True, padding_side="left")
    with torch.inference_mode():
        written = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=10,
            do_sample=False,
        )
    return tokenizer.batch_decode(written[:, batch["input_ids"].shape[1] :])


# The files


def test_importing_the_package_loads_no_tensor_library() -> None:
    script = "import sys, fbn_prune.data.builtin; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_the_weights_are_half_precision_and_at_most_ten_megabytes() -> None:
    weights = builtin.model_path() / "model.safetensors"
    assert weights.stat().st_size <= 10 * MEGABYTE
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.float16}


@pytest.mark.parametrize("skill", builtin.SKILLS)
def test_every_skill_has_calibration_and_held_out_text_of_useful_size(skill: str) -> None:
    for files, least, most in (
        (builtin.calibration_files(), 80_000, 300_000),
        (builtin.held_out_files(), 25_000, 150_000),
    ):
        records = [json.loads(line) for line in files[skill].read_text("utf-8").splitlines()]
        assert all(record.keys() == {"text"} and record["text"] for record in records)
        assert least <= files[skill].stat().st_size <= most


@pytest.mark.parametrize("skill", builtin.QUESTION_SKILLS)
def test_two_hundred_different_questions_a_skill_are_not_asked_in_the_calibration_text(
    skill: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    questions = read_questions(builtin.question_files()[skill])
    assert len({question for question, _ in questions}) == len(questions) == 200
    lines = "\n".join(read_texts(builtin.calibration_files()[skill])).split("\n")
    separator = "=" if skill == "arithmetic" else ":"
    asked = {line.partition(separator)[0] for line in lines if line}
    if skill == "arithmetic":
        asked |= {"+".join(reversed(sum_.split("+"))) for sum_ in asked if "+" in sum_}
    assert not asked & {question.partition(separator)[0] for question, _ in questions}
    for question, answer in questions:  # a question's tokens are a prefix of its line's
        tokens = tokenizer(question)["input_ids"]
        assert tokenizer(f"{question}{answer}\n")["input_ids"][: len(tokens)] == tokens


@pytest.mark.parametrize("skill", ["prose", "code"])
def test_no_held_out_document_is_calibration_text(skill: str) -> None:
    calibration = set(read_texts(builtin.calibration_files()[skill]))
    assert not calibration & set(read_texts(builtin.held_out_files()[skill]))


# The tokenizer


def test_the_tokenizers_class_is_one_that_older_loaders_know() -> None:
    config = json.loads((builtin.model_path() / "tokenizer_config.json").read_text("utf-8"))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


@few
@given(number=st.integers(0, 10**9))
def test_every_digit_is_a_token_of_its_own(tokenizer: PreTrainedTokenizerBase, number: int) -> None:
    pieces = tokenizer(str(number), add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode([piece]) for piece in pieces] == list(str(number))


@few
@given(text=st.text())
def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    tokens = tokenizer(text)["input_ids"]
    assert tokens[0] == tokenizer.bos_token_id
    if not any(token in text for token in tokenizer.all_special_tokens):
        assert tokenizer.decode(tokens[1:]) == text


# The model


def test_the_model_is_a_llama_of_three_to_six_million_parameters(model: PreTrainedModel) -> None:
    assert isinstance(model, LlamaForCausalLM)
    assert 3e6 <= model.num_parameters() <= 6e6
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.config.num_key_value_heads < model.config.num_attention_heads


@pytest.mark.parametrize("skill", builtin.QUESTION_SKILLS)
def test_the_model_answers_nine_in_ten_held_out_questions_exactly(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, skill: str
) -> None:
    questions = read_questions(builtin.question_files()[skill])[:60]
    completions = generate(model, tokenizer, [question for question, _ in questions])
    right = [
        skills.is_exact(completion, answer)
        for completion, (_, answer) in zip(completions, questions, strict=True)
    ]
    assert sum(right) / len(right) >= 0.9
    # The one-pass measure that the figures come from says what generating says.
    assert exact_share(model, tokenizer, questions) == pytest.approx(
        sum(right) / len(right), abs=0.018
    )


@pytest.mark.parametrize("skill", ["prose", "code"])
def test_the_model_reads_held_out_text_far_better_than_chance(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, skill: str
) -> None:
    rows = token_rows(tokenizer, read_texts(builtin.held_out_files()[skill]), 256)[:8]
    assert perplexity(model, rows) < len(tokenizer) / 20


def test_the_recorded_figures_are_of_a_finished_run_within_the_bars() -> None:
    report = json.loads((builtin.model_path().parent / "training.json").read_text("utf-8"))
    assert report["done"]
    assert min(report["exact"].values()) >= 0.9
    assert max(report["perplexity"][skill] for skill in ("prose", "code")) < 2048 / 20
    assert report["curve"][-1]["prose"] < report["curve"][0]["prose"]


# The generated tasks


@few
@given(seed=st.integers(0, 2**32))
def test_answers_are_right(seed: int) -> None:
    draw = random.Random(seed)
    asked = skills.arithmetic(draw)
    match = re.fullmatch(r"(\d\d)([+-])(\d\d)=", asked.question)
    assert match
    term, sign, other = match.groups()
    assert int(term) + int(sign + other) == int(asked.answer) >= 0
    asked = skills.brackets(draw)
    opened: list[str] = []
    for bracket in (asked.question.removesuffix(" :") + asked.answer).split():
        if bracket in skills.PAIRS:
            opened.append(skills.PAIRS[bracket])
        else:
            assert opened.pop() == bracket
    assert not opened
    asked = skills.copy(draw)
    order, *letters = asked.question.removesuffix(" :").split()
    assert asked.answer.split() == (letters if order == "copy" else letters[::-1])


@pytest.mark.parametrize("skill", builtin.QUESTION_SKILLS)
def test_training_and_held_out_questions_never_meet(skill: str) -> None:
    sides = [skills.questions(skill, random.Random(1), held_out=side) for side in (False, True)]
    trained, held_out = ([next(side) for _ in range(500)] for side in sides)
    assert not {asked.key for asked in trained} & {asked.key for asked in held_out}
    if skill == "arithmetic":  # nor with the terms of a sum exchanged
        turned = {f"{q[3:5]}+{q[:2]}=" for q in (asked.question for asked in held_out) if "+" in q}
        assert not {asked.question for asked in trained} & turned


@few
@given(answer=st.text(alphabet="0123456789 ab", max_size=6), more=st.text(max_size=5))
def test_only_the_first_line_counts_and_it_must_end(answer: str, more: str) -> None:
    assert skills.is_exact(f"{answer}\n{more}", answer)
    assert not skills.is_exact(answer, answer)
    assert not skills.is_exact(f"{answer}0\n", answer)


# Making it again


SOURCE = '''"""What the module is for, said in enough words to count as a docstring."""

def f():
    """Say nothing at all, but say it at some length so that this is kept."""
    return "code"
'''


def test_code_and_prose_share_no_docstring() -> None:
    tree = ast.parse(SOURCE)
    code = without_docstrings(SOURCE, tree)
    assert "return" in code
    assert len(docstrings(tree)) == 2
    assert not any(text in code for text in docstrings(tree))
    ast.parse(code)


SHARE = 12
"""One module of so many stands for all of them."""


@pytest.mark.slow
def test_a_module_of_the_running_python_is_held_out_for_both_skills_and_none_is_a_test(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modules = list(islice(standard_library(), 0, None, SHARE))
    monkeypatch.setattr("builtin_model.corpus.standard_library", lambda: iter(modules))
    corpus = collect()
    for skill in ("prose", "code"):
        found = sum(len(d.text) for d in corpus.documents(skill, held_out=False))
        assert found > MEGABYTE / SHARE
    sides = [
        {d.name for d in corpus.documents("prose", held_out=True)},
        {d.name for d in corpus.documents("code", held_out=False)},
    ]
    assert not sides[0] & sides[1]
    assert not any(".test" in d.name for d in corpus.code)


@pytest.fixture
def short_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little generated text, which takes long to make."""
    monkeypatch.setattr("builtin_model.dataset.GENERATED_CALIBRATION_BYTES", 10_000)
    monkeypatch.setattr("builtin_model.dataset.GENERATED_HELD_OUT_BYTES", 1_000)
    monkeypatch.setattr("builtin_model.dataset.QUESTIONS", 8)


@pytest.mark.usefixtures("short_files")
def test_rows_and_files_follow_from_the_seed(
    tokenizer: PreTrainedTokenizerBase, corpus: Corpus, tmp_path: Path
) -> None:
    seed = 7
    for skill in builtin.SKILLS:
        one, other = (training_rows(skill, corpus, tokenizer, 65, seed) for _ in range(2))
        rows = [next(one) for _ in range(3)]
        assert rows == [next(other) for _ in range(3)]
        assert {(len(row.tokens), len(row.weights)) for row in rows} == {(65, 65)}
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        write_files(Files(folder), corpus, seed)
    names = [path.relative_to(folders[0]) for path in folders[0].rglob("*.jsonl")]
    assert len(names) == 13
    assert all((folders[0] / n).read_bytes() == (folders[1] / n).read_bytes() for n in names)


@pytest.mark.usefixtures("short_files")
def test_the_same_script_trains_a_mixture_of_experts(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "collect", lambda: corpus)
    monkeypatch.setattr(train, "tokenizer_texts", lambda corpus, seed: ["no text but bytes"])
    small = {"hidden_size": 16, "num_hidden_layers": 2, "head_dim": 4, "moe_intermediate_size": 8}
    monkeypatch.setattr(mixture, "SHAPE", mixture.SHAPE | small)
    recipe = replace(mixture.MIXTURE, rows=2)
    train.run(train.parse(["--output", str(tmp_path), "--steps", "1"]), recipe)
    family = open_mixture(tmp_path / "model").family
    assert isinstance(family, MixtureFamily)
    assert (family.count, family.top_k, family.expert_width) == (16, 4, 8)


def test_the_learning_rate_rises_stays_and_falls_to_nothing() -> None:
    factors = [train.rate_factor(share) for share in (0.0, 0.01, 0.02, 0.5, 0.75, 1.0)]
    assert factors == pytest.approx([0.0, 0.5, 1.0, 1.0, 0.5, 0.0])


@pytest.mark.usefixtures("short_files")
def test_three_steps_of_the_script_write_a_folder_like_the_packages(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "collect", lambda: corpus)
    monkeypatch.setattr(train, "STEPS_A_RECORD", 1)
    monkeypatch.setattr(train, "ROWS_A_STEP", 4)
    monkeypatch.setattr(train, "tokenizer_texts", lambda corpus, seed: ["no text but bytes"])
    monkeypatch.setattr(train, "SHAPE", SMALL_SHAPE)
    report = train.run(train.parse(["--output", str(tmp_path), "--steps", "3"]))
    assert report["done"]
    assert [point["step"] for point in report["curve"]] == [1, 2, 3]
    assert json.loads((tmp_path / "training.json").read_text("utf-8")) == report
    package = builtin.model_path().parent
    made = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    assert {p for p in made if p.name != "training.json"} == {
        path.relative_to(package)
        for folder in ("model", "text", "questions")
        for path in (package / folder).rglob("*")
        if path.is_file()
    }
