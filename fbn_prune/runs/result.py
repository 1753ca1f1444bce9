"""The result of a pruning run, its peak memory, and the version of this package."""

from __future__ import annotations

import resource
import sys
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from transformers import PreTrainedModel

from fbn_prune.export.published import public_name
from fbn_prune.pruning.recovery.gain import Recovery
from fbn_prune.runs.vocabulary import VocabularyFigures


@dataclass
class PruneResult:
    """Figures of a finished run; `--json` prints them as :meth:`to_json` returns them.

    Attributes
    ----------
    perplexity_before, perplexity_after, perplexity_expected
        On the held-out text, with the recovery if there was one; and the range that the errors of the cuts predict,
        None for a mixture of experts.
    warning
        Oddities of the model's config and findings of the check after pruning; also in the model card.
    heads_kept, heads_total
        Attention (query) heads of all layers.
    experts
        Experts of a layer before and after; None if the model is no mixture of them.
    widths, width_rule, layout_trials
        New width of each layer (in a mixture, of an expert), the rule that set it, and the loss rise in nats of each
        rule that was tried (of each candidate of a search: the divergence from the dense model).
    search
        What a search of widths found, see :func:`fbn_prune.pruning.search.search_layout`; None without a search.
    layers_left_out
        Layers of the dense model that the pruned one does not have.
    head_groups
        Groups of attention heads of each layer that stays; None if they were not searched.
    kept_networks, ranked_networks
        Indices of the networks, strongest first.
    vocabulary
        What trimming the vocabulary saved, and does to held-out text; None if all tokens stay. The perplexities are
        those before it was trimmed.
    forgotten
        What removing a skill did to its examples and to the other text; None without `forget`.
    stages
        Wall seconds of each stage; `forward_seconds` is the part of the forward passes.
    model
        The pruned model; None if a checkpoint was written.
    """

    model_name: str
    output: str | None
    criterion: str
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    perplexity_before: float
    perplexity_after: float
    perplexity_expected: tuple[float, float] | None
    warning: str | None
    neurons_kept: int
    neurons_total: int
    heads_kept: int
    heads_total: int
    widths: list[int]
    layers_left_out: list[int]
    width_rule: str
    layout_trials: dict[str, float]
    search: dict[str, Any] | None
    kept_networks: list[int]
    ranked_networks: list[int]
    calibration_tokens: int
    held_out_tokens: int
    calibration_fingerprint: str
    task: dict[str, Any] | None
    forward_seconds: float
    peak_memory_bytes: int
    recovery: Recovery | None = None
    vocabulary: VocabularyFigures | None = None
    experts: tuple[int, int] | None = None
    forgotten: dict[str, Any] | None = None
    head_groups: list[int] | None = None
    stages: dict[str, float] = field(default_factory=dict)
    model: PreTrainedModel | None = field(default=None, repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """Return all figures as JSON values, with the model's name as `model`."""
        figures = asdict(replace(self, model=None))
        figures["model"] = figures.pop("model_name")
        return {"model": figures["model"], **figures}

    def lasting(self) -> dict[str, Any]:
        """Return the figures that are the same in every repetition of the run: without paths, times and memory."""
        passing = ("output", "forward_seconds", "peak_memory_bytes", "stages")
        lasting = {key: value for key, value in self.to_json().items() if key not in passing}
        lasting["model"] = public_name(self.model_name)
        if self.forgotten is not None:
            lasting["forgotten"] = {
                **self.forgotten,
                "file": public_name(self.forgotten["file"]),
            }
        if self.task is not None:
            lasting["task"] = {**self.task, "file": public_name(self.task["file"])}
        return lasting


def peak_memory_bytes() -> int:
    """Return the peak resident memory of the process, plus the peak allocation on each GPU."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024
    peak += sum(torch.cuda.max_memory_allocated(gpu) for gpu in range(torch.cuda.device_count()))
    return int(peak)


def tool_version() -> str:
    """Return the installed version of fbn-prune."""
    try:
        return version("fbn-prune")
    except PackageNotFoundError:
        return "0+unknown"
