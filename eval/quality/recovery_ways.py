"""Print how close each way of distilling brings one cut checkpoint to its dense model, at equal tokens.

    python eval/quality/recovery_ways.py --dense DIR --cut CUT --train a.txt --evaluate b.txt --tokens 60000 \
        --way weights=adapters --way weights=all --way weights=all,learning_rate=0.004,step_tokens=512

A way is settings of :class:`fbn_prune.pruning.recovery.distillation.DistillationOptions`; each begins from the same cut
checkpoint and passes once over the same blocks of the training text. `context=N` in a way sets the tokens of a block.
Without a way, only the perplexities of the two checkpoints are printed. `--save` also keeps states of the training,
from which the same command goes on.
"""

from __future__ import annotations

import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

import protocol
import torch
import typer
from rich.console import Console
from rich.table import Table

from fbn_prune.data.calibration import TokenBlocks
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.perplexity import perplexity
from fbn_prune.progress import StageClock
from fbn_prune.pruning.recovery.distillation import DistillationOptions, distil
from fbn_prune.pruning.recovery.healing import healed_tensors, linear_maps
from fbn_prune.store import Store


def options_of(way: str, hidden_size: int) -> tuple[DistillationOptions, int | None]:
    """Return the options that `way` states, those of the package otherwise, and the tokens of a block."""
    given: dict[str, Any] = dict(part.split("=", 1) for part in way.split(",") if part)
    context = given.pop("context", None)
    start = asdict(DistillationOptions.for_width(hidden_size, given.get("weights", "adapters")))
    known = {field.name: type(start[field.name]) for field in fields(DistillationOptions)}
    if unknown := set(given) - set(known):
        raise typer.BadParameter(f"{way}: {min(unknown)} is none of {', '.join(known)}, context")
    stated = {name: known[name](value) for name, value in given.items()}
    return DistillationOptions(**{**start, "passes": 1, **stated}), context and int(context)


def main(
    dense: Annotated[Path, typer.Option(help="Checkpoint folder or GGUF file.")],
    cut: Annotated[Path, typer.Option(help="Checkpoint that was cut from it.")],
    train: Annotated[list[Path], typer.Option(help="Text to train on; repeat for several.")],
    evaluate: protocol.Evaluate,
    way: Annotated[list[str], typer.Option(help="KEY=VALUE,KEY=VALUE; repeat.")] = [],  # noqa: B006
    tokens: Annotated[int, typer.Option(help="Tokens to train on.")] = 60000,
    context: protocol.Context = 256,
    evaluation_blocks: protocol.EvaluationBlocks = 32,
    dtype: Annotated[str, typer.Option(help="Type that the models compute in.")] = "float32",
    threads: Annotated[int, typer.Option(help="Of torch.")] = 1,
    save: Annotated[Path | None, typer.Option(help="Folder for the trained checkpoints.")] = None,
    output: protocol.Output = None,
) -> None:
    torch.set_num_threads(threads)
    computed = getattr(torch, dtype)
    teacher = Checkpoint.open(dense)
    tokenizer = teacher.load_tokenizer()
    target = ModelAdapter(teacher.load_model("cpu", computed))

    def blocks(files: list[Path], length: int, count: int) -> TokenBlocks:
        found = [b for file in files for b in protocol.first_blocks(file, tokenizer, length, count)]
        return TokenBlocks(tuple(found), length, tuple(map(str, files)))

    held = blocks(evaluate, context, evaluation_blocks).batches(protocol.BATCH_TOKENS)
    facts: dict[str, Any] = {"dense_model": dense.name, "tokens": tokens, "dtype": dtype}
    facts |= {"train": [one.name for one in train], "evaluate": [one.name for one in evaluate]}
    facts |= {"context": context, "dense": perplexity(target, held), "ways": {}}
    table = Table("way", "perplexity", "gap closed", "seconds")
    facts["cut"] = before = perplexity(
        ModelAdapter(Checkpoint.open(cut).load_model("cpu", computed)), held
    )
    for one in way:
        source = Checkpoint.open(cut)
        model = ModelAdapter(source.load_model("cpu", computed))
        options, length = options_of(one, model.hidden_size)
        length = length or context
        text = blocks(train, length, -(-tokens // (length * len(train))))
        start = time.monotonic()
        place = None if save is None else save / one
        states = None if place is None else place.with_name(f"{one}.states")
        if states is not None:
            states.mkdir(parents=True, exist_ok=True)
        trained = distil(
            model.model,
            target.model,
            list(linear_maps(model)),
            text,
            options,
            StageClock(),
            store=Store(states),
        )
        seconds = time.monotonic() - start
        healed_tensors(model, source)
        after = perplexity(model, held)
        closed = (before - after) / (before - facts["dense"])
        facts["ways"][one] = {"perplexity": after, "gap_closed": closed, "seconds": seconds,
                              "curve": trained.curve, "left_out": trained.left_out}  # fmt: skip
        table.add_row(one, f"{after:.2f}", f"{closed:.0%}", f"{seconds:.0f}")
        if place is not None:
            model.model.to(teacher.storage_dtype).save_pretrained(place)
            tokenizer.save_pretrained(place)
        print(f"{one}: {before:.2f} -> {after:.2f} in {seconds:.0f} s", flush=True)
        protocol.save_json(output, facts)
    Console(width=150).print(f"dense {facts['dense']:.2f}, cut {facts['cut']:.2f}")
    Console(width=150).print(table)


if __name__ == "__main__":
    typer.run(main)
