"""Write the model card (README.md) of a pruned model: source, what was removed, the effect, how to load it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load

_LICENSE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class CardFacts:
    """The facts of a model card, all from the run.

    Attributes
    ----------
    base_name
        The source model as the user named it.
    base_hub_id
        Its Hub id; None for a local folder.
    license
        The licence keys of the source's card, from :func:`source_license`.
    criterion
        How the neurons were chosen, in words.
    widths
        Number of neurons kept, by layer that stays.
    widths_before
        Number of neurons in the source, by layer.
    heads_before, heads_after
        Number of attention heads in all layers.
    own_head_groups
        Groups of attention heads of each layer, where no stock class builds them; None where one does.
    tokens
        Number of tokens before and after; None if the vocabulary was not trimmed.
    kept_networks, total_networks
        Number of functional networks kept and found; None if they did not set the budget.
    calibration, held_out
        The texts, in words.
    perplexity_before, perplexity_after
        On the held-out text; None if not measured.
    perplexity_cut
        The same after cutting and before training; None without training.
    trained_on, mlps_alone
        The text that the cut model was trained on, in words, and whether only its MLPs were trained.
    experts
        Experts of a layer before and after, and the neurons of one before and after; None if there are none.
    warning
        The warning of the check after pruning; None without one.
    command
        The command line that reproduces the model.
    """

    base_name: str
    base_hub_id: str | None
    criterion: str
    widths: tuple[int, ...]
    widths_before: tuple[int, ...]
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
    own_head_groups: tuple[int, ...] | None = None
    tokens: tuple[int, int] | None = None
    kept_networks: int | None = None
    total_networks: int | None = None
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    perplexity_cut: float | None = None
    trained_on: str = "the calibration text"
    mlps_alone: bool = False
    experts: tuple[int, int, int, int] | None = None
    warning: str | None = None
    license: dict[str, str] = field(default_factory=dict)


def source_license(readme: Path) -> dict[str, str]:
    """Return the licence keys in the front matter of the source's card; empty if it has none or is unreadable."""
    try:
        metadata = metadata_load(readme) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {key: metadata[key] for key in _LICENSE_KEYS if isinstance(metadata.get(key), str)}


def model_card(facts: CardFacts) -> str:
    """Return the text of README.md, with its YAML front matter."""
    name = _base(facts).rpartition("/")[2]
    return f"""---
{_front_matter(facts)}---

# {name}, pruned

{_what_was_cut(facts)}

| | before | after | change |
|---|---:|---:|---:|
{_table(facts)}

Perplexity is measured on {facts.held_out}{_before_trimming(facts)}.{_warning(facts)}

## Load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH_TO_THIS_FOLDER"{_trust(facts)})
tokenizer = AutoTokenizer.from_pretrained("PATH_TO_THIS_FOLDER")
```
{_why_trust(facts)}
## Reproduce it

`recipe.yaml` in this folder holds every setting of the run (fbn-prune {facts.version}):

```
{facts.command}
```
"""


def _differ_in(facts: CardFacts) -> list[str]:
    """In what the layers differ, so that no stock class builds them."""
    different = []
    if len(set(facts.widths)) > 1:
        different.append("width (`per_layer_config` in `config.json`)")
    if facts.own_head_groups is not None:
        different.append("attention heads (`attention_groups` in `config.json`)")
    return different


def _trust(facts: CardFacts) -> str:
    return ", trust_remote_code=True" if _differ_in(facts) else ""


def _why_trust(facts: CardFacts) -> str:
    different = _differ_in(facts)
    if not different:
        return ""
    return f"""
The layers differ in {_listed(different)}, which transformers does not yet support for this
architecture. The short file `modeling_ragged.py` in this folder gives each layer its size.
"""


def _before_trimming(facts: CardFacts) -> str:
    return "" if facts.tokens is None else ", before the vocabulary was trimmed"


def _warning(facts: CardFacts) -> str:
    return "" if facts.warning is None else f"\n\n**Warning:** {facts.warning}."


