"""Claims about task-specific pruning: what a match weighs, what never calibrates, what a run records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import blocks, refused, run_json
from tiny_models import VOCAB, make_model, make_tokenizer

from fbn_prune.cli.main import _exit_code
from fbn_prune.data.calibration import TokenBlocks
from fbn_prune.data.examples import (
    Example,
    example_blocks,
    fingerprint,
    read_examples,
    recorded_fingerprints,
    require_unseen,
    without_questions,
)
from fbn_prune.errors import InvalidInput
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.networks.activity import (
    block_activity,
    principal_maps,
    second_moment,
    time_courses,
)
from fbn_prune.networks.discovery import DiscoveryOptions, SampledActivations, discover
from fbn_prune.networks.function_matching import match_documents, mixture_weights, score_weights
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.progress import StageClock
from fbn_prune.pruning.statistics import CrossStatistics, GramStatistics

TOKENIZER = make_tokenizer()


def activations(tokens: int, neurons: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, neurons, generator=torch.Generator().manual_seed(seed))


@given(st.lists(st.integers(1, 4), min_size=3, max_size=12))
@settings(max_examples=20, deadline=None)
def test_a_weight_counts_like_repetition(repeats: list[int]) -> None:
    x, target = activations(len(repeats), 5), activations(len(repeats), 5, 1)
    weights = torch.tensor(repeats, dtype=torch.float64)
    times = torch.tensor(repeats)
    weighted, repeated = GramStatistics(5), GramStatistics(5)
    weighted.update(x, weights)
    repeated.update(x.repeat_interleave(times, 0))
    assert torch.allclose(weighted.gram, repeated.gram, atol=1e-5)
    assert torch.allclose(weighted.mean, repeated.mean, atol=1e-6)
    crossed, again = CrossStatistics(5, 5), CrossStatistics(5, 5)
    crossed.update(target, x, weights)
    again.update(target.repeat_interleave(times, 0), x.repeat_interleave(times, 0))
    assert torch.allclose(crossed.cross, again.cross, atol=1e-5)
    assert torch.allclose(crossed.target_mean, again.target_mean, atol=1e-6)


def test_weights_follow_their_blocks_into_batches() -> None:
    blocks = tuple(torch.full((length,), length) for length in (5, 9, 7, 4))
    weighted = TokenBlocks(blocks, 16, ("here",), (0.5, 0.9, 0.7, 0.4))
    for batch in weighted.batches(10):
        ids = batch.input_ids[batch.valid]
        assert torch.allclose(batch.token_weights, ids.double() / 10)
    plain = TokenBlocks(blocks, 16, ("here",))
    assert plain.fingerprint != weighted.fingerprint
    assert all(batch.token_weights is None for batch in plain.batches(10))


def test_documents_that_use_the_tasks_networks_weigh_most() -> None:
    generic = activations(60, 12).double()
    generic[:6, 3] += 9
    generic[40:, 7] -= 9
    examples = activations(16, 12, 1).double()
    examples[:, 3] += 9
    match = match_documents(generic, examples, networks=2)
    assert match.networks[0] == 3
    assert match.weights[:6].min() > match.weights[6:].max()
    assert float(match.weights.mean()) == pytest.approx(1)
    opposite = examples.clone()
    opposite[:, 3] -= 18
    away = match_documents(generic, opposite, networks=1)
    assert away.weights[:6].max() <= away.weights[6:].min()  # the sign of an activity matters


def test_a_network_alike_in_all_documents_is_no_ground_for_a_match() -> None:
    generic = activations(30, 4).double()
    generic[:, 0] = 5
    match = match_documents(generic, generic[:3] + torch.tensor([9.0, 0, 0, 0]), networks=4)
    assert match.vector[0] == 0
    assert torch.isfinite(match.weights).all()
    alike = torch.full((5,), 0.3, dtype=torch.float64)
    assert torch.equal(score_weights(alike), torch.ones(5).double())


@given(
    st.lists(st.tuples(st.floats(0.01, 50), st.integers(1, 300)), min_size=1, max_size=8),
    st.lists(st.integers(1, 300), min_size=1, max_size=4),
)
@settings(max_examples=30, deadline=None)
def test_the_examples_get_three_tenths_however_long_they_are(
    generic: list[tuple[float, int]], examples: list[int]
) -> None:
    weights, lengths = zip(*generic, strict=True)
    of_generic, of_examples = mixture_weights(
        torch.tensor(weights, dtype=torch.float64), lengths, examples
    )
    mass = float((of_generic * torch.tensor(lengths)).sum())
    of_task = float((of_examples * torch.tensor(examples)).sum())
    assert of_task / (mass + of_task) == pytest.approx(0.3)
    assert mass + of_task == pytest.approx(sum(lengths) + sum(examples))


@pytest.fixture(scope="module")
def found() -> tuple[FunctionalNetworks, TokenBlocks, torch.Tensor]:
    """Networks of a tiny model, the blocks they were found on, and their time courses there."""
    adapter = ModelAdapter(make_model("llama"))
    drawn = blocks(*(24 + i % 9 for i in range(20)))
    options = {"batch_tokens": 100, "keep": True, "clock": StageClock()}
    wanted = DiscoveryOptions(6, 10**6, "global", 0)
    networks = discover(adapter, drawn, wanted, tokenizer=TOKENIZER, header={}, **options)
    sampled = SampledActivations(adapter, drawn, 10**6, **options)
    courses = torch.cat(list(sampled), dim=1) @ torch.linalg.pinv(networks.maps)
    return networks, drawn, courses


def test_known_networks_are_projected_as_they_were_found(
    found: tuple[FunctionalNetworks, TokenBlocks, torch.Tensor],
) -> None:
    networks, drawn, expected = found
    adapter = ModelAdapter(make_model("llama"))
    batches = drawn.batches(100)
    courses = time_courses(adapter, networks, batches, StageClock())
    assert torch.allclose(torch.cat(courses).float(), expected, atol=1e-4)
    means = block_activity(adapter, networks, drawn, batch_tokens=64, clock=StageClock())
    alone = TokenBlocks(drawn.blocks[3:4], 48, ("random",))
    third = block_activity(adapter, networks, alone, batch_tokens=64, clock=StageClock())
    assert torch.allclose(means[3], third[0], atol=1e-4)


def test_components_span_the_networks_and_carry_falling_variance(
    found: tuple[FunctionalNetworks, TokenBlocks, torch.Tensor],
) -> None:
    networks, _, courses = found
    components = principal_maps(networks, second_moment([courses.double()])).double()
    maps = networks.maps.double()
    projector = maps.T @ torch.linalg.pinv(maps @ maps.T) @ maps
    assert torch.allclose(components @ projector, components, atol=1e-3)
    assert torch.allclose(
        components @ components.T / components.shape[1], torch.eye(6).double(), atol=1e-3
    )
    carried = (courses.double() @ maps @ components.T).square().sum(0)
    assert (carried[:-1] >= carried[1:] * (1 - 1e-6)).all()


def test_examples_are_texts_or_questions_with_answers(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    lines = [{"text": "a b c"}, {"question": "1+1=", "answer": "2", "id": 7}]
    path.write_text("\n\n".join(json.dumps(line) for line in lines))
    assert read_examples(path) == [Example("a b c", "a b c"), Example("1+1=2\n", "1+1=")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no examples"),
        ("not json", "line 1: not JSON"),
        ('{"text": "a"}\n[1]', "line 2: give a text"),
        ('{"question": "a"}', "found: question"),
        ('{"text": ""}', "line 1: give a text"),
    ],
)
def test_a_file_that_holds_no_examples_is_refused(
    content: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text(content)
    with pytest.raises(InvalidInput, match=message):
        read_examples(path)
    with pytest.raises(InvalidInput, match="nowhere"):
        read_examples(tmp_path / "nowhere.jsonl")


def test_an_example_that_is_a_test_question_is_refused_however_it_is_spaced() -> None:
    examples = [Example("x", "What is  Up?"), Example("y", "other")]
    require_unseen(examples, [Example("z", "what was up?")], ("a", "b"))
    with pytest.raises(InvalidInput, match="example 1 of a"):
        require_unseen(examples, [Example("z", "what is up?\n")], ("a", "b"))


def test_blocks_that_hold_a_test_question_are_left_out() -> None:
    texts = ["so 12+3=15 it is", "so 2+3=5 it is", "nothing here", "SO\n2+3= 5"]
    examples = [Example(text, text) for text in texts]
    blocks = example_blocks(examples, TOKENIZER, context=64, vocabulary=VOCAB, source="here")
    kept, left_out = without_questions(blocks, [Example("2+3=5\n", "2+3=")], TOKENIZER)
    assert left_out == 2
    assert [TOKENIZER.decode(block) for block in kept.blocks] == [texts[0], texts[2]]
    everywhere = [Example(text, text) for text in texts]
    with pytest.raises(InvalidInput, match="every calibration block"):
        without_questions(blocks, everywhere, TOKENIZER)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    paths = {name: folder / f"{name}.jsonl" for name in ("text", "task", "test", "seen")}
    sums = [(i, j) for i in range(20) for j in range(20)]
    records = [{"text": f"{i} pears and {j} apples are {i + j} fruits."} for i, j in sums]
    records.append({"text": "Everybody knows that 3*3= gives 9 of them."})
    questions = [{"question": f"{i}*{i}=", "answer": str(i * i)} for i in range(1, 20)]
    for name, lines in {
        "text": records,
        "task": questions[10:],
        "test": questions[:10],
        "seen": questions[5:12],
    }.items():
        paths[name].write_text("".join(json.dumps(line) + "\n" for line in lines))
    return paths


def arguments(model: Path, files: dict[str, Path], output: Path, *more: str) -> list[str]:
    small = "--tokens 9000 --network-tokens 600 --networks 6 --keep-networks 2 --context 48"
    head = ["--model", str(model), "--calibration", str(files["text"]), "--output", str(output)]
    task = ["--task", str(files["task"]), "--task-test", str(files["test"])]
    return [*head, *small.split(), *task, *more]


def test_a_task_run_says_what_it_saw_and_left_out(
    tiny: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    result = run_json(capsys, *arguments(tiny, files, output))
    task = result["task"]
    assert (task["examples"], task["test_questions"], task["left_out"]) == (9, 10, 1)
    assert task["matched_networks"] == result["kept_networks"]
    assert task["test_perplexity_before"] > 0
    assert task["test_perplexity_after"] > 0
    assert 1 <= task["effective_documents"] <= task["documents"]
    assert recorded_fingerprints(output) == {fingerprint(f"{i}*{i}=") for i in range(11, 20)}
    assert "9 examples of" in (output / "README.md").read_text()
    again = tmp_path / "again"
    assert _exit_code(["run", str(output / "recipe.yaml"), "--output", str(again)]) == 0
    weights = [(folder / "model.safetensors").read_bytes() for folder in (output, again)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--task", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--task", "{seen}"], "is or contains a test question"),
        (["--rank", "chance"], "chance"),
    ],
)
def test_a_task_that_cannot_be_read_is_refused_before_any_work(
    extra: list[str],
    message: str,
    tiny: Path,
    files: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    filled = [flag.format(seen=files["seen"]) for flag in extra]
    refused(capsys, arguments(tiny, files, tmp_path / "out", *filled), message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("extra", [["--sequential", "--rank", "energy"], ["--sparsity", "0.5"]])
def test_the_variants_of_a_task_run(
    extra: list[str], tiny: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    assert _exit_code(arguments(tiny, files, tmp_path / "out", *extra)) == 0
    assert (tmp_path / "out" / "task.json").is_file()
