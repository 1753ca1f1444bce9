"""What an architecture's entry says of its GGUF files."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Gguf:
    """How llama.cpp represents the architecture.

    Attributes
    ----------
    arch
        llama.cpp's name of the architecture; None if its files are read, but not written.
    ragged_arch
        An architecture with the same arithmetic that reads one width for each layer; None if there is none.
    paired_rope
        Whether llama.cpp rotates neighbouring channels where transformers rotates the two halves of a head, so that
        the query and key rows must be reordered.
    own_head_size
        Whether heads * head size may differ from the hidden size.
    read_as
        The model type for each architecture whose files are read.
    norm_offset
        What llama.cpp adds to the weights of the norms.
    heads_apart
        Whether llama.cpp stores all queries, all keys and all values one after another where transformers stores them
        by groups of heads.
    dtype
        The dtype of weights that were quantized; float16 is too narrow for the activations of some models.
    complete
        Adds settings that a file implies to those that it states. It is given the settings and the tensors' names.
    activations
        transformers' names of the only activation function that llama.cpp computes.
    rope_types
        The kinds of rotary embeddings that a file can state.
    partly_rotated
        Whether files and the config state how much of a head is rotated, which may be less than all of it.
    attention_bias
        Whether llama.cpp reads the biases that the config's `attention_bias` adds.
    """

    arch: str | None
    ragged_arch: str | None = None
    paired_rope: bool = False
    own_head_size: bool = True
    read_as: Mapping[str, str] = field(default_factory=dict, hash=False)
    norm_offset: int = 0
    heads_apart: bool = False
    dtype: str = "float16"
    complete: Callable[[dict[str, Any], Collection[str]], None] = lambda fields, names: None
    activations: tuple[str, ...] = ("silu", "swish")
    rope_types: tuple[str, ...] = ("default",)
    partly_rotated: bool = False
    attention_bias: bool = False
