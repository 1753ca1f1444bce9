"""The README of a pruned model: its source, what was cut, what that costs, how to load it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load

_LICENSE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class CardFacts:
    """What a model card states; every figure comes from the run.

    Attributes
    ----------
    base_name : the source model as the user gave it.
    base_hub_id : its Hub id, None if it was a local folder.
    license : the source card's licence keys (`source_license`).
    criterion : how the neurons were chosen, in words.
    widths : neurons kept, by layer.
    neurons_before : neurons of one layer of the source.
    heads_before, heads_after : attention heads of all layers.
    kept_networks, total_networks : functional networks kept and found; None if they set no budget.
    calibration, held_out : the texts, in words.
    perplexity_before, perplexity_after : on the held-out share; None if not measured.
    perplexity_cut : the same before the weights were trained; None if they were not.
    warning : what a check of the result found amiss; None if nothing.
    command : the command line that makes the model again.
    """

    base_name: str
    base_hub_id: str | None
    criterion: str
    widths: tuple[int, ...]
    neurons_before: int
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    calibration: str
    held_out: str
    command: str
    version: str
    heads_before: int = 0
    heads_after: int = 0
    kept_networks: int | None = None
    total_networks: int | None = None
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    perplexity_cut: float | None = None
    warning: str | None = None
    license: dict[str, str] = field(default_factory=dict)


def source_license(readme: Path) -> dict[str, str]:
    """The licence keys in the front matter of the source's card; empty if there are none to be read."""
    try:
        metadata = metadata_load(readme) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {key: metadata[key] for key in _LICENSE_KEYS if isinstance(metadata.get(key), str)}


def model_card(facts: CardFacts) -> str:
    """The text of README.md, YAML front matter included."""
    name = _base(facts).rpartition("/")[2]
    return f"""---
{_front_matter(facts)}---

# {name}, pruned

{_what_was_cut(facts)}

| | before | after | change |
|---|---:|---:|---:|
{_table(facts)}

Perplexity is measured on {facts.held_out}.{_warning(facts)}

## Load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH_TO_THIS_FOLDER"{_trust(facts)})
tokenizer = AutoTokenizer.from_pretrained("PATH_TO_THIS_FOLDER")
```
{_why_trust(facts)}
## Make it again

`recipe.yaml` in this folder holds every setting of the run (fbn-prune {facts.version}):

```
{facts.command}
```
"""


def _ragged(facts: CardFacts) -> bool:
    return len(set(facts.widths)) > 1


def _trust(facts: CardFacts) -> str:
    return ", trust_remote_code=True" if _ragged(facts) else ""


def _why_trust(facts: CardFacts) -> str:
    if not _ragged(facts):
        return ""
    return """
The layers differ in width (`per_layer_config` in `config.json`), which transformers does not build by itself for this
architecture yet; `modeling_ragged.py` in this folder, a page of code, narrows each MLP to its width.
"""


def _warning(facts: CardFacts) -> str:
    return "" if facts.warning is None else f"\n\n**Warning:** {facts.warning}."


def _base(facts: CardFacts) -> str:
    """The source's name, without the folders that are its user's own business."""
    return facts.base_hub_id or Path(facts.base_name).name


def _front_matter(facts: CardFacts) -> str:
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["fbn-prune", "pruned"],
        **facts.license,
    }
    if facts.base_hub_id is not None:
        metadata["base_model"] = facts.base_hub_id
    return yaml.safe_dump(metadata, sort_keys=True, allow_unicode=True)


def _what_was_cut(facts: CardFacts) -> str:
    kept, total = sum(facts.widths), facts.neurons_before * len(facts.widths)
    narrow, wide = min(facts.widths), max(facts.widths)
    width = f"{wide}" if narrow == wide else f"{narrow} to {wide}"
    networks = ""
    if facts.kept_networks is not None:
        networks = (
            f" Of {facts.total_networks} functional networks {facts.kept_networks} set the budget."
        )
    return (
        f"Made from `{_base(facts)}` by removing {total - kept:,} of its {total:,} MLP neurons: each of the "
        f"{len(facts.widths)} layers keeps {width} of {facts.neurons_before}.{networks} "
        f"Neurons were chosen by {facts.criterion}, on {facts.calibration}. {_the_rest(facts)}"
    )


def _the_rest(facts: CardFacts) -> str:
    heads = ""
    if facts.heads_after < facts.heads_before:
        heads = (
            f"Of {facts.heads_before:,} attention heads {facts.heads_after:,} stay, as many in every layer, chosen by "
            "second-order cost in whole key-value groups and refitted. "
        )
    if facts.perplexity_cut is None:
        attention = "Norms" if heads else "Attention, norms"
        return f"{heads}{attention} and embeddings are unchanged."
    return (
        f"{heads}Then the linear maps of the layers were trained towards the source model's outputs on that text, "
        f"which took the perplexity from {facts.perplexity_cut:.2f} to {facts.perplexity_after:.2f}; "
        "norms and embeddings are unchanged."
    )


def _table(facts: CardFacts) -> str:
    rows = [
        _row("parameters", facts.parameters_before, facts.parameters_after, "{:,}"),
        _row(
            "MLP neurons",
            facts.neurons_before * len(facts.widths),
            sum(facts.widths),
            "{:,}",
        ),
        *(
            [_row("attention heads", facts.heads_before, facts.heads_after, "{:,}")]
            if facts.heads_after < facts.heads_before
            else []
        ),
        _row("weights on disk (MB)", facts.bytes_before / 1e6, facts.bytes_after / 1e6, "{:,.1f}"),
    ]
    if facts.perplexity_before is not None and facts.perplexity_after is not None:
        rows.append(_row("perplexity", facts.perplexity_before, facts.perplexity_after, "{:.2f}"))
    return "\n".join(rows)


def _row(label: str, before: float, after: float, form: str) -> str:
    change = 100 * (after - before) / before
    return f"| {label} | {form.format(before)} | {form.format(after)} | {change:+.1f} % |"
