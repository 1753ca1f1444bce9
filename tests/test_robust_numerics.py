"""Claims about what real models bring: massive activations, dead and constant neurons, few tokens, overflow."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_runs import recipe
from tiny_models import save_tiny
from torch import Tensor

from fbn_prune.errors import FbnPruneError, InvalidInput
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.surgery import MlpCut
from fbn_prune.progress import StageClock
from fbn_prune.pruning import damping
from fbn_prune.pruning.criteria import LayerEvidence, second_order_cut
from fbn_prune.pruning.damping import DampingWarning, centred, factored, outliers, refit_share
from fbn_prune.pruning.fitting import DampingNotes, fitting_cuts
from fbn_prune.pruning.prediction import PredictedRise, check_rise, predicted_rise, relative_error
from fbn_prune.pruning.second_order import choose_neurons, output_error, refit
from fbn_prune.runs.main_job import run_prune

NEURONS, OUTPUTS = 48, 12


def problem(seed: int, tokens: int = 2000, factors: int = 24) -> tuple[Tensor, Tensor]:
    """W [outputs, neurons] and x [tokens, neurons] that half as many factors explain, and noise."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(factors, NEURONS, generator=generator, dtype=torch.float64)
    source = torch.randn(tokens, factors, generator=generator, dtype=torch.float64)
    noise = torch.randn(tokens, NEURONS, generator=generator, dtype=torch.float64)
    weight = torch.randn(OUTPUTS, NEURONS, generator=generator, dtype=torch.float64)
    return weight, source @ mixing + 0.3 * noise


def gram_of(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def cut_error(weight: Tensor, x: Tensor, keep: int = 24) -> float:
    gram = gram_of(x)
    kept = choose_neurons(weight, gram, keep, damping=1e-2)
    return output_error(weight, gram, kept, refit(weight, gram, kept, damping=1e-3))


def evidence(weight: Tensor, x: Tensor, **changes: object) -> LayerEvidence:
    unknown = dict.fromkeys(("bias", "shortfall", "membership", "loss_root"))
    options = {"can_have_bias": False, "damping": 1e-2, "refit_damping": 1e-3, "seed": 0}
    known: dict[str, object] = {
        "layer": 0,
        "weight": weight,
        "input_norms": torch.ones(weight.shape[1], dtype=torch.float64),
        "gram": gram_of(x),
        "mean": x.mean(0),
        "tokens": len(x),
    }
    return LayerEvidence(**unknown | options | known | changes)  # type: ignore[arg-type]


# Massive activations


@pytest.mark.parametrize("scale", [1e3, 1e7])
def test_a_massive_neuron_does_not_make_the_other_neurons_cuts_worse(scale: float) -> None:
    ratios = []
    for seed in range(10):
        weight, x = problem(seed)
        plain = cut_error(weight, x, 32)
        x[:, 5] *= scale  # the layer computes the same
        weight[:, 5] /= scale
        ratios.append(cut_error(weight, x, 32) / plain)
    assert max(ratios) < 1.5
    assert sum(ratios) / len(ratios) < 1.05


def test_measured_by_all_neurons_the_same_damping_would_drown_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, x = problem(0)
    x[:, 5] *= 1e5
    weight[:, 5] /= 1e5
    robust = cut_error(weight, x)
    monkeypatch.setattr(damping, "OUTLIER_ENERGY", math.inf)
    assert cut_error(weight, x) > 2 * robust


def test_massive_neurons_that_fire_together_can_still_be_inverted() -> None:
    weight, x = problem(1)
    x[:, 3] = 1e6 * x[:, 3]
    gram = gram_of(x).float().double()
    far = torch.zeros(NEURONS, dtype=torch.bool)
    far[3] = True
    assert outliers(gram).equal(far)
    kept = choose_neurons(weight, gram, 24, damping=1e-2)
    assert torch.isfinite(refit(weight, gram, kept, damping=1e-3)).all()


def test_many_strong_neurons_are_no_outliers() -> None:
    energy = torch.ones(NEURONS, dtype=torch.float64)
    energy[:5] = 1e9
    assert not outliers(torch.diag(energy)).any()


def test_massive_neurons_are_reported_with_their_layer() -> None:
    weight, x = problem(2)
    x[:, 5] *= 1e5
    notes = DampingNotes()
    for layer in (0, 3):
        with notes.heard(layer):
            second_order_cut(evidence(weight, x), 24)
    with pytest.warns(RuntimeWarning, match="another"), notes.heard(0):
        warnings.warn("another", RuntimeWarning, stacklevel=1)
    (line,) = notes.lines()
    assert line.startswith("warning: layers 0, 3: 1 neurons with massive activations")


# Indefinite and low-rank H


def test_rounding_errors_that_make_h_indefinite_are_damped_away_and_said() -> None:
    weight, x = problem(3, factors=4)
    gram = gram_of(x)
    values, vectors = torch.linalg.eigh(gram)
    values[:3] = -1e-5 * values[-1]
    broken = vectors @ torch.diag(values) @ vectors.T
    with pytest.warns(DampingWarning, match="not positive definite"):
        factor = factored(broken, 1e-9)
    assert torch.isfinite(factor).all()
    with pytest.warns(DampingWarning):
        kept = choose_neurons(weight, broken, 24, damping=1e-9)
    assert len(kept) == 24


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (-torch.eye(4, dtype=torch.float64), "cannot be inverted at any damping"),
        (torch.full((4, 4), math.inf, dtype=torch.float64), "overflow"),
    ],
    ids=["no gram", "overflowed"],
)
def test_what_no_damping_can_invert_is_refused(gram: Tensor, message: str) -> None:
    with pytest.raises(FbnPruneError, match=message):
        factored(gram, 1e-3)


