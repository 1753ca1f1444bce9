"""Open a run: tokenize its texts, load its model, and find the store of its finished stages.

A run with an output has a store in its work directory. The name of its folder is a fingerprint of everything that
decides the bytes of the result, so the same command finds the stages that an unfinished run has left.
"""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from fbn_prune.data.calibration import (
    CalibrationData,
    TokenBlocks,
    calibration_data,
    check_ids,
    first_blocks,
)
from fbn_prune.data.forms import rendering_words
from fbn_prune.data.given import GivenData
from fbn_prune.data.text_files import GENERATED
from fbn_prune.distributed import is_first
from fbn_prune.errors import InvalidInput
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.layerwise import check_runs
from fbn_prune.networks.task_matching import TaskCalibration, task_calibration
from fbn_prune.progress import StageClock
from fbn_prune.runs.kept import tensors
from fbn_prune.runs.memory import cached_tokens
from fbn_prune.runs.prepared import Prepared
from fbn_prune.runs.result import tool_version
from fbn_prune.runs.second_run import output_locked
from fbn_prune.store import WRITTEN, Store, default_place, fingerprint, store_in

Texts = tuple[Sequence[str | GivenData], Sequence[str | GivenData]]
"""Sources of calibration text, and of text to recover on."""

PLACES = frozenset({"output", "overwrite", "work_dir", "max_shard_size", "memory_budget"})
"""Recipe keys that do not affect the weights that are written."""


@dataclass(frozen=True)
class OpenRun:
    """A prepared run with its texts, its model and its clock.

    Attributes
    ----------
    data
        Calibration blocks and held-out blocks, without those that contain a test question of the task.
    task
        The blocks of the task's examples and tests; None without a task.
    training
        The blocks to recover on; None for those of the calibration.
    dense
        A copy of the dense model as the target of the recovery; None if the recovery loads it itself.
    """

    prepared: Prepared
    tokenizer: Any
    data: CalibrationData
    task: TaskCalibration | None
    adapter: ModelAdapter
    clock: StageClock
    dense: ModelAdapter | None = None
    training: TokenBlocks | None = None

    @property
    def texts(self) -> str:
        """Fingerprints of all texts of the run: calibration, held-out, the task's, and those of the vocabulary."""
        blocks = [self.data.calibrating, self.data.held_out]
        if self.task is not None:
            blocks += [self.task.examples]
            blocks += [] if self.task.test is None else [self.task.test]
        if self.training is not None:
            blocks.append(self.training)
        prints = [each.fingerprint for each in blocks]
        if (vocabulary := self.prepared.vocabulary_cut) is not None:
            prints.append(vocabulary.fingerprint)
        return " ".join(prints)


def open_run(
    prepared: Prepared, clock: StageClock, *, whole: bool = False, store: Store | None = None
) -> OpenRun:
    """Read the texts of a prepared run and load its model.

    Parameters
    ----------
    store
        Keeps text that the model writes, and provides what an earlier run kept; None keeps nothing.
    whole
        Load the whole model into memory even if the memory plan streams it.

    Raises
    ------
    InvalidInput
        If a text cannot be read or is too short (see :func:`fbn_prune.data.calibration.calibration_data`), or the
        model cannot run.
    """
    recipe, tokenizer = prepared.recipe, prepared.checkpoint.load_tokenizer()

    def loaded() -> ModelAdapter:
        with clock.stage("load"):
            adapter = prepared.load_whole_model() if whole else prepared.load_model()
            check_runs(adapter, prepared.checkpoint.path)
        return adapter

    texts: Texts = (recipe.calibration, recipe.recover_text)
    before = None
    if recipe.writes_text:
        before = loaded()
        texts = written_texts(prepared, before, tokenizer, texts, clock, store or Store())
    with clock.stage("calibration"):
        data, task = read_texts(prepared, tokenizer, texts[0], note=clock.note)
        training = read_training_text(prepared, tokenizer, data, texts[1], note=clock.note)
    adapter = before or loaded()  # last, so that text that cannot be used is refused soon
    return OpenRun(prepared, tokenizer, data, task, adapter, clock, training=training)


def written_texts(
    prepared: Prepared,
    adapter: ModelAdapter,
    tokenizer: Any,
    texts: Texts,
    clock: StageClock,
    store: Store,
) -> Texts:
    """Return the sources of calibration and of recovery with text from the model in place of "generated"."""
    from fbn_prune.model.writing import write_text

    recipe = prepared.recipe
    calibrating = recipe.tokens / (1 - recipe.held_out)
    wanted = (calibrating, recipe.recover_tokens or recipe.tokens)
    cached = cached_tokens(
        prepared.checkpoint, prepared.dtype, prepared.batch_tokens, prepared.context
    )

    def source(given: str | GivenData, purpose: str, tokens: int) -> str | GivenData:
        if given != GENERATED:
            return given
        total = tokens + 2 * prepared.context  # blocks at both ends of a sample may be cut off
        with clock.stage(f"text for {purpose}", total, "tokens") as advance:

            def kept(batch: int, write: Callable[[], list[Tensor]]) -> list[Tensor]:
                def compute() -> dict[str, Tensor]:
                    return {f"{index:05d}": row for index, row in enumerate(write())}

                found = tensors(store, f"{WRITTEN}{purpose}-{batch:05d}", compute)
                return [found[name] for name in sorted(found)]

            rows = write_text(
                adapter.model,
                tokenizer,
                tokens=total,
                context=prepared.context,
                cached=cached,
                seed=f"{recipe.seed} {purpose}",
                kept=kept,
                advance=advance,
            )
        return GivenData(GENERATED, rows=tuple(rows))

    purposes = ("calibration", "recovery")
    found = [
        tuple(source(one, purpose, math.ceil(tokens / len(sources))) for one in sources)
        for sources, purpose, tokens in zip(texts, purposes, wanted, strict=True)
    ]
    return found[0], found[1]


