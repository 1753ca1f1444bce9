"""Every family's entry is true of the model it describes, and a cut changes what it must."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    BIASED,
    CONTEXT,
    FAMILY_CONFIGS,
    HIDDEN,
    LAYERS,
    VOCAB,
    WIDTH,
    logits,
    make_model,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from fbn_prune.errors import FbnPruneError, InvalidInput
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.families import FAMILIES, family_of
from fbn_prune.model.stock_names import with_stock_names
from fbn_prune.model.surgery import MlpCut, cut_config, cut_of, cut_tensor

every_family = pytest.mark.parametrize("name", FAMILY_CONFIGS)


def plain_cut(model: PreTrainedModel, layer: int, kept: Tensor, **more: Any) -> MlpCut:
    """The neurons outside `kept` go, the others' weights stay as they are."""
    return MlpCut(kept, ModelAdapter(model).down_weight(layer)[:, kept].clone(), **more)


def some_neurons(width: int, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(width, generator=generator)[:count].sort().values


def cut_all(model: PreTrainedModel, count: int) -> list[MlpCut]:
    """Cut a different random set out of every layer."""
    adapter = ModelAdapter(model)
    cuts = [
        plain_cut(model, layer, some_neurons(width, count, seed=layer))
        for layer, width in enumerate(adapter.widths)
    ]
    for layer, cut in enumerate(cuts):
        adapter.cut(layer, cut)
    return cuts


def test_every_model_type_has_a_tiny_model() -> None:
    tested = {FAMILY_CONFIGS[name]().model_type for name in FAMILY_CONFIGS}
    assert tested == {model_type for family in FAMILIES for model_type in family.model_types}


@every_family
def test_config_helpers_agree_for_a_loaded_config_and_for_its_json(name: str) -> None:
    config = FAMILY_CONFIGS[name]()
    family = family_of(config)
    for form in (config, config.to_dict()):
        assert family_of(form) is family
        assert family.num_layers(form) == LAYERS
        assert family.hidden_size(form) == HIDDEN
        assert family.width(form) == (4 * HIDDEN if name.startswith(("gpt2", "falcon")) else WIDTH)
        assert family.context_length(form) == CONTEXT
        assert family.vocab_size(form) == VOCAB


@every_family
def test_output_module_reads_the_activation_that_down_weight_multiplies(name: str) -> None:
    model = make_model(name)
    adapter = ModelAdapter(model)
    family = adapter.family
    for layer in range(LAYERS):
        seen: list[tuple[Tensor, Tensor]] = []
        module = adapter.output_module(layer)
        # cloned: Falcon adds its attention's output to the MLP's in place
        hook = module.register_forward_hook(
            lambda _, args, out, seen=seen: seen.append((args[0], out.clone()))
        )
        logits(model)
        hook.remove()
        activation, output = seen[0]
        weight, bias = adapter.down_weight(layer), adapter.down_bias(layer)
        assert weight.shape == (HIDDEN, family.width(model.config))
        assert activation.shape[-1] == weight.shape[1]
        expected = activation @ weight.T + (0 if bias is None else bias)
        torch.testing.assert_close(output, expected)
        assert (bias is not None) == family.has_bias(model.config)
        for rows in adapter.input_weights(layer):
            assert rows.shape == (family.width(model.config), HIDDEN)


@every_family
@pytest.mark.parametrize("prefixed", [True, False], ids=["whole model", "base model's names"])
def test_locate_finds_every_mlp_tensor_and_no_other(name: str, prefixed: bool) -> None:
    model = make_model(name)
    family = family_of(model.config)
    root = family.layers.partition(".")[0] + "."
    found = set()
    for tensor_name, tensor in model.state_dict().items():
        location = family.locate(tensor_name if prefixed else tensor_name.removeprefix(root))
        if location is None:
            assert ".mlp." not in tensor_name
            assert ".fc" not in tensor_name
            continue
        found.add((location.layer, location.projection.path, location.part))
        assert tuple(tensor.shape) == family.tensor_shape(
            location, HIDDEN, family.width(model.config)
        )
    parts = 2 if family.has_bias(model.config) else 1
    assert len(found) == LAYERS * len(family.projections) * parts


@every_family
def test_a_cut_changes_the_logits_by_what_the_neurons_said_and_no_more(name: str) -> None:
    model = make_model(name)
    adapter = ModelAdapter(model)
    width = adapter.widths[0]
    before = logits(model)
    cut_all(model, width)
    assert torch.equal(logits(model), before), "every neuron was kept"
    for layer in range(LAYERS):
        silent = torch.ones(width, dtype=torch.bool)
        silent[some_neurons(width, width // 2, seed=layer)] = False
        adapter.down_weight(layer)[:, silent] = 0.0
    before = logits(model)
    cut_all(model, width // 2)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    cut_all(model, 4)
    assert (logits(model) - before).abs().max() > 1e-3, "neurons that speak were removed"


@every_family
def test_the_order_of_neurons_does_not_matter(name: str) -> None:
    model = make_model(name)
    family = family_of(model.config)
    before = logits(model)
    for tensor_name, tensor in model.state_dict().items():
        location = family.locate(tensor_name)
        if location is None or (location.projection is family.output and location.part == "bias"):
            continue
        axis = location.projection.neuron_axis if location.part == "weight" else 0
        width = tensor.shape[axis] // location.projection.stacked
        order = torch.randperm(width, generator=torch.Generator().manual_seed(location.layer))
        blocks = [
            block.index_select(axis, order)
            for block in tensor.chunk(location.projection.stacked, dim=axis)
        ]
        tensor.copy_(torch.cat(blocks, dim=axis))
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)


@every_family
def test_save_pretrained_keeps_the_cut_and_the_files_tensors_are_cut_alike(
    name: str, tmp_path: Path
) -> None:
    original, model = make_model(name), make_model(name)
    family = family_of(model.config)
    cuts = cut_all(model, 8)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert family.width(reloaded.config) == 8
    assert torch.equal(logits(reloaded), logits(model))
    after = model.state_dict()
    for tensor_name, tensor in original.state_dict().items():
        if (cut := cut_of(family, tensor_name, cuts)) is not None:
            tensor = cut_tensor(family, original.config, tensor_name, tensor, cut)
        assert torch.equal(tensor, after[tensor_name]), tensor_name
    module = repr(ModelAdapter(model).output_module(0))
    assert f"{4 * HIDDEN}" not in module
    assert "8" in module


def test_output_weights_take_the_values_of_the_stored_dtype_or_are_an_error() -> None:
    model = make_model("llama")
    cut = plain_cut(model, 0, torch.arange(8))
    adapter = ModelAdapter(model)
    adapter.cut(0, cut, round_to=torch.bfloat16)
    weight = adapter.down_weight(0)
    assert weight.dtype == torch.float32
    assert torch.equal(weight, cut.down_weight.bfloat16().float())
    assert not torch.equal(weight, cut.down_weight)
    cut = MlpCut(torch.arange(2), torch.full((HIDDEN, 2), 1e6))
    with pytest.raises(FbnPruneError, match=r"not finite in torch\.float16"):
        ModelAdapter(model).cut(0, cut, round_to=torch.float16)


@pytest.mark.parametrize("name", ["llama", "granite"])
def test_a_new_bias_reaches_the_output_and_the_config(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    adapter = ModelAdapter(model)
    bias = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(0))
    adapter.cut(1, plain_cut(model, 1, torch.arange(WIDTH), down_bias=bias))
    assert model.config.mlp_bias is True
    seen: list[Tensor] = []
    adapter.layers[1].mlp.register_forward_hook(lambda _, a, out: seen.append(out))
    cut = logits(model)
    dense = make_model(name)
    ModelAdapter(dense).layers[1].mlp.register_forward_hook(lambda _, a, out: seen.append(out))
    logits(dense)
    torch.testing.assert_close(seen[0], seen[1] + bias)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), cut)


@pytest.mark.parametrize("name", BIASED)
def test_a_new_bias_replaces_the_one_that_is_there(name: str) -> None:
    model = make_model(name)
    adapter = ModelAdapter(model)
    bias = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(0))
    adapter.cut(0, plain_cut(model, 0, torch.arange(adapter.widths[0]), down_bias=bias))
    assert torch.equal(adapter.down_bias(0), bias)


