"""What a distillation trains: low-rank adapters that are merged afterwards, or all weights of the linear maps.

Both offer an optimizer float32 tensors by name. Adapters (LoRA, arXiv 2106.09685) need little memory beyond the model's
own; all weights need five float32 copies of them (values, gradients, two moments and the best values so far), and from
the same text they come closer to the dense model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

TYPICAL_SCALE = 0.02
"""Scale of a parameter that is all zeros, such as an untrained bias."""


class Trained(Protocol):
    """Parts of a model that an optimizer changes.

    Attributes
    ----------
    model
        Computes the outputs, with gradients of those parts.
    parameters
        Float32 tensors by name, for the optimizer.
    """

    model: nn.Module
    parameters: dict[str, Tensor]

    def rates(self, rate: float) -> Iterator[tuple[Tensor, float]]:
        """Yield each parameter and its learning rate."""

    def gather(self) -> None:
        """Add the gradients of a backward pass to those of :attr:`parameters`."""

    def apply(self) -> None:
        """Let the model compute with the values of :attr:`parameters`."""

    def merge(self) -> None:
        """Leave the model with its own modules alone, and with the values of :attr:`parameters`."""


class Adapters:
    """Low-rank adapters of linear maps; the rest of the model is frozen.

    Parameters
    ----------
    maps
        Names of the linear maps.
    rank
        Rank of each adapter; its alpha is twice the rank.
    seed
        Seed of their start.
    """

    def __init__(self, model: PreTrainedModel, maps: Sequence[str], rank: int, seed: int) -> None:
        self._required = _required(model)
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=list(maps), task_type="CAUSAL_LM"
        )
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about peft's internals; users cannot act on them
            torch.manual_seed(seed)
            adapted = get_peft_model(model, config)
        assert isinstance(adapted, PeftModel)
        self.model: nn.Module = adapted
        self._adapted = adapted
        self.parameters: dict[str, Tensor] = {
            n: p for n, p in adapted.named_parameters() if p.requires_grad
        }

    def rates(self, rate: float) -> Iterator[tuple[Tensor, float]]:
        return ((parameter, rate) for parameter in self.parameters.values())

    def gather(self) -> None:
        """The optimizer holds the adapters themselves, so their gradients are in place."""

    def apply(self) -> None:
        """The model computes with the adapters themselves."""

    def merge(self) -> None:
        self._adapted.merge_and_unload()
        _require_again(self._required)


class AllWeights:
    """Weights and biases of linear maps; norms, embeddings and the head are frozen.

    A model that computes in 16 bits gets float32 copies, whose steps would vanish in rounding otherwise.
    """

    def __init__(self, model: PreTrainedModel, maps: Sequence[str]) -> None:
        self._required = _required(model)
        self.model: nn.Module = model
        chosen = {id(model.get_submodule(name)) for name in maps}
        self._live = {
            f"{name}.{part}": parameter
            for name, module in model.named_modules()
            if id(module) in chosen
            for part, parameter in module.named_parameters(recurse=False)
        }
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in self._live.values():
            parameter.requires_grad_(True)
        self.parameters: dict[str, Tensor] = {
            name: p if p.dtype == torch.float32 else p.detach().float()
            for name, p in self._live.items()
        }

    def rates(self, rate: float) -> Iterator[tuple[Tensor, float]]:
        """The rate of a tensor is relative to the root mean square of its values, so that it suits all widths."""
        for parameter in self.parameters.values():
            yield (
                parameter,
                rate * (float(parameter.detach().square().mean().sqrt()) or TYPICAL_SCALE),
            )

    def gather(self) -> None:
        for live, copy in self._copied():
            if live.grad is not None:
                found = live.grad.float()
                copy.grad = found if copy.grad is None else copy.grad.add_(found)
                live.grad = None

    def apply(self) -> None:
        with torch.no_grad():
            for live, copy in self._copied():
                live.copy_(copy)

    def merge(self) -> None:
        self.apply()
        _require_again(self._required)
        for live in self._live.values():
            live.grad = None

    def _copied(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The live parameters that have a copy, and the copies."""
        for name, live in self._live.items():
            if self.parameters[name] is not live:
                yield live, self.parameters[name]


def _required(model: nn.Module) -> list[tuple[Tensor, bool]]:
    return [(parameter, parameter.requires_grad) for parameter in model.parameters()]


def _require_again(required: Sequence[tuple[Tensor, bool]]) -> None:
    for parameter, was in required:
        parameter.requires_grad_(was)
