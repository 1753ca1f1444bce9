"""Build a model from its config, and repair settings that keep transformers from it though the weights are sound."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from fbn_prune.errors import FbnPruneError, InvalidInput
from fbn_prune.model.family import Family, as_config
from fbn_prune.model.head_groups import layer_facts
from fbn_prune.model.headers import INDEX_FILE, SINGLE_FILE, one_line, read_object
from fbn_prune.model.modeling_ragged import ragged_class

_ATTENTION = ("attn_implementation", "_attn_implementation")
_ROPE = ("rope_parameters", "rope_scaling")
_OLD_ROPE = {"su": "longrope", "mrope": "default"}
"""Old names of rotary embeddings that compute the same under a present name. `mrope` does so for text alone."""


def repaired(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a `config.json` object that transformers opens on this machine, and one line for each change.

    An attention kernel that is not installed is left to transformers' choice, old names of rotary embeddings are
    replaced by the present ones, and a rotary base that is text becomes a number. The model computes the same.
    """
    result, lines = dict(config), []
    for key in _ATTENTION:
        named = result.get(key)
        if isinstance(named, str) and not _available(named):
            del result[key]
            lines.append(
                f"config.json asks for the attention {named!r}, which is not installed here: transformers' own choice "
                f"is used, and what is written does not say {key}"
            )
    for key in _ROPE:
        if not isinstance(rope := result.get(key), Mapping):
            continue
        rope = dict(rope)
        for name in ("rope_type", "type"):
            if isinstance(old := rope.get(name), str) and old in _OLD_ROPE:
                rope[name] = _OLD_ROPE[old]
                rope.pop("mrope_section", None)
                lines.append(
                    f"config.json names the rotary embedding {old!r}: read as {rope[name]!r}, and written so"
                )
        lines += _number(rope)
        if rope != result[key]:
            result[key] = rope
    lines += _number(result)
    if result.get("quantization_config") == {}:
        del result["quantization_config"]
        lines.append("config.json has an empty quantization_config: left out")
    return result, list(dict.fromkeys(lines))


def _available(attention: str) -> bool:
    """Whether transformers can build a model with this attention here."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.utils import is_flash_attn_2_available

    if attention == "flash_attention_2":
        return bool(is_flash_attn_2_available())
    return attention == "eager" or (
        attention in ALL_ATTENTION_FUNCTIONS and not attention.startswith("flash_attention")
    )


def _number(fields: dict[str, Any]) -> list[str]:
    """Replace a `rope_theta` that is the text of a number; returns one line if it does."""
    theta = fields.get("rope_theta")
    if not isinstance(theta, str):
        return []
    try:
        fields["rope_theta"] = float(theta)
    except ValueError:
        return []
    return [f"config.json gives rope_theta as text ({theta!r}): read as the number, and written so"]


@contextmanager
def building(path: Path, verb: str = "build") -> Iterator[None]:
    """Turn whatever transformers raises on a config that it cannot build or run a model from into one line.

    Raises
    ------
    InvalidInput
        Something inside the context failed for another reason than memory.
    """
    try:
        yield
    except (FbnPruneError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers raises any type on values that it does not expect
        line = one_line(error)
        kind = type(error).__name__
        what = line if isinstance(error, OSError | ValueError | RuntimeError) else f"{kind}: {line}"
        raise InvalidInput(
            f"{path}: transformers cannot {verb} the model that config.json describes: {what}"
        ) from error


def check_companions(path: Path) -> None:
    """Refuse a `generation_config.json` that transformers cannot read.

    Raises
    ------
    InvalidInput
        It is no JSON object.
    """
    if (file := path / "generation_config.json").is_file():
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return  # transformers ignores it
        if not isinstance(content, dict):
            raise InvalidInput(
                f"{file} must hold a JSON object, found {type(content).__name__}: correct or delete it"
            )


def stock_class(config: PretrainedConfig) -> Any:
    """Return transformers' class of a config's model: a causal one, or that of the model around a text model.

    Some types with a text model inside have both. The whole model is taken then, so that nothing of it is lost.

    Raises
    ------
    InvalidInput
        transformers has no causal model class for the type.
    """
    kind = type(config)
    around = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if config.get_text_config(decoder=True) is not config and kind in around:
        return around[kind]
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING:
        return MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    raise InvalidInput(
        f"transformers has no causal language model of model_type {config.model_type!r}"
    )


def build(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return the stock model of a typed config with random weights, on the current device."""
    model: PreTrainedModel = stock_class(config)._from_config(config, dtype=dtype)
    return model


def skeleton(config: Mapping[str, Any], family: Family, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model of a `config.json` object on the meta device, without reading weights."""
    model: PreTrainedModel
    with init_empty_weights(include_buffers=False):
        if facts := layer_facts(family, config):
            typed = as_config({**config, **facts})
            model = ragged_class(stock_class(typed))(typed)
        else:
            model = build(as_config(config), dtype)
    return model


@contextmanager
def loadable_folder(path: Path, config: Mapping[str, Any]) -> Iterator[Path]:
    """Yield a folder that transformers loads: the checkpoint's, or links to its files beside repaired JSON files.

    Parameters
    ----------
    path
        The checkpoint's folder.
    config
        The `config.json` object to load the model by.
    """
    index = None
    if (path / INDEX_FILE).is_file() and not (path / SINGLE_FILE).is_file():
        content = read_object(path / INDEX_FILE)
        if not isinstance(content.get("metadata"), dict):
            index = {**content, "metadata": {}}
    if index is None and read_object(path / "config.json") == config:
        yield path
        return
    with TemporaryDirectory() as folder:
        links = Path(folder)
        for file in path.iterdir():
            os.symlink(file.resolve(), links / file.name)
        changed = {"config.json": dict(config), **({} if index is None else {INDEX_FILE: index})}
        for name, fields in changed.items():
            (links / name).unlink()
            (links / name).write_text(json.dumps(fields), encoding="utf-8")
        yield links


def named(model: PreTrainedModel, path: Path) -> None:
    """Let a model that was loaded through :func:`loadable_folder` name its checkpoint's own folder."""
    model.name_or_path = str(path)
    model.config._name_or_path = str(path)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppress transformers' progress bar and load report: the caller turns the report into errors."""
    shown = transformers_logging.is_progress_bar_enabled()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(max(verbosity, transformers_logging.ERROR))
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()
