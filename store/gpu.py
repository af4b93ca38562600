"""The GPU tier: a block pool under the same planner as memory."""

from __future__ import annotations

import threading
from collections.abc import Container

import torch

from ragkv.errors import StoreError, StoreFullError
from ragkv.store.codecs import Raw
from ragkv.store.encode import gathered
from ragkv.store.levels import Levels
from ragkv.store.memory import MemoryTier
from ragkv.store.policy import Policy
from ragkv.store.pool import BlockPool, Pooled, kinds_of
from ragkv.store.source import Source
from ragkv.store.tier import Offer


class GpuTier(MemoryTier):
    """Chunks on a device.

    The pool is allocated when the first chunk comes, whose shapes all others must have; others stay below.

    Args:
        budget_bytes: what the pool may take.
        device: where it lies.
        policy, held, lock: see :class:`MemoryTier`.

    Raises:
        StoreError: there is no such device.
    """

    name = "gpu"

    def __init__(
        self,
        budget_bytes: int,
        device: torch.device | str,
        policy: Policy,
        held: Container[bytes],
        lock: threading.RLock,
    ) -> None:
        try:
            kind = torch.device(device).type
        except (RuntimeError, TypeError) as error:
            raise StoreError(
                f"there is no device {device!r} for gpu_bytes: {str(error).splitlines()[0]:.80}"
            ) from error
        if kind == "cuda" and not torch.cuda.is_available():
            raise StoreError("gpu_bytes needs a GPU that torch can use: set gpu_bytes=0 to do without")
        super().__init__(budget_bytes, policy, held, lock, Levels(Raw()), selective=True)
        self._device = device
        self._pool: BlockPool | None = None

    @property
    def unclaimed_bytes(self) -> int:
        """What the pool will take when it is allocated; 0 once it is."""
        return self.budget_bytes if self._pool is None else 0

    def wants(self, entry: Offer) -> bool:
        """See :class:`Tier`: chunks of other shapes than the first one's are not."""
        return self._pool_for(entry) is not None and super().wants(entry)

    def prepare(self, entry: Offer) -> Offer:
        """See :class:`Tier`: numbers, whatever the codec, on the device."""
        pool, kv = self._pool_for(entry), entry.kv
        if pool is None:
            return entry
        if kv is None or any(side.device != pool.device for pair in kv for side in pair):
            kv = entry.record.decode(entry.payload)
            # Those are in memory of the payload's kind already, or in some that a device waits for.
            kv = kv if entry.record.codec == Raw.name else gathered(kv)
        return entry._replace(kv=None, brought=pool.bring(kv))

    def _pool_for(self, entry: Offer) -> BlockPool | None:
        """The pool, which the first one makes; None where an entry does not fit into it."""
        with self.lock:
            if self._pool is None:
                try:
                    self._pool = BlockPool(entry.record, self.budget_bytes, self._device)
                except torch.OutOfMemoryError as error:
                    self.budget_bytes = 0  # it is not tried for every chunk
                    raise StoreFullError(f"the device has no room for a pool of gpu_bytes: {error}") from error
                self.budget_bytes = self._pool.count * self._pool.block_bytes
            return self._pool if kinds_of(entry.record) == self._pool.kinds else None

    def _admit(self, entry: Offer) -> bool:
        return self._pool_for(entry) is not None and super()._admit(entry)

    def expected(self, entry: Offer) -> int:
        """See :class:`MemoryTier`."""
        return self.size(entry)

    def size(self, entry: Offer) -> int:
        """Bytes of the blocks that an entry takes."""
        assert self._pool is not None
        return self._pool.blocks_for(entry.record.tokens) * self._pool.block_bytes

    def _hold(self, entry: Offer) -> Source:
        assert self._pool is not None and entry.brought
        # Blocks of evicted chunks that open batches still hold are not free yet: it is full then.
        return Pooled(self._pool, entry.record, entry.brought)