@given(seed=st.integers(0, 1000), exponent=st.integers(6, 14))
@settings(deadline=None, max_examples=20)
def test_of_an_ill_conditioned_layer_half_the_neurons_carry_all_but_a_trifle(
    seed: int, exponent: int
) -> None:
    weight, x = problem(seed)
    x = x * torch.logspace(0, -exponent / 2, NEURONS, dtype=torch.float64)
    gram = gram_of(x).float().double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DampingWarning)
        kept = choose_neurons(weight, gram, 24, damping=1e-2)
        error = output_error(weight, gram, kept, refit(weight, gram, kept, damping=1e-3))
    assert error <= 2e-3 * float((weight @ gram * weight).sum())


def test_an_inverse_computed_afresh_leads_to_the_same_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = problem(10)
    gram = gram_of(x)
    kept = choose_neurons(weight, gram, 24, damping=1e-2)
    monkeypatch.setattr("fbn_prune.pruning.second_order.INVERSE_TOLERANCE", -math.inf)
    assert choose_neurons(weight, gram, 24, damping=1e-2).equal(kept)


# Dead and constant neurons


def test_dead_neurons_go_before_live_ones_of_equal_weight() -> None:
    weight, x = problem(4, factors=NEURONS)
    weight = weight / weight.norm(dim=0)
    dead = torch.arange(0, NEURONS, 2)
    x[:, dead] = 0
    kept = choose_neurons(weight, gram_of(x), 24, damping=1e-2)
    assert not set(kept.tolist()) & set(dead.tolist())


def test_a_constant_neuron_behind_a_bias_costs_nothing() -> None:
    weight, x = problem(5, factors=NEURONS)
    weight = weight / weight.norm(dim=0)
    x[:, 7] = 1000.0
    bias = torch.zeros(OUTPUTS, dtype=torch.float64)
    gram = gram_of(x).float().double()  # the mean square drowns the variance
    assert not centred(gram, x.mean(0))[7].any()
    known = evidence(weight, x, gram=gram, bias=bias, can_have_bias=True)
    cut = second_order_cut(known, NEURONS - 1)
    assert 7 not in cut.kept.tolist()
    assert cut.down_bias is not None
    assert cut.down_bias == pytest.approx(1000.0 * weight[:, 7], rel=1e-6)
    assert relative_error(known, cut) < 1e-5


# Few tokens


@given(tokens=st.integers(1, 10_000), share=st.floats(1e-6, 0.5))
@settings(deadline=None, max_examples=30)
def test_fewer_tokens_never_mean_less_damping(tokens: int, share: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DampingWarning)
        adapted = refit_share(share, tokens, NEURONS)
        assert share <= adapted <= max(share, damping.LARGEST_SHARE)
        assert adapted >= refit_share(share, 2 * tokens, NEURONS)
    enough = damping.TOKENS_PER_NEURON * NEURONS
    assert refit_share(share, enough, NEURONS) == share


def test_with_fewer_tokens_than_neurons_it_is_said_and_chance_is_not_fitted() -> None:
    weight, x = problem(7, tokens=4000, factors=4 * NEURONS)
    few, other = x[:30], gram_of(x[30:])
    with pytest.warns(DampingWarning, match="30 tokens for 48 neurons: H is singular"):
        cut = second_order_cut(evidence(weight, few), 24)
    plain = refit(weight, gram_of(few), cut.kept, damping=1e-3)
    adapted = output_error(weight, other, cut.kept, cut.down_weight)
    assert adapted < output_error(weight, other, cut.kept, plain)


