"""The command line, counting the bytes of weights that it reads from its checkpoint; the last line on stderr has them.

`bench_memory.py reads` runs it in a child. What transformers reads when it loads a whole model is not seen.
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

SAID = "bytes of weights read: "


def count_reads() -> Counter[str]:
    """From now on the bytes read of each tensor, by name; a tensor that is mapped counts as read."""
    seen: Counter[str] = Counter()
    tensor, read = Checkpoint.tensor, Checkpoint.read

    def counted(self: Checkpoint, name: str) -> Tensor:
        seen[name] += self.tensors[name].nbytes
        return tensor(self, name)

    def counted_read(
        self: Checkpoint, name: str, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        if self.shape(name):  # else it is read by `tensor`
            seen[name] += self.tensors[name].nbytes
        return read(self, name, device, dtype)

    Checkpoint.tensor, Checkpoint.read = counted, counted_read  # type: ignore[method-assign]
    return seen


if __name__ == "__main__":
    found = count_reads()
    atexit.register(lambda: print(SAID + json.dumps(found), file=sys.stderr))
    main()
