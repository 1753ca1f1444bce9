"""What a run reports of itself: its figures, its peak memory, the version that made it."""

from __future__ import annotations

import resource
import sys
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from transformers import PreTrainedModel

from fbn_prune.pruning.recovery.gain import Recovery


@dataclass
class PruneResult:
    """What a run did; :meth:`to_json` is the object that `--json` prints."""

    model_name: str
    output: str | None
    criterion: str
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    perplexity_before: float
    perplexity_after: float
    perplexity_expected: tuple[float, float]
    """The range that the cuts' own statistics lead to expect."""
    warning: str | None
    """What is odd in the model's configs, and what the check after pruning found; also in the model card."""
    neurons_kept: int
    neurons_total: int
    heads_kept: int
    heads_total: int
    """Attention heads (query heads) of all layers."""
    widths: list[int]
    width_rule: str
    layout_trials: dict[str, float]
    kept_networks: list[int]
    ranked_networks: list[int]
    calibration_tokens: int
    held_out_tokens: int
    calibration_fingerprint: str
    task: dict[str, Any] | None
    forward_seconds: float
    peak_memory_bytes: int
    recovery: Recovery | None = None
    """What `recover` brought; `perplexity_after` has it in."""
    stages: dict[str, float] = field(default_factory=dict)
    model: PreTrainedModel | None = field(default=None, repr=False, compare=False)
    """The live model that was pruned in place; None where a checkpoint was written."""

    def to_json(self) -> dict[str, Any]:
        """All figures as plain JSON; the model by its name."""
        figures = asdict(replace(self, model=None))
        figures["model"] = figures.pop("model_name")
        return {"model": figures["model"], **figures}

    def lasting(self) -> dict[str, Any]:
        """What is the same whenever and wherever the run is made again: no place, no times, no memory."""
        passing = ("output", "forward_seconds", "peak_memory_bytes", "stages")
        return {key: value for key, value in self.to_json().items() if key not in passing}


def peak_memory_bytes() -> int:
    """Highest resident memory of the process so far, plus the highest allocation on each GPU."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024
    peak += sum(torch.cuda.max_memory_allocated(gpu) for gpu in range(torch.cuda.device_count()))
    return int(peak)


def tool_version() -> str:
    """The installed version of this package."""
    try:
        return version("fbn-prune")
    except PackageNotFoundError:
        return "0+unknown"
