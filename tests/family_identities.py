"""What every model family must hold, on a tiny random model of it: used by test_families and by CONTRIBUTING."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from tiny_models import make_model, make_tokenizer
from transformers import AutoModelForCausalLM, PretrainedConfig

from fbn_prune.export.writer import write_checkpoint
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.surgery import MlpCut

IDS = torch.arange(40)[None]


def check_family(config: PretrainedConfig) -> None:
    """Assert the identities: keep all, remove silent neurons, write and reload."""
    with torch.no_grad(), tempfile.TemporaryDirectory() as scratch:
        model = make_model("", config=config)
        dense = model(IDS).logits
        adapter = ModelAdapter(model)
        widths = adapter.widths
        for layer, width in enumerate(widths):
            adapter.down_weight(layer)[:, ::2] = 0.0
            assert torch.equal(
                adapter.down_weight(layer)[:, 1::2].ne(0).any(0), torch.ones(width // 2).bool()
            )
        silent = model(IDS).logits
        assert not torch.allclose(silent, dense)
        folder = Path(scratch) / "model"
        model.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        source = Checkpoint.open(folder)
        for kept in (slice(None), slice(1, None, 2)):
            cuts = []
            for layer, width in enumerate(widths):
                neurons = torch.arange(width)[kept]
                cuts.append(MlpCut(neurons, ModelAdapter(model).down_weight(layer)[:, neurons]))
            live = ModelAdapter(AutoModelForCausalLM.from_pretrained(folder).eval())
            for layer, cut in enumerate(cuts):
                live.cut(layer, cut)
            assert torch.allclose(live.model(IDS).logits, silent, atol=1e-4)
            out = Path(scratch) / f"{len(neurons)}"
            out.mkdir()
            write_checkpoint(source, cuts, out)
            reloaded = AutoModelForCausalLM.from_pretrained(out).eval()
            assert torch.equal(reloaded(IDS).logits, live.model(IDS).logits)
