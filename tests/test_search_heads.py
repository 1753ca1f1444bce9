"""Claims about the search of attention heads and blocks, beside neurons and layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import blocks, recipe, refused, run_json
from test_layout import job
from tiny_models import LAYERS, WIDTH, make_model, save_tiny
from transformers import AutoModelForCausalLM

from fbn_prune.errors import InvalidInput
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.layerwise import LayerwiseForward
from fbn_prune.model.perplexity import perplexity
from fbn_prune.model.surgery import MlpCut
from fbn_prune.progress import StageClock
from fbn_prune.pruning.candidates import HEADS, Candidates, Sizes
from fbn_prune.pruning.candidates import LAYERS as WHOLE_LAYERS
from fbn_prune.pruning.costs import Costs, falling
from fbn_prune.pruning.criteria import no_heads
from fbn_prune.pruning.evidence import CutOptions
from fbn_prune.pruning.gaps import whole_cuts
from fbn_prune.pruning.head_cuts import cuts_with_fewer_heads
from fbn_prune.pruning.layout import HeadLevels, LayoutRequest
from fbn_prune.pruning.search import HEADS_WORTH, _Trial, _Tried
from fbn_prune.runs.main_job import run_prune
from fbn_prune.runs.opening import open_run
from fbn_prune.runs.setup import prepare

OPTIONS = CutOptions(True, 1e-2, 1e-9, 0, torch.float32)
HEADS_OF_FOUR = HeadLevels((0, 1, 2), (8, 4, 0), 8)


def nothing(tokens: int) -> None:
    pass


def request_of(budget: int, layers: int = 4, leaves_out: bool = True) -> LayoutRequest:
    return LayoutRequest(
        *("ragged", "search", budget, True, (24,) * layers, 4),
        rest=(10,) * layers,
        leaves_out=leaves_out,
        heads=HEADS_OF_FOUR,
    )


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_sizes_fit_the_budget_and_more_structures_never_cost_more(data: st.DataObject) -> None:
    cost = st.floats(0.01, 9)
    levels = [[8, 16, 24]] * 4
    costs = [
        Costs(
            falling([data.draw(cost), data.draw(cost), 0.0]),
            data.draw(cost),
            falling([data.draw(cost), data.draw(cost), 0.0]),
        )
        for _ in levels
    ]
    budget = data.draw(st.integers(-8, 96))
    candidates = Candidates(request_of(budget), levels, costs)
    found = candidates.by_costs([1.0])
    assert found.widths[0] > 0  # the first layer stays, with an attention
    assert HEADS_OF_FOUR.groups[found.heads[0]] > 0
    kept = sum(sum(parts) for parts in candidates.parts(found))
    assert kept <= budget + 4 * 10
    assert candidates.share(found) == pytest.approx(kept / (4 * 34))
    for parts in (frozenset[str](), frozenset({HEADS}), frozenset({WHOLE_LAYERS})):
        try:
            fewer = candidates.by_costs([1.0], parts)
        except InvalidInput:
            continue
        assert candidates.summed(found) <= candidates.summed(fewer) + 1e-9
        if HEADS not in parts:
            staying = set(range(4)) - fewer.left_out
            assert all(HEADS_OF_FOUR.groups[fewer.heads[layer]] == 2 for layer in staying)
        if WHOLE_LAYERS not in parts:
            assert not fewer.left_out
    halfway = candidates.halfway(found)
    assert halfway.heads == found.heads
    assert halfway.left_out == found.left_out


def test_a_smaller_number_of_heads_is_never_cheaper() -> None:
    assert falling([0.1, 0.3, -0.2, 0.0]) == [0.3, 0.3, 0.0, 0.0]


@pytest.mark.parametrize(
    ("sizes", "worth"),
    [
        (Sizes([8, 8], (2, 2)), 1.0),
        (Sizes([8, 8], (2, 1)), HEADS_WORTH),
        (Sizes([8, 0], (2, 0)), 1.0),  # a layer that is left out has no heads to lose
        (Sizes([8, 8]), 1.0),
    ],
)
def test_a_candidate_with_fewer_heads_counts_less(sizes: Sizes, worth: float) -> None:
    nothing_else: Any = None
    trial = _Trial(nothing_else, nothing_else, HEADS_OF_FOUR, 0, StageClock())
    assert trial.worth(_Tried(sizes, 1.0)) == worth


def test_an_mlp_makes_up_for_the_attention_that_its_layer_lacks(tmp_path: Path) -> None:
    adapter = ModelAdapter(make_model("llama"))
    batches = blocks(*[33] * 60).batches(20)
    groups = adapter.family.head_shape(adapter.config).groups
    heads = HeadLevels((0, groups), (1, 0), 1)
    whole = whole_cuts(adapter, tmp_path)
    ((cuts,),) = cuts_with_fewer_heads(
        adapter, batches, [whole], heads, OPTIONS, scratch=tmp_path, advance=nothing
    )
    assert torch.equal(cuts[0].down_weight, whole[0].down_weight)  # the first layer keeps its heads
    forward = LayerwiseForward(adapter, batches)
    forward.advance()
    for layer in range(1, adapter.num_layers):
        assert cuts[layer].heads is not None
        assert len(cuts[layer].heads.kept) == 0
        dense = _outputs(forward, batches)
        with adapter.trying(cuts, alone=layer, with_heads=True):
            made_up = _outputs(forward, batches)
        bare = [_without_attention(whole[layer])] * adapter.num_layers
        seen: list[torch.Tensor] = []
        with adapter.trying(bare, alone=layer, with_heads=True):
            without = _outputs(forward, batches, seen)
        # The least error that any output weights could leave.
        x = torch.cat(seen).double()
        lacking = (dense - without).double()
        best = lacking - x @ torch.linalg.lstsq(x, lacking).solution
        left = (dense - made_up).double().square().sum()
        assert left <= 1.05 * best.square().sum() + 1e-6
        assert left < lacking.square().sum()
        forward.advance()


def _without_attention(cut: MlpCut) -> MlpCut:
    return replace(cut, heads=no_heads(cut.down_weight.shape[0]))


def _outputs(forward: LayerwiseForward, batches: list, seen: list | None = None) -> torch.Tensor:
    watch = None if seen is None else (lambda _, x: seen.append(x))
    found = [forward.run(index, watch)[batch.valid] for index, batch in enumerate(batches)]
    return torch.cat(found)


STRUCTURES = ["--structures", "neurons,heads,attention,layers", "--layout", "ragged"]


def quiet_attention(model: Path) -> Path:
    """Let the attention of the second layer do nothing, so that it is the first to go."""
    live = Checkpoint.open(model).load_model("cpu", torch.float32)
    with torch.no_grad():
        live.model.layers[1].self_attn.o_proj.weight.zero_()
    live.save_pretrained(model)
    return model


def test_an_attention_that_does_nothing_goes_first(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = quiet_attention(save_tiny(tmp_path / "model"))
    source = Checkpoint.open(model)
    target = source.total_parameters - 200
    extra = [*STRUCTURES, "--target-params", str(target), "--width-multiple", "1"]
    result = run_json(capsys, *job(model, text, tmp_path / "out", *extra))
    groups = source.family.head_shape(source.config).groups
    assert result["head_groups"] == [groups, 0, groups]
    assert result["widths"] == [WIDTH] * LAYERS
    assert result["heads_kept"] * 3 == result["heads_total"] * 2
    assert result["parameters_after"] <= target
    trials = result["layout_trials"]
    assert trials["search"] == pytest.approx(0, abs=1e-5)
    assert min(trials, key=trials.__getitem__) == "search"
    assert trials["search, neurons and layers"] > 0
    assert result["perplexity_after"] == pytest.approx(result["perplexity_before"], rel=1e-3)
    parts = result["search"]["kept_parts"]
    assert parts[1][1] == 0 < parts[0][1]


def test_a_model_without_some_heads_is_what_was_measured(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny(tmp_path / "model")
    target = int(0.8 * Checkpoint.open(model).total_parameters)
    extra = [*STRUCTURES, "--target-params", str(target)]
    result = run_json(capsys, *job(model, text, tmp_path / "out", *extra))
    assert result["parameters_after"] <= target
    written = Checkpoint.open(tmp_path / "out")
    again = ModelAdapter(written.load_model("cpu", torch.float32), written.family)
    same = recipe(model, text, sparsity=0.5, tokens=600, seed=0, context=48)
    data = open_run(prepare(same, StageClock()), StageClock()).data.held_out.batches(4096)
    assert perplexity(again, data) == pytest.approx(result["perplexity_after"], rel=1e-4)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert sum(p.numel() for p in stock.parameters()) == result["parameters_after"]


def test_streamed_and_resumed_runs_choose_the_same(text: Path, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    chosen = {
        "structures": "neurons,heads,attention,layers",
        "layout": "ragged",
        "target_params": str(int(0.8 * Checkpoint.open(model).total_parameters)),
        "keep_networks": None,
    }
    live = run_prune(recipe(model, text, tmp_path / "live", **chosen), StageClock())
    streamed = run_prune(
        recipe(model, text, tmp_path / "streamed", memory_budget="800MB", **chosen),
        StageClock(),
    )
    assert live.widths == streamed.widths
    assert live.head_groups == streamed.head_groups
    one, other = (tmp_path / name / "model.safetensors" for name in ("live", "streamed"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--structures", "neurons,heads"], "need layout ragged"),
        ([*STRUCTURES, "--head-sparsity", "0.5"], "give one of the two"),
        ([*STRUCTURES, "--widths", "loss"], "widths are searched"),
        (
            ["--structures", "neurons,attention", "--layout", "ragged", "--target-params", "100"],
            "embeddings, norms and the narrowest MLPs alone take",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    extra: list[str], message: str, tiny: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    budget = [] if "--target-params" in extra else ["--sparsity", "0.5"]
    refused(capsys, job(tiny, text, Path("out"), *budget, *extra), message)


def test_all_says_so_where_heads_cannot_be_cut(text: Path, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "gpt2")
    chosen = {"structures": "all", "layout": "ragged", "sparsity": 0.5, "keep_networks": None}
    prepared = prepare(recipe(model, text, **chosen), StageClock())
    assert prepared.heads is None
    assert "note: GPT-2 keeps all attention heads, which cannot be cut in it" in prepared.notes
