"""Claims about cutting in steps: each step goes on from the last, and together they are one cut."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_runs import arguments
from tiny_models import LAYERS, make_model

from fbn_prune.cli.main import _exit_code
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.surgery import MlpCut
from fbn_prune.pruning.recovery import healing
from fbn_prune.runs.kept import Part
from fbn_prune.runs.progressive import composed, step_widths
from fbn_prune.store import Store


@given(
    sizes=st.lists(st.tuples(st.integers(1, 400), st.floats(0.0, 1.0)), min_size=1, max_size=5),
    count=st.integers(1, 6),
    multiple=st.sampled_from([1, 8, 64]),
)
def test_each_step_is_narrower_and_the_last_has_the_widths_that_were_asked_for(
    sizes: list[tuple[int, float]], count: int, multiple: int
) -> None:
    whole = [size for size, _ in sizes]
    last = [max(1, round(size * share)) for size, share in sizes]
    before = whole
    for step in range(1, count + 1):
        now = step_widths(whole, last, step, count, multiple)
        assert all(c <= b <= a for a, b, c in zip(whole, before, now, strict=True))
        for width, most, least in zip(now, whole, last, strict=True):
            assert width % multiple == 0 or width in (most, least)
        before = now
    assert before == last


def test_the_cuts_of_all_steps_in_one_cut_the_whole_model_as_they_did() -> None:
    whole = ModelAdapter(make_model("llama"))
    stepwise = copy.deepcopy(whole)
    cuts: list[MlpCut] = []
    for keep in (slice(None, None, 2), slice(1, None, 3)):
        made = []
        for layer in range(LAYERS):
            kept = torch.arange(stepwise.widths[layer])[keep]
            made.append(MlpCut(kept, stepwise.down_weight(layer)[:, kept].float()))
        stepwise.cuts.clear()
        for layer, cut in enumerate(made):
            stepwise.cut(layer, cut)
        cuts = composed(cuts, made)
    for layer, cut in enumerate(cuts):
        whole.cut(layer, cut)
    assert whole.widths == stepwise.widths == [4] * LAYERS
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(whole.model(ids).logits, stepwise.model(ids).logits)


@pytest.mark.parametrize("prefix", ["", "a-"])
def test_a_part_of_a_store_sees_its_own_names_alone(
    prefix: str, tmp_path: pytest.TempPathFactory
) -> None:
    store = Store(tmp_path)  # type: ignore[arg-type]
    part, other = Part(store, "one-"), Part(store, "two-")
    part.write(f"{prefix}1", lambda put: put(b"first"))
    part.write(f"{prefix}2", lambda put: put(b"second"), replaces=[f"{prefix}1"])
    other.write(f"{prefix}1", lambda put: put(b"other"))
    assert part.names(prefix) == [f"{prefix}2"]
    assert (part.read(f"{prefix}1"), part.read(f"{prefix}2")) == (None, b"second")
    assert part.read_last(prefix) == b"second"
    assert store.names("") == [f"one-{prefix}2", f"two-{prefix}1"]
    assert part.kept(f"{prefix}2", lambda: "new", str.encode, bytes.decode) == "second"


def test_weights_that_the_checkpoint_cannot_hold_after_the_steps_end_in_one_line(
    tiny: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Else the trained model would be measured, and the one before the training written."""
    monkeypatch.setattr(healing, "healed_tensors", lambda adapter, checkpoint: None)
    job = [*arguments(tiny, text), "--sparsity", "0.5", "--tokens", "1500", "--context", "40"]
    more = ["--recover", "--recover-cuts", "2", "--recover-passes", "1"]
    assert _exit_code([*job, *more, "--output", str(tmp_path / "out")]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(said) == 1
    assert "left weights that the checkpoint's dtype cannot hold" in said[0]
    assert not (tmp_path / "out").exists()
