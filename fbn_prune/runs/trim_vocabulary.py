"""The command `trim-vocabulary`: write a checkpoint with the tokens that texts use; its layers stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fbn_prune.data import builtin
from fbn_prune.errors import InvalidInput
from fbn_prune.export.directory import atomic_directory, check_output
from fbn_prune.export.trimmed import write_trimmed
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.progress import Display, StageClock
from fbn_prune.recipe import parse_size
from fbn_prune.runs.opening import checkpoint_facts
from fbn_prune.runs.result import tool_version
from fbn_prune.runs.second_run import output_locked, refuse_second_run
from fbn_prune.runs.vocabulary import VocabularyFigures, VocabularyRule, choose_vocabulary
from fbn_prune.store import default_place, fingerprint, store_in


@dataclass(frozen=True)
class VocabularyResult:
    """Figures of a trimmed checkpoint.

    Attributes
    ----------
    output
        The folder that was written; None for a dry run.
    vocabulary
        What the new vocabulary saves, and does to held-out text.
    """

    model: str
    output: str | None
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    vocabulary: VocabularyFigures

    def to_json(self) -> dict[str, Any]:
        """Return all figures as JSON values."""
        return asdict(self)


def trim_vocabulary(
    model: str,
    output: Path | None,
    texts: Sequence[str],
    *,
    min_count: int = 1,
    characters: str = "",
    ascii: bool = False,
    held_out: Sequence[str] = (),
    max_shard_size: str = "5GB",
    trust_remote_code: bool = False,
    overwrite: bool = False,
    display: Display | None = None,
) -> VocabularyResult:
    """Write a checkpoint that keeps the tokens that texts use, with all that is needed to make them.

    A text whose tokens are all kept gets the same pieces, and the logits of kept tokens do not change. Any other text
    is spelled by smaller pieces. Special tokens and bytes always stay.

    Parameters
    ----------
    model
        Checkpoint folder or Hub id, pruned or not, or "builtin".
    output
        Folder to write; None only chooses the tokens and measures the choice.
    texts
        Sources of text, named as calibration sources are.
    min_count
        How often the texts must use a token.
    characters
        Characters whose tokens stay in any case.
    ascii
        Whether all tokens of ASCII characters stay.
    held_out
        Sources to measure the vocabulary on. Default: a tenth of the texts; their tokens stay all the same.
    max_shard_size
        Size of the largest weights file, such as "5GB".
    trust_remote_code
        Allow the tokenizer to run code from the checkpoint.
    overwrite
        Replace an existing folder.
    display
        Shows progress. Default: nothing is shown.

    Raises
    ------
    InvalidInput
        If a text cannot be read, the vocabulary is already minimal or cannot be trimmed, or the output exists.
    FbnPruneError
        If the files cannot be written; finished shards are kept, and the same call continues from them.
    """
    if not texts:
        raise InvalidInput("no text given: name at least one source whose tokens stay")
    if min_count < 1:
        raise InvalidInput(f"min_count = {min_count}: a token must be used at least once")
    shard_bytes = parse_size(max_shard_size, "max_shard_size")
    source = Checkpoint.open(
        builtin.path_or_id(model),
        trust_remote_code=trust_remote_code,
    )
    if output is not None:
        refuse_second_run(output)
        check_output(output, overwrite, source.path, needed_bytes=source.total_bytes)
    clock = StageClock(display)
    rule = VocabularyRule(tuple(texts), min_count, characters, tuple(held_out), ascii)
    with clock.stage("vocabulary"):
        cut, figures = choose_vocabulary(source, rule)
    if output is not None:
        facts = {
            "version": tool_version(),
            "checkpoint": checkpoint_facts(source),
            "tokens": cut.fingerprint,
        }
        about = {"model": model, "output": str(output.expanduser().resolve())}
        with (
            output_locked(output),
            store_in(default_place(output), fingerprint(facts), about) as store,
            clock.stage("export", source.total_bytes - figures.bytes_removed, "bytes") as advance,
            atomic_directory(output, overwrite) as folder,
        ):
            write_trimmed(
                source, cut, folder, max_shard_size=shard_bytes, progress=advance, store=store
            )
    return VocabularyResult(
        model=model,
        output=None if output is None else str(output),
        parameters_before=source.total_parameters,
        parameters_after=source.total_parameters - figures.parameters_removed,
        bytes_before=source.total_bytes,
        bytes_after=source.total_bytes - figures.bytes_removed,
        vocabulary=figures,
    )
