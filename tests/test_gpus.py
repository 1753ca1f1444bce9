"""On a machine with two GPUs the main job, with its model spread over both, comes to what one GPU comes to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_runs import recipe, tensors
from tiny_models import save_tiny

from fbn_prune.progress import StageClock
from fbn_prune.runs import memory
from fbn_prune.runs.main_job import run_prune
from fbn_prune.runs.memory import MemoryPlan, plan_memory
from fbn_prune.runs.setup import prepare

if torch.cuda.device_count() < 2:
    pytest.skip("there are no two GPUs", allow_module_level=True)


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"sequential": True}, {"layout": "auto", "loss_aware": True}, {"recover": True}],
    ids=lambda changes: "-".join(changes) or "default",
)
def test_the_job_spread_over_two_comes_to_what_one_comes_to(
    name: str,
    changes: dict[str, object],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = save_tiny(tmp_path / "model", name)
    first = recipe(model, text, tmp_path / "one", device="cuda:0", **changes)
    one = run_prune(first, StageClock())

    def spread(*args: object) -> MemoryPlan:
        return replace(plan_memory(*args), placement=(0, 1, 1))

    monkeypatch.setattr("fbn_prune.runs.setup.plan_memory", spread)
    both = recipe(model, text, tmp_path / "two", device="cuda", **changes)
    two = run_prune(both, StageClock())
    assert two.widths == one.widths
    assert two.perplexity_after == pytest.approx(one.perplexity_after, rel=1e-3)
    torch.testing.assert_close(
        tensors(tmp_path / "two"), tensors(tmp_path / "one"), rtol=1e-3, atol=1e-3
    )


def test_a_model_too_large_for_the_first_gpu_is_loaded_onto_both(
    tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 0)
    prepared = prepare(recipe(tiny, text))
    assert prepared.memory.placement is not None
    adapter = replace(prepared, memory=replace(prepared.memory, placement=(0, 0, 1))).load_model()
    assert {parameter.device.index for parameter in adapter.model.parameters()} == {0, 1}
