"""Try every causal model type of transformers, and write the table of docs/model_types.md.

    python eval/robustness/model_types.py            # prints the table
    python eval/robustness/model_types.py --write    # writes docs/model_types.md

Each type's own config class gives a config, a tiny random copy of it is built, its MLPs are found by structure, and the
identities are tried out. No network is needed; about a minute on one core.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fbn_prune.errors import InvalidInput
from fbn_prune.model.decoder_layers import NotFound
from fbn_prune.model.experts import mixture
from fbn_prune.model.families import refuse_obstacles
from fbn_prune.model.found_family import FoundFamily
from fbn_prune.model.identities import failed_step
from fbn_prune.model.mixture_family import MixtureFamily, mixture_family
from fbn_prune.model.mixture_identities import failed_mixture_step
from fbn_prune.model.structure import find_family
from fbn_prune.model.tiny_copy import tiny_config

PAGE = Path(__file__).parents[2] / "docs" / "model_types.md"
TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

VALUES: Mapping[str, Mapping[str, Any]] = {
    # The defaults of these classes describe no model; every checkpoint says it.
    "deepseek_v2": {"num_experts_per_tok": 6},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 8},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "ministral": {"head_dim": 128},
    "ministral3": {"head_dim": 128},
    "nemotron": {"head_dim": 128, "num_key_value_heads": 8},
    "xmod": {"default_language": "en_XX"},
    # The type has models with experts and models without: those without are tried out.
    "granitemoehybrid": {"num_local_experts": 0},
    # Gemma 3n's first ten layers keep only the largest activations, so that their neurons depend on each other. The
    # copy has fewer layers than that.
    "gemma3n_text": {"activation_sparsity_pattern": [0.0] * 35},
}
"""Config values that differ from the class's defaults."""

_MOST_LAYERS = 4


@dataclass(frozen=True)
class Outcome:
    """What becomes of a model type.

    Attributes
    ----------
    family
        What was found; None if nothing was.
    reason
        Why it is refused, as a predicate; None if all identities hold.
    """

    model_type: str
    family: FoundFamily | None
    reason: str | None

    @property
    def row(self) -> str:
        """The type's row of the table."""
        if self.family is None:
            return f"| {self.model_type} | | | {self.reason} |"
        if isinstance(self.family, MixtureFamily):
            keys = ", ".join((*self.family.count_keys, *self.family.width_keys))
            place = f"{self.family.layers}: {self.family.experts} (experts)"
            return f"| {self.model_type} | {place} | {keys} | {self.reason or 'passes'} |"
        inputs = ", ".join(
            f"{one.path} (both halves)" if one.stacked == 2 else one.path
            for one in self.family.inputs
        )
        place = f"{self.family.layers}: {inputs} -> {self.family.output.path}"
        key = self.family.width_key
        if self.family.text_key is not None:
            key = f"{self.family.text_key}.{key}"
        return f"| {self.model_type} | {place} | {key} | {self.reason or 'passes'} |"


def outcome(model_type: str) -> Outcome:
    """Find the MLPs of a type and try out the identities."""
    try:
        config = small_config(model_type)
    except InvalidInput as error:
        return Outcome(model_type, None, _short(str(error).partition("; supported")[0]))
    except Exception as error:  # a class whose defaults it does not accept itself
        return Outcome(
            model_type, None, _short(f"has a config class without usable defaults: {error}")
        )
    if mixture(config.to_dict()) is not None:
        return _mixture_outcome(model_type, config)
    try:
        family = find_family({**config.to_dict(), "model_type": model_type})
    except (NotFound, InvalidInput) as error:
        return Outcome(model_type, None, _short(str(error)))
    return Outcome(model_type, family, _short(failed_step(family, config)))


def _mixture_outcome(model_type: str, config: PretrainedConfig) -> Outcome:
    try:
        family = mixture_family({**config.to_dict(), "model_type": model_type})
    except InvalidInput as error:
        return Outcome(model_type, None, _short(str(error).partition("; supported")[0]))
    return Outcome(model_type, family, _short(failed_mixture_step(config)))


def small_config(model_type: str) -> PretrainedConfig:
    """Return the config of a tiny copy with few layers.

    Raises
    ------
    InvalidInput
        The type's models are refused by their config alone.
    """
    config = CONFIG_MAPPING[model_type](**VALUES.get(model_type, {}))
    for key, value in (("is_decoder", True), ("is_encoder_decoder", False)):  # as causal models say
        if hasattr(config, key):
            setattr(config, key, value)
    refuse_obstacles({**config.to_dict(), "model_type": model_type}, mixtures=True)
    text = config.get_text_config(decoder=True)
    lists = ("layer_types", "layers_block_type", "mlp_layer_types")
    whole = max(_with_every_kind(getattr(text, key, None) or [""]) for key in lists)
    return tiny_config(config, min(max(2, whole), _MOST_LAYERS))


def _with_every_kind(kinds: Sequence[str]) -> int:
    """Return how many of the first layers have every kind."""
    return next(count for count in range(1, len(kinds) + 1) if set(kinds[:count]) == set(kinds))


def _short(reason: str | None) -> str | None:
    if reason is None:
        return None
    line = " ".join(reason.split()).replace("|", "/")
    head, _, rest = line.partition("' ")
    if head.startswith("model_type '"):
        line = rest
    return line if len(line) <= 160 else f"{line[:157]}..."


def page(outcomes: list[Outcome]) -> str:
    """Return the text of docs/model_types.md."""
    passing = sum(outcome.reason is None for outcome in outcomes)
    rows = "\n".join(outcome.row for outcome in outcomes)
    return (
        (PAGE.read_text(encoding="utf-8") if PAGE.exists() else _HEAD).partition("<!-- table")[0]
        + f"<!-- table: eval/robustness/model_types.py --write -->\n\n{passing} of {len(outcomes)} types pass.\n\n"
        + ("| model_type | layers: inputs -> output | width | result |\n|---|---|---|---|\n")
        + rows
        + "\n"
    )


_HEAD = "# Model types\n\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    parser.add_argument("types", nargs="*", default=list(TYPES))
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    outcomes = []
    for model_type in given.types:
        outcomes.append(outcome(model_type))
        print(outcomes[-1].row, flush=True)
    print(f"{sum(one.reason is None for one in outcomes)} of {len(outcomes)} types pass")
    if given.write:
        PAGE.write_text(page(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main()
