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
from fbn_prune.recipe import build_recipe
from fbn_prune.runs.prune import run_prune

torch.set_num_threads(1)

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
    known: dict[str, object] = {
        "layer": 0,
        "weight": weight,
        "bias": None,
        "input_norms": torch.ones(weight.shape[1], dtype=torch.float64),
        "gram": gram_of(x),
        "mean": x.mean(0),
        "tokens": len(x),
        "cross": None,
        "target_mean": None,
        "membership": None,
        "loss_root": None,
        "can_have_bias": False,
        "damping": 1e-2,
        "refit_damping": 1e-3,
        "seed": 0,
    }
    return LayerEvidence(**{**known, **changes})  # type: ignore[arg-type]


# Massive activations


@pytest.mark.parametrize("scale", [1e3, 1e5, 1e7])
def test_a_massive_neuron_does_not_make_the_other_neurons_cuts_worse(scale: float) -> None:
    ratios = []
    for seed in range(20):
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
    (line,) = notes.lines()
    assert line.startswith("warning: layers 0, 3: 1 neurons with massive activations")


def test_other_warnings_pass_through_the_notes() -> None:
    with pytest.warns(RuntimeWarning, match="another"), DampingNotes().heard(0):
        warnings.warn("another", RuntimeWarning, stacklevel=1)


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


def test_a_matrix_that_is_no_gram_is_refused() -> None:
    gram = -torch.eye(4, dtype=torch.float64)
    with pytest.raises(FbnPruneError, match="cannot be inverted at any damping"):
        factored(gram, 1e-3)


def test_statistics_that_overflowed_are_refused() -> None:
    gram = torch.full((4, 4), math.inf, dtype=torch.float64)
    with pytest.raises(FbnPruneError, match="overflow"):
        factored(gram, 1.0)


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
    known = evidence(weight, x, gram=gram, bias=bias, can_have_bias=True)
    cut = second_order_cut(known, NEURONS - 1)
    assert 7 not in cut.kept.tolist()
    assert cut.down_bias is not None
    assert cut.down_bias == pytest.approx(1000.0 * weight[:, 7], rel=1e-6)
    assert relative_error(known, cut) < 1e-5


def test_the_covariance_of_a_constant_neuron_is_zero_not_noise() -> None:
    _, x = problem(6)
    x[:, 7] = 1000.0
    covariance = centred(gram_of(x).float().double(), x.mean(0))
    assert not covariance[7].any()
    assert not covariance[:, 7].any()


# Few tokens


@given(tokens=st.integers(1, 10_000), share=st.floats(1e-6, 0.5))
@settings(deadline=None, max_examples=50)
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
        (cut,) = fitting_cuts(known, [12], criterion="second-order", stored=torch.float16).values()
    assert bool(cut.down_weight.to(torch.float16).isfinite().all())


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i} apples, {i * 3} pence, {i % 7} pears. " for i in range(400)))
    return path


def small_recipe(model: Path, text: Path, output: Path, **changes: object):
    small = {"tokens": 800, "network_tokens": 500, "networks": 5, "width_multiple": 4}
    base = {"model": str(model), "calibration": [str(text)], "context": 48, "output": output}
    return build_recipe({**base, **small, "sparsity": 0.5, **changes})


def test_a_model_that_overflows_is_named_before_any_work(text: Path, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e7
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    recipe = small_recipe(model, text, tmp_path / "out", dtype="float16")
    told = r"MLP activations of layer 1: .* float16 overflows \(try --dtype float32\)"
    with pytest.raises(InvalidInput, match=told):
        run_prune(recipe, StageClock())
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
    assert check_rise(10.0, 2000.0, PredictedRise(-0.1, 9.0), 1000) is None


def test_a_warning_is_in_the_result_and_on_the_card(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fbn_prune.runs.prune.predicted_rise", lambda errors: PredictedRise(-9.0, -8.0)
    )
    model = save_tiny(tmp_path / "model")
    result = run_prune(small_recipe(model, text, tmp_path / "out"), StageClock())
    assert "but the statistics of the cut predict" in str(result.warning)
    assert "**Warning:** the pruned model's" in (tmp_path / "out" / "README.md").read_text()


def test_a_usual_run_has_no_warning(text: Path, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    result = run_prune(small_recipe(model, text, tmp_path / "out"), StageClock())
    low, high = result.perplexity_expected
    assert low <= result.perplexity_after <= high
    assert result.warning is None
    assert "Warning" not in (tmp_path / "out" / "README.md").read_text()


# Quantised checkpoints


@pytest.mark.parametrize(
    ("suffix", "dtype"), [("qweight", torch.int32), ("weight_scale_inv", torch.float32)]
)
def test_packed_tensors_are_refused_whatever_the_config_says(
    suffix: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = save_tiny(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    weight = tensors.pop("model.layers.0.self_attn.q_proj.weight")
    tensors[f"model.layers.0.self_attn.q_proj.{suffix}"] = weight.to(dtype)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(InvalidInput, match=f"q_proj.{suffix} belongs to a quantized model"):
        Checkpoint.open(model)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", ["self_attn.q_proj", "mlp.down_proj"])
def test_weights_in_eight_bits_are_refused(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    full = f"model.layers.0.{name}.weight"
    tensors[full] = tensors[full].to(dtype)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(InvalidInput, match="unquantized"):
        Checkpoint.open(model)
