"""vLLM's Llama with layers of different MLP widths; imported by vLLM alone (see :mod:`fbn_prune.export.vllm`).

Names of weights, sharding over devices, quantisation and compilation are vLLM's own: only the config that a layer is
built from differs, and that is transformers' `config.per_layer_config[layer]`.
"""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.utils import extract_layer_index


class RaggedLlamaDecoderLayer(LlamaDecoderLayer):
    """A layer as wide as the checkpoint has it."""

    def __init__(self, vllm_config: Any, prefix: str = "", config: Any = None) -> None:
        config = config or vllm_config.model_config.hf_config
        own = config.per_layer_config[extract_layer_index(prefix)]
        super().__init__(vllm_config=vllm_config, prefix=prefix, config=own)


class RaggedLlamaForCausalLM(LlamaForCausalLM):
    """A Llama of such layers."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=RaggedLlamaDecoderLayer)