@pytest.mark.parametrize("name", ["qwen2", "phi3", "falcon"])
def test_a_bias_without_a_place_is_refused(name: str) -> None:
    model = make_model(name)
    adapter = ModelAdapter(model)
    family = adapter.family
    cut = plain_cut(model, 0, torch.arange(8), down_bias=torch.ones(HIDDEN))
    assert not family.accepts_bias(model.config)
    with pytest.raises(InvalidInput, match="does not support an MLP output bias"):
        adapter.cut(0, cut)
    with pytest.raises(InvalidInput, match="does not support an MLP output bias"):
        cut_config(model.config.to_dict(), family, [cut] * LAYERS)
    assert adapter.down_weight(0).shape[1] == family.width(model.config)


def test_a_cut_config_changes_width_and_bias_alone() -> None:
    config = FAMILY_CONFIGS["llama"]().to_dict() | {
        "auto_map": {"AutoConfig": "code.Config"},
        "architectures": ["MineForCausalLM"],
    }
    cut = MlpCut(torch.arange(8), torch.zeros(HIDDEN, 8), torch.zeros(HIDDEN))
    pruned = cut_config(config, family_of(config), [cut] * LAYERS)
    changed = {key for key in config | pruned if config.get(key) != pruned.get(key)}
    assert changed == {"intermediate_size", "mlp_bias", "auto_map", "architectures"}
    assert pruned["architectures"] == ["LlamaForCausalLM"]
    both = config | {"architectures": ["LlamaForCausalLM", "Mine"]}
    assert with_stock_names(both)["architectures"] == both["architectures"]
    assert (pruned["intermediate_size"], pruned["mlp_bias"]) == (8, True)
    assert config["intermediate_size"] == WIDTH


