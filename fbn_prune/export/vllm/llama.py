"""vLLM's Llama with layers of different MLP widths; only vLLM imports this (see :mod:`fbn_prune.export.vllm`).

Weight names, sharding, quantisation and compilation are vLLM's own. Each layer is built from its own config,
`config.per_layer_config[layer]` of transformers.
"""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.utils import extract_layer_index


class RaggedLlamaDecoderLayer(LlamaDecoderLayer):
    """A Llama layer with the MLP width that the config gives for it."""

    def __init__(self, vllm_config: Any, prefix: str = "", config: Any = None) -> None:
        config = config or vllm_config.model_config.hf_config
        if getattr(config, "attention_groups", None) is not None:
            raise ValueError(
                "vLLM's Llama has the same number of attention heads in every layer, this checkpoint has not "
                "(attention_groups): load it with transformers"
            )
        own = config.per_layer_config[extract_layer_index(prefix)]
        super().__init__(vllm_config=vllm_config, prefix=prefix, config=own)


class RaggedLlamaForCausalLM(LlamaForCausalLM):
    """A Llama whose layers may differ in MLP width."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=RaggedLlamaDecoderLayer)