def _base(facts: CardFacts) -> str:
    """Return the source's Hub id, or the last part of its local path, which keeps private folder names out."""
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
    kept, total = sum(facts.widths), sum(facts.widths_before)
    networks = ""
    if facts.kept_networks is not None:
        networks = (
            f" {facts.kept_networks} of {facts.total_networks} functional networks set the budget."
        )
    layers, before = len(facts.widths), len(facts.widths_before)
    fewer = "" if layers == before else f" and {before - layers} of {before} layers"
    if facts.experts is not None:
        count, count_after, width, width_after = facts.experts
        return (
            f"Made from `{_base(facts)}`, a mixture of experts: each of the {len(facts.widths)} layers with experts "
            f"keeps {count_after} of {count} experts, and each expert {width_after} of {width} neurons. They were "
            f"chosen by {facts.criterion}, on {facts.calibration}. The router keeps the rows of the experts "
            "that stay; shared experts, other MLPs, attention, norms and embeddings are unchanged."
        )
    return (
        f"Made from `{_base(facts)}` by removing {total - kept:,} of its {total:,} MLP neurons{fewer}: each of the "
        f"{layers} layers keeps {_span(facts.widths)} of {_span(facts.widths_before)}.{networks} "
        f"Neurons were chosen by {facts.criterion}, on {facts.calibration}. {_the_rest(facts)}"
    )


def _span(widths: tuple[int, ...]) -> str:
    narrow, wide = min(widths), max(widths)
    return f"{wide}" if narrow == wide else f"{narrow} to {wide}"


def _the_rest(facts: CardFacts) -> str:
    heads = ""
    if facts.heads_after < facts.heads_before:
        heads = (
            f"{facts.heads_after:,} of {facts.heads_before:,} attention heads remain, {_heads_by_layer(facts)}, "
            "chosen by second-order cost in whole key-value groups and refitted. "
        )
    unchanged = ["attention", "norms", "embeddings"]
    if heads:
        unchanged.remove("attention")
    vocabulary = ""
    if facts.tokens is not None:
        unchanged.remove("embeddings")
        before, after = facts.tokens
        vocabulary = (
            f" The vocabulary has {after:,} of {before:,} tokens left, with new ids; the embeddings of these are "
            "unchanged."
        )
    if facts.perplexity_cut is None:
        return f"{heads}{_listed(unchanged).capitalize()} are unchanged.{vocabulary}"
    if "attention" in unchanged and not facts.mlps_alone:  # its linear layers were trained too
        unchanged.remove("attention")
    trained = "MLPs" if facts.mlps_alone else "linear layers"
    return (
        f"{heads}Then the {trained} were trained to reproduce the source model's outputs on {facts.trained_on}, "
        f"which reduced the perplexity from {facts.perplexity_cut:.2f} to {facts.perplexity_after:.2f}; "
        f"{_listed(unchanged)} are unchanged.{vocabulary}"
    )


def _heads_by_layer(facts: CardFacts) -> str:
    groups = facts.own_head_groups
    if groups is None:
        return "the same number in each layer"
    none = groups.count(0)
    without = f", and no attention in {none} of {len(groups)}" if none else ""
    kept = [count for count in groups if count]
    spread = _span(tuple(kept)) if kept else "0"
    return f"with {spread} key-value heads in a layer{without}"


def _listed(words: list[str]) -> str:
    return " and ".join([*([", ".join(words[:-1])] if words[:-1] else []), words[-1]])


def _table(facts: CardFacts) -> str:
    rows = [
        _row("parameters", facts.parameters_before, facts.parameters_after, "{:,}"),
        _row(
            "MLP neurons",
            sum(facts.widths_before),
            sum(facts.widths),
            "{:,}",
        ),
        *(
            [_row("layers", len(facts.widths_before), len(facts.widths), "{:,}")]
            if len(facts.widths) < len(facts.widths_before)
            else []
        ),
        *(
            [_row("attention heads", facts.heads_before, facts.heads_after, "{:,}")]
            if facts.heads_after < facts.heads_before
            else []
        ),
        *([] if facts.tokens is None else [_row("tokens", *facts.tokens, "{:,}")]),
        _row("weights on disk (MB)", facts.bytes_before / 1e6, facts.bytes_after / 1e6, "{:,.1f}"),
    ]
    if facts.perplexity_before is not None and facts.perplexity_after is not None:
        rows.append(_row("perplexity", facts.perplexity_before, facts.perplexity_after, "{:.2f}"))
    return "\n".join(rows)


def _row(label: str, before: float, after: float, form: str) -> str:
    change = 100 * (after - before) / before
    return f"| {label} | {form.format(before)} | {form.format(after)} | {change:+.1f} % |"
