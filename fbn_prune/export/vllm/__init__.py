"""Makes ragged checkpoints known to vLLM, by its entry point `vllm.general_plugins`.

vLLM calls :func:`register` in every process it starts, and may call it twice. A ragged Llama checkpoint is then
served by vLLM's own Llama, its layers of different widths, where the architecture is named:

    vllm serve DIR --hf-overrides '{"architectures": ["RaggedLlamaForCausalLM"]}'

Every family is served, by transformers' code, with `--model-impl transformers --trust-remote-code` and without this.
"""

from __future__ import annotations

ARCHITECTURES = {
    "RaggedLlamaForCausalLM": "fbn_prune.export.vllm.llama:RaggedLlamaForCausalLM",
}
"""Architecture -> where its class is; vLLM imports that when a checkpoint asks for it."""


def register() -> None:
    """Tell vLLM's registry of the architectures that it does not know yet."""
    from vllm import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for name, place in ARCHITECTURES.items():
        if name not in known:
            ModelRegistry.register_model(name, place)
