"""Claims about the search of widths: the solver is exact, costs are what they say, and every way of running agrees."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import blocks, recipe, run_json
from test_layout import five_of_each_layer, job
from tiny_models import LAYERS, WIDTH, make_model, save_tiny

from fbn_prune.errors import InvalidInput
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.depth import leaving_out
from fbn_prune.model.divergence import EVERY, DenseReference
from fbn_prune.model.layerwise import LayerwiseForward
from fbn_prune.model.streaming import StreamedModel
from fbn_prune.progress import StageClock
from fbn_prune.pruning.candidates import Candidates
from fbn_prune.pruning.costs import Costs, interpolated
from fbn_prune.pruning.criteria import cuts_to_widths
from fbn_prune.pruning.evidence import CutOptions, EvidencePass
from fbn_prune.pruning.gaps import gap_cuts, whole_cuts
from fbn_prune.pruning.layout import LayoutRequest
from fbn_prune.pruning.library import grid, one_library
from fbn_prune.pruning.prediction import relative_error, rough_errors
from fbn_prune.pruning.solver import cheapest
from fbn_prune.recipe import Recipe
from fbn_prune.runs.choices import layout_request
from fbn_prune.runs.main_job import run_prune
from fbn_prune.runs.opening import open_run, store_of
from fbn_prune.runs.prune import PruneRun
from fbn_prune.runs.setup import prepare

BATCHES = blocks(20, 33, 17).batches(1)


def nothing(tokens: int) -> None:
    pass


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_the_solver_finds_the_cheapest_choice(data: st.DataObject) -> None:
    entry = st.tuples(st.integers(0, 9), st.integers(0, 50))
    layers = data.draw(st.lists(st.lists(entry, min_size=1, max_size=4), min_size=1, max_size=4))
    sizes = [[size for size, _ in layer] for layer in layers]
    costs = [[float(cost) for _, cost in layer] for layer in layers]
    budget = data.draw(st.integers(0, 30))
    every = itertools.product(*(range(len(layer)) for layer in layers))

    def summed(values: list[list[float]] | list[list[int]], choice: tuple[int, ...]) -> float:
        return sum(layer[index] for layer, index in zip(values, choice, strict=True))

    fitting = [choice for choice in every if summed(sizes, choice) <= budget]
    if not fitting:
        with pytest.raises(InvalidInput, match="no model is that small"):
            cheapest(sizes, costs, budget)
        return
    chosen = tuple(cheapest(sizes, costs, budget))
    assert summed(sizes, chosen) <= budget
    assert summed(costs, chosen) == min(summed(costs, choice) for choice in fitting)


@given(
    st.lists(st.floats(1e-4, 1), min_size=1, max_size=12, unique=True),
    st.lists(st.floats(0, 50), min_size=3, max_size=3),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_costs_between_measured_ones_fall_with_the_width(
    errors: list[float], found: list[float], data: st.DataObject
) -> None:
    errors = [*sorted(errors, reverse=True), 0.0]
    narrow = len(errors) - 1
    places = data.draw(st.lists(st.integers(0, narrow - 1), min_size=1, max_size=3, unique=True))
    # As measured costs do, apart from noise, those here fall with the width.
    measured = dict(zip(sorted(places), sorted(found[: len(places)], reverse=True), strict=True))
    costs = interpolated(errors, measured)
    assert costs[-1] == 0
    assert all(cost >= wider - 1e-12 for cost, wider in itertools.pairwise(costs))
    for place, cost in measured.items():
        assert costs[place] == pytest.approx(max(cost, 1e-9), rel=1e-6)


def test_beyond_measured_widths_costs_are_in_proportion_to_the_error() -> None:
    assert interpolated([0.4, 0.2, 0.05, 0.0], {1: 3.0}) == pytest.approx([6.0, 3.0, 0.75, 0.0])


def test_a_grid_has_the_even_width_and_the_full_one() -> None:
    request = LayoutRequest("ragged", "search", 50, False, (24, 64, 24), 4, frozenset({2}))
    first, second, whole = grid(request)
    assert whole == [24]
    assert first == sorted(set(first))
    assert second == sorted(set(second))
    assert (first[-1], second[-1]) == (24, 64)
    for layer, even in zip(
        (first, second), Candidates(request, grid(request), []).even().widths, strict=False
    ):
        assert even in layer
    assert all(width % 4 == 0 for width in (*first, *second))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_cost_of_a_layer_is_the_divergence_of_the_model_with_it_alone_cut(name: str) -> None:
    model = make_model(name)
    adapter = ModelAdapter(model)
    cuts = five_of_each_layer(adapter)
    reference = DenseReference(adapter, BATCHES, torch.float32)
    expected = [_predictions(model, batch.input_ids) for batch in BATCHES]

    def measured(batches: int = len(BATCHES), every: int = 1) -> float:
        apart = []
        for dense, batch in zip(expected[:batches], BATCHES[:batches], strict=True):
            changed = _predictions(model, batch.input_ids)
            apart.append((dense.exp() * (dense - changed)).sum(-1)[batch.valid][::every])
        return float(torch.cat(apart).mean())

    found = list(reference.alone([cuts], nothing, below_gaps=cuts))
    for layer, (cut, without) in enumerate(found):
        with adapter.trying(cuts, alone=layer):
            assert cut == pytest.approx(measured(every=EVERY), rel=1e-4)
        below = adapter.trying(cuts, alone=layer - 1) if layer else nullcontext()
        with leaving_out(adapter, [layer]), below:
            assert without == pytest.approx(measured(every=EVERY), rel=1e-4)
    with adapter.trying(cuts), leaving_out(adapter, [1]):
        both = measured()
    assert reference.divergence(cuts, nothing, [1]) == pytest.approx(both, rel=1e-4)
    assert measured() == 0


@pytest.mark.parametrize("apart", [False, True])  # whether a cut has neurons that a wider one lacks
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_layer_below_a_gap_makes_up_for_what_it_can(
    name: str, apart: bool, tmp_path: Path
) -> None:
    adapter = ModelAdapter(make_model(name))
    batches = blocks(*[33] * 60).batches(20)  # enough tokens for the requested damping
    whole = whole_cuts(adapter, tmp_path)
    narrow = [
        replace(cut, kept=cut.kept[::3], down_weight=cut.down_weight[:, ::3]) for cut in whole
    ]
    other = [
        replace(cut, kept=cut.kept[1::3], down_weight=cut.down_weight[:, 1::3]) for cut in whole
    ]
    below = gap_cuts(
        adapter,
        batches,
        [narrow, other, whole] if apart else [narrow, whole],
        damping=1e-9,
        round_to=torch.float32,
        scratch=tmp_path,
        advance=nothing,
    )
    forward = LayerwiseForward(adapter, batches)
    valid = [batch.valid for batch in batches]
    for layer in range(adapter.num_layers - 1):
        x: list[torch.Tensor] = []
        forward.advance(lambda _, seen, x=x: x.append(seen))  # type: ignore[misc]
        before = torch.cat(
            [hidden[rows] for hidden, rows in zip(forward.hidden, valid, strict=True)]
        )
        after = torch.cat([forward.run(index)[valid[index]] for index in range(len(batches))])
        for base, made in ((narrow, below[0]), (whole, below[-1])):
            kept = base[layer].kept
            added = (made[layer].down_weight - base[layer].down_weight).T
            inputs = torch.cat(x)[:, kept]
            missed = (after - before - inputs @ added).square().sum()
            best = torch.linalg.lstsq(inputs.double(), (after - before).double()).solution
            least = (after - before - inputs @ best.float()).square().sum()
            assert missed <= 1.05 * least + 1e-6
            assert missed < (after - before).square().sum()
    assert torch.equal(below[-1][-1].down_weight, whole[-1].down_weight)


def test_the_cuts_below_gaps_are_the_same_from_a_streamed_model(tiny: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(tiny)
    live = ModelAdapter(source.load_model("cpu", torch.float32))
    streamed = StreamedModel(source, torch.device("cpu"), torch.float32, scratch=tmp_path)
    found = [
        gap_cuts(
            adapter,
            BATCHES,
            [whole_cuts(adapter, tmp_path)],
            damping=0.01,
            round_to=torch.float32,
            scratch=tmp_path,
            advance=nothing,
        )[0]
        for adapter in (live, streamed)
    ]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.down_weight, other.down_weight)


@torch.no_grad()
def _predictions(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).logits.float().log_softmax(-1)


def test_a_layer_that_does_nothing_pays_for_the_others(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny(tmp_path / "model")
    source = Checkpoint.open(model)
    live = source.load_model("cpu", torch.float32)
    with torch.no_grad():
        live.model.layers[1].mlp.down_proj.weight.zero_()
    live.save_pretrained(model)
    extra = ["--layout", "ragged", "--widths", "search", "--sparsity", "0.3"]
    result = run_json(capsys, *job(model, text, tmp_path / "out", *extra))
    assert sum(result["widths"]) == pytest.approx(0.7 * LAYERS * WIDTH, abs=1)
    assert result["widths"][0] == result["widths"][2] == WIDTH
    trials = result["layout_trials"]
    assert trials["search"] == pytest.approx(0, abs=1e-6)
    assert trials["uniform"] > 0
    assert result["width_rule"] == "search"


def test_a_layer_that_is_to_stay_whole_stays_whole(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = ["--layout", "ragged", "--widths", "search", "--keep-layers", "1", "--sparsity", "0.4"]
    result = run_json(capsys, *job(tiny, text, tmp_path / "out", *extra))
    assert result["widths"][1] == WIDTH
    assert sum(result["widths"]) == pytest.approx(0.6 * LAYERS * WIDTH, abs=1)
    assert min(result["layout_trials"].values()) == result["layout_trials"].get(
        result["width_rule"], min(result["layout_trials"].values())
    )


def test_a_single_block_of_text_is_refused(tiny: Path, text: Path) -> None:
    settings = {"layout": "ragged", "widths": "search", "sparsity": 0.5, "tokens": 40}
    with pytest.raises(InvalidInput, match="at least two blocks"):
        run_prune(recipe(tiny, text, **settings, keep_networks=None), StageClock())


def test_the_result_does_not_depend_on_who_asks(tiny: Path, text: Path, tmp_path: Path) -> None:
    settings = {"layout": "ragged", "widths": "search", "sparsity": 0.5, "keep_networks": None}
    first = run_prune(recipe(tiny, text, tmp_path / "a", **settings), StageClock())
    second = run_prune(recipe(tiny, text, tmp_path / "b", **settings), StageClock())
    assert first.widths == second.widths
    assert first.layout_trials == second.layout_trials


def test_the_cut_that_the_search_tried_is_the_one_that_is_made(tiny: Path, text: Path) -> None:
    settings = {"layout": "ragged", "widths": "search", "sparsity": 0.5, "keep_networks": None}
    clock = StageClock()
    found = search_once(recipe(tiny, text, **settings), clock)
    layout, made = found.widths, found.pruned
    library = found.searched
    assert library is not None
    for layer, one in enumerate(library.finished()):
        assert made.cuts[layer].width == layout.widths[layer]
        assert torch.equal(made.cuts[layer].kept, one.cut.kept)
        assert torch.equal(made.cuts[layer].down_weight, one.cut.down_weight)
        assert made.relative_errors[layer] == one.relative_error
    assert 0 < min(made.relative_errors) < max(made.relative_errors) < 1


def search_once(job: Recipe, clock: StageClock) -> PruneRun:
    """Run the main job to the cut, without writing anything."""
    prepared = prepare(job, clock)
    with store_of(prepared) as store:
        run = PruneRun(open_run(prepared, clock), store)
        run.run()
    return run


def test_the_rough_errors_of_a_layer_are_its_errors_to_rounding() -> None:
    adapter = ModelAdapter(make_model("gpt2"))
    options = CutOptions(False, 0.01, 0.01, 0, torch.float32)
    for evidence in EvidencePass(adapter, BATCHES, options, clock=StageClock()):
        for criterion in ("second-order", "flap"):  # without and with a change of the bias
            cuts = [*cuts_to_widths(criterion, evidence, {4, 9}).values()]
            rough = rough_errors(evidence, cuts)
            for cut, error in zip(cuts, rough, strict=True):
                exact = relative_error(evidence, cut)
                assert error.relative == pytest.approx(exact, rel=1e-3, abs=1e-6)


def test_fewer_layers_are_predicted_by_their_costs() -> None:
    request = LayoutRequest(
        "uniform", "search", 40, False, (24,) * 4, 4, rest=(10,) * 4, leaves_out=True
    )
    levels = [[4, 8, 12, 16, 20, 24]] * 4
    costs = [Costs([6.0, 5, 4, 3, 2, 0], cost) for cost in (0.0, 1, 9, 0.5)]
    models = Candidates(request, levels, costs).with_fewer_layers()
    assert [model.sizes.widths for model in models] == [
        [8, 8, 8, 8],
        [16, 16, 16, 0],
        [24, 0, 24, 0],
    ]
    assert [model.cost for model in models] == [20.0, 9.5, 1.5]


@pytest.mark.parametrize("structures", ["neurons", "neurons,heads,layers"])
def test_searches_of_other_budgets_share_a_library(
    structures: str, tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [
        recipe(
            tiny,
            text,
            layout="ragged",
            widths="search",
            structures=structures,
            target_params=size,
            keep_networks=None,
        )
        for size in (13_000, 12_000)
    ]
    alone = [search_once(job, StageClock()).widths for job in jobs]
    stages = []
    with one_library([layout_request(prepare(job), None, []) for job in jobs]):
        for job, expected in zip(jobs, alone, strict=True):
            clock = StageClock()
            found = search_once(job, clock).widths
            assert (found.widths, found.head_groups) == (expected.widths, expected.head_groups)
            assert found.trials == pytest.approx(expected.trials, rel=1e-3)
            stages.append({"library", "heads", "gaps"} & clock.seconds.keys())
    assert "library" in stages[0]
    assert not stages[1]