def check_texts(prepared: Prepared) -> None:
    """Read the texts of a run that is not to be carried out, so that what cannot be used is refused.

    Text that the model would write is not written.
    """
    if not prepared.recipe.writes_text:
        read_texts(prepared, prepared.checkpoint.load_tokenizer())


def read_texts(
    prepared: Prepared,
    tokenizer: Any,
    sources: Sequence[str | GivenData] | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> tuple[CalibrationData, TaskCalibration | None]:
    """Return the calibration and held-out blocks of a run, and those of its task (None without a task).

    Parameters
    ----------
    sources
        Text to read instead of the recipe's calibration sources.
    note
        Called with a line on what was found in a source.
    """
    recipe = prepared.recipe
    vocabulary = prepared.family.vocab_size(prepared.checkpoint.config)
    data = calibration_data(
        recipe.calibration if sources is None else sources,
        tokenizer,
        tokens=recipe.tokens,
        context=prepared.context,
        held_out=recipe.held_out,
        seed=recipe.seed,
        vocabulary=vocabulary,
        note=note,
    )
    if prepared.task is None:
        return data, None
    if any(one.chat is not None for one in prepared.task.examples):
        note(f"{prepared.task.source}: conversations{rendering_words(tokenizer)}")
    task = task_calibration(
        prepared.task, data, tokenizer, context=prepared.context, vocabulary=vocabulary
    )
    return task.data, task


def read_training_text(
    prepared: Prepared,
    tokenizer: Any,
    data: CalibrationData,
    sources: Sequence[str | GivenData] | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> TokenBlocks | None:
    """Return the blocks of the recipe's `recover_text`, without those that are held out; None if it has no such text.

    At most `recover_tokens` tokens are read, or as many as for the calibration, evenly from the sources.

    Parameters
    ----------
    sources
        Text to read instead of the recipe's.

    Raises
    ------
    InvalidInput
        If a text cannot be read, or has no block that is not held out.
    """
    recipe = prepared.recipe
    if not recipe.recover_text:
        return None
    sources = recipe.recover_text if sources is None else sources
    vocabulary = prepared.family.vocab_size(prepared.checkpoint.config)
    held = {bytes(block.numpy()) for block in data.held_out.blocks}
    share = math.ceil((recipe.recover_tokens or recipe.tokens) / len(recipe.recover_text))
    blocks: list[Tensor] = []
    for source, name in zip(sources, recipe.recover_text, strict=True):
        found = first_blocks(
            source, tokenizer, prepared.context, tokens=share, seed=recipe.seed, note=note
        )
        check_ids(found.blocks, vocabulary, name)
        unseen = [block for block in found.blocks if bytes(block.numpy()) not in held]
        if not unseen:
            raise InvalidInput(
                f"recover_text {name!r} has no blocks that differ from the held-out ones: give other text"
            )
        blocks += unseen
    return TokenBlocks(tuple(blocks), prepared.context, recipe.recover_text)


@contextmanager
def store_of(prepared: Prepared) -> Iterator[Store]:
    """Open the store in the run's work directory; runs without an output, and ranks above 0, keep nothing.

    Raises
    ------
    InvalidInput
        If another process works on the same run, or writes the same output.
    FbnPruneError
        If the work directory cannot be written to.
    """
    recipe = prepared.recipe
    if recipe.output is None or not is_first():
        yield Store()
        return
    place = default_place(recipe.output) if recipe.work_dir is None else recipe.work_dir
    about = {"model": recipe.model, "output": str(recipe.output.expanduser().resolve())}
    key, named = fingerprint(facts(prepared)), recipe.work_dir is not None
    with (
        output_locked(recipe.output),
        store_in(place.expanduser(), key, about, keep_place=named) as store,
    ):
        yield store


def facts(prepared: Prepared) -> dict[str, Any]:
    """Return everything but the calibration text that decides the bytes of the result, as JSON values."""
    recipe = prepared.recipe
    device = str(prepared.device)
    if prepared.device.type == "cuda":
        used: list[torch.device | int] = [prepared.device, *(prepared.memory.placement or ())]
        device = ", ".join(sorted({torch.cuda.get_device_name(one) for one in used}))
    return {
        "versions": [tool_version(), torch.__version__, transformers.__version__],
        "machine": [platform.machine(), device, torch.get_num_threads()],
        "computed": [str(prepared.dtype), prepared.context, prepared.width_multiple],
        "memory": [prepared.memory.streamed, prepared.memory.batch_tokens],
        "recipe": recipe.model_dump(mode="json", exclude=set(PLACES)),
        "checkpoint": checkpoint_facts(prepared.checkpoint),
        "networks": None if recipe.networks_from is None else _digest(recipe.networks_from),
    }


def checkpoint_facts(checkpoint: Checkpoint) -> list[Any]:
    """Return the config, the tensor headers, and the size and time of each file (which change with its data)."""
    stats = [(file.name, file.stat()) for file in checkpoint.weight_files]
    return [
        checkpoint.config,
        [
            [name, info.file, info.shape, str(info.dtype)]
            for name, info in checkpoint.tensors.items()
        ],
        [[file, stat.st_size, stat.st_mtime_ns] for file, stat in stats],
    ]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
