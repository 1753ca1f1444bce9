"""Run the command line and count the bytes of weights read from its checkpoint; the last line on stderr has the counts.

`bench_memory.py reads` runs this in a child process. Reads by transformers, when it loads a whole model, do not count.
"""

from __future__ import annotations

import atexit
import json
import sys
from collections import Counter

import torch
from torch import Tensor

from fbn_prune.cli.main import main
from fbn_prune.model.checkpoint import Checkpoint

PREFIX = "bytes of weights read: "


def count_reads() -> Counter[str]:
    """Count from now on the bytes read of each tensor, by name; a memory-mapped tensor counts as read."""
    seen: Counter[str] = Counter()
    tensor, read = Checkpoint.tensor, Checkpoint.read

    def counted(self: Checkpoint, name: str) -> Tensor:
        seen[name] += self.tensors[name].nbytes
        return tensor(self, name)

    def counted_read(
        self: Checkpoint, name: str, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        if self.shape(name):  # a scalar is read by `tensor`, which counts it
            seen[name] += self.tensors[name].nbytes
        return read(self, name, device, dtype)

    Checkpoint.tensor, Checkpoint.read = counted, counted_read  # type: ignore[method-assign]
    return seen


if __name__ == "__main__":
    found = count_reads()
    atexit.register(lambda: print(PREFIX + json.dumps(found), file=sys.stderr))
    main()
