"""optipfair's depth pruning, the peer of `--structures layers`: needs `pip install 'fbn-prune[real]'`.

It leaves out the layers that turn the hidden states least on the calibration text, and refits nothing.
"""

from __future__ import annotations

import time
from typing import Any

from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.perplexity import perplexity
from fbn_prune.recipe import Recipe
from fbn_prune.runs.opening import read_texts
from fbn_prune.runs.setup import prepare


def least_turning(model: Any, rows: list[dict[str, Any]], gone: int) -> Any:
    """Return a model in memory without the `gone` layers that turn its hidden states least.

    Parameters
    ----------
    rows
        The calibration text, with `input_ids` [1, length] in each row.
    """
    import optipfair

    turned = optipfair.analyze_layer_importance(model, rows, show_progress=False)
    least = sorted(turned, key=lambda layer: float(turned[layer]))[:gone]
    return optipfair.prune_model(
        model, pruning_type="DEPTH", layer_indices=sorted(least), show_progress=False
    )


def cell(settings: dict[str, Any], parameters: int) -> dict[str, Any]:
    """Return a cell of `structures_table.py`: the largest model of fewer layers with at most so many parameters."""
    prepared = prepare(Recipe(**settings, sparsity=0.5, allow_untrained=True))
    tokenizer = prepared.checkpoint.load_tokenizer()
    data, _ = read_texts(prepared, tokenizer)
    held_out = data.held_out.batches(prepared.batch_tokens)
    adapter = prepared.load_whole_model()
    before, model = perplexity(adapter, held_out), adapter.model
    whole = sum(each.numel() for each in model.parameters())
    one = sum(each.numel() for each in adapter.layers[0].parameters())
    start = time.perf_counter()
    gone = -(-(whole - parameters) // one)
    rows = [{"input_ids": block[None]} for block in data.calibrating.blocks]
    cut = least_turning(model, rows, gone)
    seconds = time.perf_counter() - start
    return {
        "perplexity_before": before,
        "perplexity_after": perplexity(ModelAdapter(cut), held_out),
        "parameters_before": whole,
        "parameters_after": sum(each.numel() for each in cut.parameters()),
        "seconds": round(seconds, 1),
        "layers_left_out": gone,
        "trials": {},
        "predicted": None,
    }
