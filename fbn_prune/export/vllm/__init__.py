"""Register ragged checkpoints with vLLM, through its entry point `vllm.general_plugins`.

vLLM calls :func:`register` in every process that it starts, possibly twice. vLLM's own Llama then serves a ragged Llama
checkpoint if the architecture is named:

    vllm serve DIR --hf-overrides '{"architectures": ["RaggedLlamaForCausalLM"]}'

Without this plugin, `--model-impl transformers --trust-remote-code` serves every family with transformers' code.
"""

from __future__ import annotations

ARCHITECTURES = {
    "RaggedLlamaForCausalLM": "fbn_prune.export.vllm.llama:RaggedLlamaForCausalLM",
}
"""The class of each architecture, which vLLM imports when a checkpoint needs it."""


def register() -> None:
    """Add the architectures to vLLM's registry, unless it has them."""
    from vllm import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for name, place in ARCHITECTURES.items():
        if name not in known:
            ModelRegistry.register_model(name, place)
