"""A tiny random model of every supported architecture, and a byte-level tokenizer that goes with
it.

Every parameter is random, biases and norms too: the default zeros would hide a bias that is cut
wrongly.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
)

torch.set_num_threads(1)  # threads cost more than they give on matrices this small

VOCAB = 260
"""256 bytes, then <s>, </s>, <unk> and one id that no text reaches."""
HIDDEN, LAYERS, WIDTH, CONTEXT = 16, 3, 24, 64

_SPECIAL = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257, "vocab_size": VOCAB}
_MODERN = {
    **_SPECIAL,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "intermediate_size": WIDTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
}
_PHI3 = {key: value for key, value in _MODERN.items() if key != "head_dim"}
_GEMMA = {**_MODERN, "tie_word_embeddings": True}
_FALCON = {
    **_SPECIAL,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}

FAMILY_CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_MODERN),
    "llama-mlp-bias": lambda: LlamaConfig(**_MODERN, mlp_bias=True, attention_bias=True),
    "llama-tied": lambda: LlamaConfig(**{**_MODERN, "tie_word_embeddings": True}),
    "mistral": lambda: MistralConfig(**_MODERN, sliding_window=32),
    "olmo2": lambda: Olmo2Config(**{k: v for k, v in _MODERN.items() if k != "head_dim"}),
    "qwen2": lambda: Qwen2Config(**{k: v for k, v in _MODERN.items() if k != "head_dim"}),
    "qwen3": lambda: Qwen3Config(**_MODERN),
    "gemma": lambda: GemmaConfig(**_GEMMA),
    "gemma2": lambda: Gemma2Config(**_GEMMA, query_pre_attn_scalar=4),
    "gemma3_text": lambda: Gemma3TextConfig(**_GEMMA, query_pre_attn_scalar=4),
    "granite": lambda: GraniteConfig(**{k: v for k, v in _MODERN.items() if k != "head_dim"}),
    "stablelm": lambda: StableLmConfig(
        **{k: v for k, v in _MODERN.items() if k not in ("head_dim", "rms_norm_eps")}
    ),
    "phi3": lambda: Phi3Config(**_PHI3, original_max_position_embeddings=CONTEXT),
    "gpt2": lambda: GPT2Config(
        **_SPECIAL, n_embd=HIDDEN, n_layer=LAYERS, n_head=4, n_positions=CONTEXT
    ),
    "gpt_neox": lambda: GPTNeoXConfig(
        **_SPECIAL,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        intermediate_size=WIDTH,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
    ),
    "opt": lambda: OPTConfig(
        **_SPECIAL,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        ffn_dim=WIDTH,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        word_embed_proj_dim=HIDDEN,
    ),
    "falcon": lambda: FalconConfig(**_FALCON, bias=False),
    "falcon-bias": lambda: FalconConfig(**_FALCON, bias=True, new_decoder_architecture=True),
}
"""Name -> config. GPT-2 and Falcon leave the width to its default, 4 * HIDDEN."""

# The family table itself is tested for every name, in test_families.py. Elsewhere one name for each way through the
# code is enough: separate gate and up; both in one tensor, as are the heads; Conv1D with biases and a default width;
# tensors of other names in a layer that calls the projections itself.
PATHS = ("llama", "phi3", "gpt2", "opt")
BIASED = ("llama-mlp-bias", "gpt2", "opt", "falcon-bias")
"""Families whose down projection has a bias; Falcon runs attention and MLP side by side."""

TOKENS = torch.arange(3, 40).view(1, -1)


def make_model(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    config: PretrainedConfig | None = None,
) -> PreTrainedModel:
    """A random model in eval mode; `config` stands in for the one in `FAMILY_CONFIGS`."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config or FAMILY_CONFIGS[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=0.0, std=0.3)
    model.config.dtype = dtype
    return model.to(dtype).eval()


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    """What the model says of a prompt, in float32."""
    return model(tokens, use_cache=False).logits.float()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; the merge-free BPE that reads any text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    vocabulary |= {"<s>": 256, "</s>": 257, "<unk>": 258}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
    )


def make_merging_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte and one for two of them: llama.cpp loads no tokenizer without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: index for index, text in enumerate([*alphabet, "<s>", "</s>", "ab"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def save_tiny(
    directory: Path,
    name: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_size: int | str = "5GB",
    config: PretrainedConfig | None = None,
) -> Path:
    """Write a tiny checkpoint with its tokenizer; returns `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    make = _files if config is None else _files.__wrapped__
    for file, content in make(name, dtype, seed, max_shard_size, config).items():
        (directory / file).write_bytes(content)
    torch.manual_seed(seed)  # what a test draws next is the same, made anew or remembered
    return directory


@cache
def _files(
    name: str,
    dtype: torch.dtype,
    seed: int,
    max_shard_size: int | str,
    config: PretrainedConfig | None,
) -> dict[str, bytes]:
    with TemporaryDirectory() as folder:
        model = make_model(name, dtype=dtype, seed=seed, config=config)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        make_tokenizer().save_pretrained(folder)
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}
