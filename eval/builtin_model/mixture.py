"""Train a small mixture of experts: `python -m builtin_model.mixture --output DIR --minutes M`.

The same text, tokenizer, schedule and output folder as :mod:`builtin_model.train`; the model is a Qwen3-MoE of about 10
million parameters with 16 experts in each layer, of which a token is sent to 4. The loss has the usual term that keeps
the experts evenly used (Fedus et al., arXiv 2101.03961). AdamW trains the experts and the router, Muon the attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase
from transformers.integrations.moe import ExpertsInterface
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeForCausalLM,
    load_balancing_loss_func,
)

from builtin_model.train import (
    ADAM_RATE,
    CONTEXT,
    MUON_DECAY,
    MUON_RATE,
    VOCABULARY,
    Recipe,
    parse,
    run,
)

EXPERTS, CHOSEN = 16, 4
SHAPE: dict[str, Any] = {
    "hidden_size": 192,
    "num_hidden_layers": 6,
    "intermediate_size": 640,
    "moe_intermediate_size": 160,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": EXPERTS,
    "num_experts_per_tok": CHOSEN,
    "norm_topk_prob": True,
}
EXPERT_RATE = 2e-3
BALANCE = 1e-2
"""Weight of the term that keeps the experts evenly used."""
ROUNDED = 128
"""Tokens of an expert are padded to a multiple of this: for each new shape oneDNN compiles a kernel."""


def experts_apiece(module: Any, hidden: Tensor, index: Tensor, gates: Tensor) -> Tensor:
    """Compute a layer's experts one after another in bfloat16.

    Autocast does not reach the grouped products of transformers, and its loop over experts makes a gradient as large as
    all experts for each of them. On a CPU with bfloat16 products this trains about twice as fast as either.
    """
    width = index.shape[-1]
    experts, order = index.flatten().sort()
    counts = experts.bincount(minlength=EXPERTS).tolist()
    up, down = (w.bfloat16().unbind() for w in (module.gate_up_proj, module.down_proj))
    parts = hidden.bfloat16()[order // width].split(counts)
    made = []
    for expert, part in enumerate(parts):
        padded = pad(part, (0, 0, 0, -len(part) % ROUNDED))
        made.append((module._apply_gate(padded @ up[expert].T) @ down[expert].T)[: len(part)])
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    each = torch.cat(made)[back].view(*index.shape, -1)
    return (each * gates[..., None]).sum(1).to(hidden.dtype)


def new_model(seed: int, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return an untrained mixture of about 10 million parameters."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SHAPE,
    )
    model = Qwen3MoeForCausalLM(config)
    ExpertsInterface.register("apiece", experts_apiece)
    model.set_experts_implementation("apiece")
    model.generation_config.do_sample = False
    return model


def optimizers(model: Any) -> list[torch.optim.Optimizer]:
    """Return Muon for the attention's matrices and AdamW for the rest, each with its peak rate."""
    named = list(model.model.named_parameters())
    matrices = [p for name, p in named if "self_attn" in name and p.ndim == 2]
    experts = [p for name, p in named if ".mlp." in name]
    chosen = {id(p) for p in (*matrices, *experts)}
    others = [p for _, p in named if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=MUON_DECAY, momentum=0.95),
        torch.optim.AdamW(
            [{"params": experts, "lr": EXPERT_RATE}, {"params": others, "lr": ADAM_RATE}],
            betas=(0.9, 0.98),
            weight_decay=0.0,
        ),
    ]


def logits_and_balance(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits, and the weighted term that is smallest when all experts are used alike."""
    output = model(input_ids=ids, use_cache=False, output_router_logits=True)
    term = load_balancing_loss_func(output.router_logits, EXPERTS, CHOSEN)
    assert isinstance(term, Tensor)
    return output.logits, BALANCE * term


MIXTURE = Recipe(new_model, optimizers, logits_and_balance, rows=8)
"""How the mixture differs from the embedded model."""

if __name__ == "__main__":
    run(parse(), MIXTURE)
