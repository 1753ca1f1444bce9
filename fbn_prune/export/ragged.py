"""A checkpoint whose layers have MLPs of different widths.

The widths are written in the form that transformers has for it, `per_layer_config`. As long as its architectures do
not build from that themselves, the folder carries one file of code, `modeling_ragged.py`, named by `auto_map`: such a
checkpoint loads with `trust_remote_code=True`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from fbn_prune.export.directory import disk_errors
from fbn_prune.export.shards import write_json
from fbn_prune.export.writer import copy_companions, write_tensors
from fbn_prune.model import modeling_ragged
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.families import Family, as_config
from fbn_prune.model.surgery import MlpCut, kept_head_groups, pruned_config
from fbn_prune.store import Store


def write_ragged_checkpoint(
    source: Checkpoint,
    family: Family,
    cuts: Sequence[MlpCut],
    directory: Path,
    *,
    trained: Mapping[str, Tensor] | None = None,
    max_shard_size: int | str = "5GB",
    progress: Callable[[int], None] | None = None,
    store: Store | None = None,
) -> None:
    """Write the cut model, its layers of any widths, with its config, code file, tokenizer and licence.

    Parameters and errors as in :func:`fbn_prune.export.writer.write_checkpoint`; the cuts need not be of one width.
    """
    needs_bias = any(cut.down_bias is not None for cut in cuts)
    config = ragged_config(
        source.config, family, [cut.width for cut in cuts], needs_bias, kept_head_groups(cuts)
    )
    with disk_errors(directory):
        write_tensors(
            source,
            family,
            cuts,
            directory,
            trained=trained,
            max_shard_size=max_shard_size,
            progress=progress,
            store=store,
        )
        write_json(directory / "config.json", config)
        copy_companions(source, directory)
        code = Path(modeling_ragged.__file__)
        shutil.copyfile(code, directory / code.name)


def ragged_config(
    config: Mapping[str, Any],
    family: Family,
    widths: Sequence[int],
    needs_bias: bool,
    head_groups: int | None = None,
) -> dict[str, Any]:
    """The `config.json` object of a model with one width a layer; the rest as in :func:`pruned_config`.

    The common width stays the source's, which every layer's own one overrides where it differs.
    """
    common = family.width(config)
    ragged = pruned_config(config, family, common, needs_bias, head_groups)
    typed = type(as_config(config))
    stock: dict[str, Any] = {
        "AutoModel": MODEL_MAPPING[typed],
        "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING[typed],
    }
    # `transformers serve` opens a checkpoint's own code by this name alone; by any other it takes the stock class.
    stock["AutoModelForDecision"] = stock["AutoModelForCausalLM"]
    classes = {auto: model_class.__name__ for auto, model_class in stock.items()}
    file = modeling_ragged.__name__.rpartition(".")[2]
    return {
        **ragged,
        "architectures": [classes["AutoModelForCausalLM"]],
        "auto_map": {auto: f"{file}.{name}" for auto, name in classes.items()},
        "per_layer_config": {
            str(layer): {family.width_key: width}
            for layer, width in enumerate(widths)
            if width != common
        },
        "ragged_mlp": family.mlp_facts(),
    }