@pytest.mark.parametrize(
    ("kept", "weight", "bias"),
    [
        *((torch.tensor(kept), torch.zeros(4, 2), None) for kept in ([2, 1], [1, 1], [-1, 1])),
        (torch.tensor([], dtype=torch.int64), torch.zeros(4, 0), None),
        (torch.tensor([0.0, 1.0]), torch.zeros(4, 2), None),
        (torch.tensor([0, 1]), torch.zeros(4, 3), None),
        (torch.tensor([0, 1]), torch.zeros(4, 2), torch.zeros(3)),
    ],
)
def test_an_inconsistent_cut_cannot_be_made(
    kept: Tensor, weight: Tensor, bias: Tensor | None
) -> None:
    with pytest.raises(ValueError, match=r"kept|down_"):
        MlpCut(kept, weight, bias)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({}, "no model_type"),
        ({"model_type": 3}, "no model_type"),
        ({"model_type": "mixtral", "num_local_experts": 8}, r"mixture .*\(num_local_experts=8\)"),
        ({"model_type": "llama", "num_local_experts": 4}, "mixture of experts"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "gpt2", "add_cross_attention": True}, "encoder-decoder"),
        ({"model_type": "llama", "vision_config": {"model_type": "clip"}}, "multimodal"),
        ({"model_type": "no_such"}, "'no_such' is not known"),
        ({"model_type": "mamba"}, "'mamba' has no MLP"),
        ({"model_type": "bitnet"}, "'bitnet' has no MLP of neurons that are independent"),
        ({"model_type": "bloom"}, "'bloom' has no config key that sets the width"),
        ({"model_type": "qwen3_moe"}, r"mixture .*\(num_local_experts=128\)"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "x"}}, r"quantized \(x\)"),
        (
            {"model_type": "llama", "per_layer_config": {"0": {"w": 3}}},
            "only intermediate_size may differ",
        ),
    ],
)
def test_what_cannot_be_pruned_is_refused_in_one_line(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidInput, match=reason) as refusal:
        family_of(config)
    message = str(refusal.value)
    assert "\n" not in message
    assert "llama" in message
    assert "falcon" in message


def test_a_config_with_a_value_of_the_wrong_type_is_refused_in_one_line() -> None:
    config = FAMILY_CONFIGS["llama"]().to_dict() | {"hidden_size": "wide"}
    with pytest.raises(InvalidInput, match=r"not a valid 'llama' config.*hidden_size") as refusal:
        family_of(config).width(config)
    assert "\n" not in str(refusal.value)