# Overflow


def test_refitted_weights_that_overflow_the_stored_type_are_fitted_more_cautiously() -> None:
    weight, x = problem(8)
    weight *= 65000 / float(weight.abs().max())  # as they are, float16 just holds them
    known = evidence(weight, x)
    plain = second_order_cut(known, 12)
    assert float(plain.down_weight.abs().max()) > torch.finfo(torch.float16).max
    with pytest.warns(DampingWarning, match=r"overflow torch\.float16"):
        # A trial or a comparison asks for several widths at once.
        cuts = fitting_cuts(known, [12, 16], criterion="second-order", stored=torch.float16)
    assert [cut.width for cut in cuts.values()] == [12, 16]
    for cut in cuts.values():
        assert bool(cut.down_weight.to(torch.float16).isfinite().all())


def test_a_model_that_overflows_is_named_before_any_work(text: Path, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e7
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    told = r"MLP activations of layer 1: .* float16 overflows \(try --dtype float32\)"
    with pytest.raises(InvalidInput, match=told):
        run_prune(recipe(model, text, tmp_path / "out", dtype="float16"), StageClock())
    assert not (tmp_path / "out").exists()


# The check after pruning


def test_the_relative_error_is_the_share_of_the_output_that_is_missing() -> None:
    weight, x = problem(9)
    kept = torch.arange(30)
    cut = MlpCut(kept, weight[:, kept], torch.ones(OUTPUTS, dtype=torch.float64))
    lost = (x @ weight.T - x[:, kept] @ weight[:, kept].T - 1).square().sum()
    share = float(lost / (x @ weight.T).square().sum())
    assert relative_error(evidence(weight, x), cut) == pytest.approx(share, rel=1e-9)


def test_a_rise_within_the_range_passes_and_one_outside_is_told() -> None:
    predicted = predicted_rise([0.1, 0.05])
    assert check_rise(10.0, 12.0, predicted, 1000) is None
    assert "predict 9.048 to 20.14" in str(check_rise(10.0, 40.0, predicted, 1000))
    assert "too short to tell" in str(check_rise(10.0, 5.0, predicted, 1000))


def test_worse_than_guessing_against_the_prediction_is_no_result() -> None:
    with pytest.raises(FbnPruneError, match="guessing among 1000 tokens would be better"):
        check_rise(10.0, 2000.0, PredictedRise(-0.1, 0.5), 1000)
    foreseen = check_rise(10.0, 2000.0, PredictedRise(-0.1, 9.0), 1000)
    assert "worse than guessing among 1000 tokens" in str(foreseen)
    assert check_rise(1200.0, 2000.0, PredictedRise(-0.1, 9.0), 1000) is None


@pytest.mark.parametrize("odd", [False, True])
def test_a_warning_is_in_the_result_and_on_the_card_of_an_odd_run_alone(
    odd: bool, tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if odd:
        far = PredictedRise(-9.0, -8.0)
        monkeypatch.setattr("fbn_prune.runs.prune.predicted_rise", lambda errors: far)
    result = run_prune(recipe(tiny, text, tmp_path / "out"), StageClock())
    low, high = result.perplexity_expected
    assert (low <= result.perplexity_after <= high) != odd
    expected = "but the statistics of the cut predict"
    assert expected in result.warning if odd else result.warning is None
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("**Warning:** the pruned model's" in card) == odd


# Quantised checkpoints


@pytest.mark.parametrize(
    ("stored", "dtype", "message"),
    [
        ("self_attn.q_proj.qweight", torch.int32, "q_proj.qweight belongs to a quantized model"),
        ("self_attn.q_proj.weight_scale_inv", torch.float32, "weight_scale_inv belongs to"),
        ("self_attn.q_proj.weight", torch.int8, "unquantized"),
        ("mlp.down_proj.weight", torch.float8_e4m3fn, "unquantized"),
    ],
)
def test_quantised_tensors_are_refused_whatever_the_config_says(
    stored: str, dtype: torch.dtype, message: str, tmp_path: Path
) -> None:
    model = save_tiny(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    stored = f"model.layers.0.{stored}"
    weight = tensors.pop(stored.rpartition(".")[0] + ".weight")
    save_file(tensors | {stored: weight.to(dtype)}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(InvalidInput, match=message):
        Checkpoint.open(model)
