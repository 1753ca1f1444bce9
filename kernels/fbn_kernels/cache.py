"""A bounded cache of values computed from tensors, which are dropped when the tensors change or are freed."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Value = TypeVar("Value")


@dataclass
class _Entry(Generic[Value]):
    value: Value
    nbytes: int
    versions: tuple[int, ...]
    storages: tuple[StorageWeakRef, ...]

    def fresh(self, versions: tuple[int, ...]) -> bool:
        return self.versions == versions and not self.expired()

    def expired(self) -> bool:
        return any(storage.expired() for storage in self.storages)


class TensorCache(Generic[Value]):
    """A cache of values computed from tensors.

    A value is dropped when one of its tensors is written to in place (as its version counter shows) or freed, and the
    least recently used values are dropped to stay within the limit. Writing through `.data`, or to a tensor created in
    inference mode, does not change the counter: call `clear` afterwards.

    Parameters
    ----------
    limit_bytes
        Largest size of all kept values. A value above it is computed at every call.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._entries: OrderedDict[tuple[object, ...], _Entry[Value]] = OrderedDict()
        self._lock = threading.Lock()
        self._nbytes = 0

    @property
    def limit_bytes(self) -> int:
        """Largest size of all kept values; a lower limit evicts at once."""
        return self._limit

    @limit_bytes.setter
    def limit_bytes(self, limit: int) -> None:
        if limit < 0:
            raise ValueError(f"limit_bytes cannot be negative, got {limit}")
        with self._lock:
            self._limit = limit
            self._evict()

    @property
    def nbytes(self) -> int:
        """Size of the kept values in bytes."""
        return self._nbytes

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Drop all values."""
        with self._lock:
            self._entries.clear()
            self._nbytes = 0

    def get(
        self,
        tensors: tuple[Tensor | None, ...],
        compute: Callable[[], Value],
        nbytes_of: Callable[[Value], int],
    ) -> Value:
        """Return the value kept for these tensors, or compute and keep it."""
        present = [one for one in tensors if one is not None]
        key = tuple(None if one is None else _identity(one) for one in tensors)
        versions = tuple(0 if one.is_inference() else one._version for one in present)
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and entry.fresh(versions):
                self._entries.move_to_end(key)
                return entry.value
            if entry is not None:
                self._drop(key)
        value = compute()
        nbytes = nbytes_of(value)
        storages = tuple(StorageWeakRef(one.untyped_storage()) for one in present)
        with self._lock:
            for stale in [name for name, kept in self._entries.items() if kept.expired()]:
                self._drop(stale)
            if nbytes <= self._limit and key not in self._entries:
                self._entries[key] = _Entry(value, nbytes, versions, storages)
                self._nbytes += nbytes
                self._evict()
        return value

    def _drop(self, key: tuple[object, ...]) -> None:
        self._nbytes -= self._entries.pop(key).nbytes

    def _evict(self) -> None:
        while self._nbytes > self._limit:
            self._drop(next(iter(self._entries)))


def _identity(tensor: Tensor) -> tuple[object, ...]:
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
