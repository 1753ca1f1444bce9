"""Claims about what work is counted: as a hand would count it, more where there is more, less for one of several."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fbn_prune.networks import eigen, fastica
from fbn_prune.runs import cost
from fbn_prune.runs.cost import (
    KINDS,
    Amounts,
    Job,
    ModelSizes,
    exchanges,
    held_out_tokens,
    of_one_process,
    operations,
)
from fbn_prune.runs.rates import BASES, FACTORS, measured_rates, seconds, seconds_of_each

MODEL = ModelSizes(
    hidden=4, width=6, layers=3, vocabulary=10, layer_parameters=100, parameters=380, nbytes=760
)
JOB = Job(tokens=20, held_out=4, context=4, batch_tokens=8, kept=3)
RATES = {"product": 1e9, "float32": 1e9, "float64": 5e8, "memory": 1e9}


def total(counts: cost.Counts) -> float:
    return sum(seconds(counts, seconds_of_each(RATES)).values())


def test_a_forward_pass_is_two_operations_a_weight_and_token_and_attention() -> None:
    counts = cost.forward_pass(MODEL, JOB, 20)
    assert counts["forward"] == 20 * 3 * (2 * 100 + 4 * 4 * 4)
    assert counts["called"] == 3 * 3  # three layers, batches of 8, 8 and 4 tokens
    assert counts["read"] == 0
    streamed = cost.forward_pass(MODEL, replace(JOB, streamed=True), 20)
    assert streamed["read"] == 3 * 100 * 2
    losses = operations(MODEL, JOB)["dense perplexity"]
    assert losses["forward"] == 4 * (3 * (200 + 64) + 2 * 4 * 10)


def test_the_cut_of_a_layer_is_counted_as_its_formulas_say() -> None:
    d, n, m = 4, 6, 3
    chosen = cost.second_order_operations(d, n, m)["double"]
    assert chosen == n**3 + 2 * (n**3 - m**3) / 3 + d * (n**2 - m**2)
    fitted = cost.refit_operations(d, n, m)["double"]
    assert fitted == 2 * d * n * m + 2 * d * m * m + m**3 / 3 + 2 * d * m * m + 4 * d * n * n
    prune = operations(MODEL, JOB)["prune"]
    assert prune["double"] == pytest.approx(3 * (chosen + fitted))
    assert prune["gram"] == 3 * 20 * n * (n + 256)
    assert prune["written"] == 3 * 2 * d * m
    baseline = operations(MODEL, replace(JOB, second_order=False))["prune"]
    assert baseline["double"] == 3 * 4 * d * n * n


def test_the_blocks_that_leave_update_what_the_integral_says() -> None:
    """The sum over 64 blocks of what each update takes, against the closed form."""
    n, m, block = 6400, 3200, 100
    left = range(n - block, m - 1, -block)
    exact = sum(2.0 * block * size**2 for size in left)
    assert 2 * (n**3 - m**3) / 3 == pytest.approx(exact, rel=0.03)
    swapped = cost.second_order_operations(0, n, m)["gathered"]
    assert swapped == pytest.approx(sum(8.0 * 4 * block * size for size in left), rel=0.03)


def test_the_ica_decomposes_few_tokens_exactly_and_many_by_products() -> None:
    job = replace(JOB, tokens=9000, networks=2, network_tokens=512, ica_iterations=0)
    few = operations(MODEL, job)["ica"]
    assert few["token gram"] == 512 * (512 + 512) * 18
    assert few["eigen"] == 512**3
    assert few["ica"] == 2 * 18 * 512 * 2
    many = operations(MODEL, replace(job, network_tokens=8192))["ica"]
    assert many["eigen"] < 8192**3 / 100
    assert many["ica"] > 12 * 2 * 8192**2 * 32
    each = operations(MODEL, replace(job, layerwise=True))["ica"]
    assert each["eigen"] == 3 * few["eigen"]
    steps = operations(MODEL, replace(job, ica_iterations=7))["ica"]
    assert steps["ica"] - few["ica"] == 7 * 4 * 18 * 4


def test_sequential_fits_run_three_passes_and_a_second_product() -> None:
    once, thrice = (operations(MODEL, replace(JOB, sequential=s))["prune"] for s in (False, True))
    assert thrice["forward"] == 3 * once["forward"]
    assert thrice["gram"] == once["gram"] + 3 * 2 * 20 * 36


def test_what_a_recipe_adds_is_a_stage_of_its_own() -> None:
    more = replace(
        JOB,
        networks=2,
        network_tokens=8,
        known_networks=2,
        knocked_out=2,
        matched=True,
        gradient_tokens=8,
        width_passes=2,
        trial_widths=4,
        trial_tokens=8,
        recovery_passes=1,
    )
    added = operations(MODEL, more).keys() - operations(MODEL, JOB).keys()
    assert added == {
        "activations",
        "ica",
        "rank",
        "time courses",
        "gradients",
        "widths",
        "trial",
        "recovery",
    }
    one = operations(MODEL, replace(more, knocked_out=1))["rank"]["forward"]
    assert operations(MODEL, more)["rank"]["forward"] == 1.5 * one


def test_the_energy_of_the_networks_reads_the_output_weights_of_a_streamed_model_once() -> None:
    job = replace(JOB, known_networks=5)
    rest = operations(MODEL, job)["rest"]
    assert (rest["ica"], rest["read"]) == (2 * 4 * 6 * 3 * 5, 0)
    assert operations(MODEL, replace(job, streamed=True))["rest"]["read"] == 4 * 6 * 3 * 2


def test_processes_share_tokens_and_layers_and_nothing_else() -> None:
    job = replace(JOB, networks=2, network_tokens=8)
    alone, mine = operations(MODEL, job), of_one_process(operations(MODEL, job), 2, 3)
    assert mine["prune"]["forward"] == alone["prune"]["forward"] / 2
    assert mine["prune"]["double"] == pytest.approx(alone["prune"]["double"] * 2 / 3)
    assert mine["dense perplexity"]["forward"] == alone["dense perplexity"]["forward"] / 2
    for stage in ("rest", "load", "ica", "export"):
        assert mine[stage] == alone[stage]
    waiting = of_one_process(alone, 2, 3, sequential=True)["prune"]
    assert waiting["double"] == alone["prune"]["double"]
    assert of_one_process(alone, 1, 3) == alone
    between = exchanges(MODEL, job)
    assert between["exchanged"] == 3 * (8 * 36 + 4 * 8 * 6)
    assert between["told"] == 3 * 2 * 4 * 3


def test_held_out_tokens_come_in_whole_blocks() -> None:
    assert held_out_tokens(900, 0.1, 100) == 100
    assert held_out_tokens(10, 0.1, 128) == 128
    assert held_out_tokens(131072, 0.1, 2048) == 7 * 2048


SIZE = st.integers(1, 64)


@given(
    hidden=SIZE,
    width=SIZE,
    layers=SIZE,
    tokens=st.integers(1, 10**6),
    share=st.floats(0.01, 1),
    more=st.sampled_from(["hidden", "width", "layers", "tokens"]),
    streamed=st.booleans(),
    sequential=st.booleans(),
    networks=st.integers(0, 32),
)
def test_more_of_anything_takes_no_less(
    hidden: int,
    width: int,
    layers: int,
    tokens: int,
    share: float,
    more: str,
    streamed: bool,
    sequential: bool,
    networks: int,
) -> None:
    def taken(hidden: int, width: int, layers: int, tokens: int) -> float:
        layer = 4 * hidden**2 + 3 * hidden * width
        parameters = layers * layer + 200 * hidden
        model = ModelSizes(hidden, width, layers, 100, layer, parameters, 2 * parameters)
        job = Job(
            tokens=tokens,
            held_out=held_out_tokens(tokens, 0.1, 128),
            context=128,
            batch_tokens=4096,
            kept=share * width,
            networks=networks,
            network_tokens=1024,
            streamed=streamed,
            sequential=sequential,
            known_networks=networks,
        )
        return total(operations(model, job))

    sizes = {"hidden": hidden, "width": width, "layers": layers, "tokens": tokens}
    assert taken(**{**sizes, more: 2 * sizes[more]}) >= taken(**sizes) > 0


def test_keeping_fewer_neurons_takes_no_less_choosing() -> None:
    spent = [cost.second_order_operations(64, 256, kept)["double"] for kept in (1, 64, 128, 256)]
    assert spent == sorted(spent, reverse=True)


def test_amounts_add_and_multiply_kind_by_kind() -> None:
    assert Amounts(forward=2.0) + Amounts(gram=1.0) == {"forward": 2.0, "gram": 1.0}
    assert (Amounts(forward=2.0) + Amounts(forward=1.0)) * 3 == {"forward": 9.0}
    assert Amounts()["forward"] == 0.0


def test_every_kind_has_a_factor_and_every_count_is_of_a_kind() -> None:
    assert FACTORS.keys() == KINDS.keys() >= BASES.keys()
    assert all(factor >= 0 for factor in FACTORS.values())
    job = replace(JOB, networks=2, network_tokens=8, known_networks=2, streamed=True)
    for stage in operations(MODEL, job).values():
        assert stage.keys() <= KINDS.keys()
        assert all(amount >= 0 for amount in stage.values())


def test_rates_are_those_of_this_machine_and_scale_what_goes_with_them() -> None:
    found = measured_rates(torch.device("cpu"), torch.float32)
    assert found.keys() == {"product", "float32", "float64", "memory"}
    assert found["product"] == found["float32"] > 0
    slow, quick = (seconds_of_each({name: r * x for name, r in RATES.items()}) for x in (1, 2))
    for kind in KINDS:
        assert slow[kind] == pytest.approx(quick[kind] * (2 if kind in BASES else 1))


def test_the_sizes_that_the_solvers_go_by_are_the_ones_counted_with() -> None:
    assert cost.TOKEN_PANEL == eigen._GRAM_PANEL
    assert cost.EXACT_EIGEN == eigen._EXACT_UP_TO
    assert cost.ICA_ROWS == fastica._ROWS_PER_CHUNK


def test_heads_add_their_statistics_their_choice_and_their_refit() -> None:
    heads = cost.HeadWork(groups=4, kept=2, channels=2, parameters=7)
    d, n, m = 4, 8, 4
    added = cost.head_operations(d, 20, heads)
    chosen = n**3 + 2 * (n**3 - m**3) / 3 + d * (n**2 - m**2)
    each = 2 * 2**3 / 3 + 2 * 2**2 * d  # solved for four groups, then for three
    fitted = cost.refit_operations(d, n, m)["double"]
    assert added["double"] == pytest.approx(chosen + fitted + 7 * each)
    assert added["gram"] == 20 * n * (n + 256)
    job = replace(JOB, heads=heads)
    before, after = operations(MODEL, JOB), operations(MODEL, job)
    assert after["prune"]["double"] - before["prune"]["double"] == pytest.approx(
        3 * added["double"]
    )
    assert after["prune"]["written"] - before["prune"]["written"] == 3 * 2 * d * m
    gone = before["export"]["written"] - after["export"]["written"]
    assert gone == pytest.approx(MODEL.nbytes / MODEL.parameters * 3 * 2 * 7, abs=2)
