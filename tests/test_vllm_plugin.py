"""What vLLM is told of ragged checkpoints, and that its Llama then has the widths; vLLM itself is stood in for.

A real vLLM is compared with transformers by `eval/robustness/vllm_vs_transformers.py`.
"""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from small_runs import cut_live, export, random_cuts
from tiny_models import HIDDEN, LAYERS
from torch import Tensor, nn
from transformers import AutoConfig

from fbn_prune.export import vllm as vllm_plugin
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.checkpoint import Checkpoint

WIDTHS = [4, 24, 7]


class Registry:
    """As `vllm.ModelRegistry`: architectures by name."""

    def __init__(self) -> None:
        self.models: dict[str, str] = {"LlamaForCausalLM": "built in"}

    def get_supported_archs(self) -> set[str]:
        return set(self.models)

    def register_model(self, name: str, place: str) -> None:
        assert name not in self.models, "registered twice"
        self.models[name] = place


class Mlp(nn.Module):
    """As vLLM's LlamaMLP: gate and up in one matrix."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden, 2 * width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden).chunk(2, dim=-1)
        return self.down_proj(nn.functional.silu(gate) * up)


class LlamaDecoderLayer(nn.Module):
    """As vLLM's, in what it takes and in the config keys that the MLP is built from."""

    def __init__(self, vllm_config: Any, prefix: str = "", config: Any = None) -> None:
        super().__init__()
        config = config or vllm_config.model_config.hf_config
        self.mlp = Mlp(config.hidden_size, config.intermediate_size)


class LlamaForCausalLM(nn.Module):
    """As vLLM's: layers are made by `layer_type`, each told its name."""

    def __init__(
        self,
        *,
        vllm_config: Any,
        prefix: str = "",
        layer_type: type[nn.Module] = LlamaDecoderLayer,
    ) -> None:
        super().__init__()
        count = vllm_config.model_config.hf_config.num_hidden_layers
        start = f"{prefix}." if prefix else ""
        self.layers = nn.ModuleList(
            layer_type(vllm_config=vllm_config, prefix=f"{start}model.layers.{layer}")
            for layer in range(count)
        )

    def load_weights(self, source: Checkpoint) -> None:
        for index, layer in enumerate(self.layers):
            stem = f"model.layers.{index}.mlp."
            gate, up, down = (
                source.tensor(f"{stem}{name}_proj.weight") for name in ("gate", "up", "down")
            )
            both = torch.cat([gate, up])
            layer.mlp.load_state_dict({"gate_up_proj.weight": both, "down_proj.weight": down})


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A stand-in for vLLM where imports find it."""
    registry = Registry()
    contents: dict[str, dict[str, Any]] = {
        "vllm": {"ModelRegistry": registry},
        "vllm.model_executor": {},
        "vllm.model_executor.models": {},
        "vllm.model_executor.models.llama": {
            each.__name__: each for each in (LlamaDecoderLayer, LlamaForCausalLM)
        },
        "vllm.model_executor.models.utils": {
            "extract_layer_index": lambda prefix: int(prefix.rpartition(".")[2])
        },
    }
    for name, attributes in contents.items():
        module = ModuleType(name)
        module.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "fbn_prune.export.vllm.llama", raising=False)
    return registry


def test_the_package_announces_the_plugin_to_vllm() -> None:
    found = [point for point in entry_points(group="vllm.general_plugins") if "fbn" in point.name]
    assert [point.load() for point in found] == [vllm_plugin.register]


def test_registering_twice_is_registering_once(registry: Registry) -> None:
    vllm_plugin.register()
    vllm_plugin.register()
    assert registry.models["LlamaForCausalLM"] == "built in"
    assert registry.models.keys() - {"LlamaForCausalLM"} == vllm_plugin.ARCHITECTURES.keys()


def test_a_checkpoint_whose_layers_differ_in_heads_is_refused(registry: Registry) -> None:
    vllm_plugin.register()
    module, _, name = registry.models["RaggedLlamaForCausalLM"].partition(":")
    hf_config = SimpleNamespace(num_hidden_layers=LAYERS, attention_groups=[2, 0, 1])
    vllm_config = SimpleNamespace(model_config=SimpleNamespace(hf_config=hf_config))
    with pytest.raises(ValueError, match="same number of attention heads in every layer"):
        getattr(importlib.import_module(module), name)(vllm_config=vllm_config)


@pytest.mark.parametrize("prefix", ["", "draft"])
def test_its_llama_takes_a_ragged_checkpoints_weights_and_computes_its_mlps(
    prefix: str, registry: Registry, tiny: Path, tmp_path: Path
) -> None:
    source = Checkpoint.open(tiny)
    cuts = random_cuts(source, WIDTHS)
    out = export(source, cuts, tmp_path / "out")
    vllm_plugin.register()
    module, _, name = registry.models["RaggedLlamaForCausalLM"].partition(":")
    hf_config = AutoConfig.from_pretrained(out)
    vllm_config = SimpleNamespace(model_config=SimpleNamespace(hf_config=hf_config))
    ragged = getattr(importlib.import_module(module), name)(vllm_config=vllm_config, prefix=prefix)
    ragged.load_weights(Checkpoint.open(out))
    live = ModelAdapter(cut_live(source, cuts))
    hidden = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0))
    for layer in range(LAYERS):
        expected = live.layers[layer].mlp(hidden)
        torch.testing.assert_close(ragged.layers[layer].mlp(hidden), expected)
