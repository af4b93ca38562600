"""The GPU tier: a block pool under the same policy as memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import replace

import torch

from ragkv.chunk import ChunkKV
from ragkv.errors import StoreError, StoreFullError
from ragkv.store.memory import MemoryTier, Resident
from ragkv.store.policy import Policy, Usage
from ragkv.store.pool import BlockPool, Pooled, kinds_of
from ragkv.store.terms import Terms


class GpuTier:
    """Chunks on a device. Not safe for several threads by itself, as :class:`MemoryTier`.

    The pool is allocated when the first chunk comes, whose shapes all others must have; others stay below.

    Args:
        budget_bytes: what the pool may take; 0 switches the tier off.
        device: where it lies.
        policy: which entries go first.
        held: keys that must not be evicted now.

    Raises:
        StoreError: there is no such device.
    """

    def __init__(
        self, budget_bytes: int, device: torch.device | str, policy: Policy, held: Container[bytes] = ()
    ) -> None:
        self.budget_bytes = budget_bytes
        if budget_bytes and torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise StoreError("gpu_bytes needs a GPU that torch can use: set gpu_bytes=0 to do without")
        self._device = device
        self._pool: BlockPool | None = None
        self._index: MemoryTier[Pooled | _Size] = MemoryTier(budget_bytes, policy, held)

    def __contains__(self, key: bytes) -> bool:
        return key in self._index

    def __len__(self) -> int:
        return len(self._index)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._index)

    @property
    def used_bytes(self) -> int:
        """What the blocks of its chunks take."""
        return self._index.used_bytes

    @property
    def evictions(self) -> Counter[str]:
        """Entries dropped, by reason."""
        return self._index.evictions

    def find(self, key: bytes) -> Pooled | None:
        """The chunk; that is no use of it."""
        return _pooled(self._index.find(key) if self.budget_bytes else None)

    def use(self, key: bytes) -> Pooled | None:
        """The chunk, and counts a use of it."""
        return _pooled(self._index.use(key) if self.budget_bytes else None)

    def put(self, key: bytes, kv: ChunkKV, terms: Terms, usage: Usage) -> bool:
        """Keeps a chunk if it is worth what it would evict and has the pool's shapes; whether it does."""
        if not self.budget_bytes or key in self._index:
            return key in self._index
        try:
            if self._pool is None:
                self._pool = BlockPool(kv, self.budget_bytes, self._device)
                self._index.budget_bytes = self._pool.count * self._pool.block_bytes
            if kinds_of(kv) != self._pool.kinds:
                return False
            return self._admit(self._pool, key, kv, terms, replace(usage))
        except StoreFullError:
            return False

    def remove(self, key: bytes) -> bool:
        """Forgets a chunk; whether it was here. Its blocks are free once no batch holds it."""
        return self._index.remove(key)

    def _admit(self, pool: BlockPool, key: bytes, kv: ChunkKV, terms: Terms, usage: Usage) -> bool:
        size = pool.blocks_for(len(kv)) * pool.block_bytes
        # First the place in the books, which frees blocks, then the blocks.
        if not self._index.put(key, _Size(size), terms, usage, selective=True):
            return False
        try:
            self._index.replace(key, Pooled(pool, kv))
        except StoreFullError:
            # Blocks of evicted chunks that open batches still hold are not free yet.
            self._index.remove(key)
            raise
        return True


def _pooled(entry: Resident[Pooled | _Size] | None) -> Pooled | None:
    return entry.kv if entry is not None and isinstance(entry.kv, Pooled) else None


class _Size:
    """Stands for a chunk until its blocks are there."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
