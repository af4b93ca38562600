"""How chunks move between the tiers: found for a batch, promoted to memory, dropped where they prove damaged."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

from ragkv.errors import RagKVError, RecordError, StoreFullError
from ragkv.store.batch import InMemory, Source
from ragkv.store.disk import DiskTier
from ragkv.store.gpu import GpuTier
from ragkv.store.layout import Payload
from ragkv.store.levels import Encoded, Levels
from ragkv.store.memory import MemoryTier
from ragkv.store.record import Record
from ragkv.store.rows import Row
from ragkv.store.snapshot import Loading, Snapshot
from ragkv.store.stats import Tally
from ragkv.store.terms import Terms

logger = logging.getLogger("ragkv.store")

_tiers: weakref.WeakSet[Tiers] = weakref.WeakSet()


class Tiers:
    """The tiers of one store, and what its threads share. The owner of its batches.

    Args:
        gpu: the GPU tier; calls to it hold ``lock``.
        cpu: the CPU tier; likewise.
        disk: the disk tier, if there is one.
        leases: open batches by key; both tiers evict nothing that stands in it.
        levels: in which codec CPU memory keeps chunks.

    Attributes:
        lock: held for moments only, never while the disk is written.
        tally: what was done so far.
    """

    def __init__(
        self,
        gpu: GpuTier,
        cpu: MemoryTier[InMemory],
        disk: DiskTier | None,
        leases: Counter[bytes],
        levels: Levels,
    ) -> None:
        self.gpu = gpu
        self.cpu = cpu
        self.disk = disk
        self.leases = leases
        self.levels = levels
        self.lock = threading.RLock()
        self.tally = Tally()
        # Where there is no disk.
        self.facts: dict[str, bytes] = {}
        # Damaged records that could not be deleted.
        self.unreadable: set[bytes] = set()
        # What was removed before is in no memory yet.
        self._removals = -1
        # Prefetches; its thread begins when it is first needed.
        self.background = ThreadPoolExecutor(1, "ragkv-prefetch")
        _tiers.add(self)

    def load(self, keys: Sequence[bytes]) -> int:
        """Moves chunks from disk to memory; the bytes that were read. What proves damaged is dropped."""
        count, started = 0, perf_counter()
        for key in keys:
            with self.lock:
                resident = key in self.cpu or key in self.gpu
            if resident or self.disk is None or not (self.cpu.budget_bytes or self.gpu.budget_bytes):
                continue
            snapshot = self.disk.snapshot()
            try:
                for loading in self._open(snapshot, [key]).values():
                    count += loading.load(range(len(loading.record.checksums)))
                    self.finish(key, loading)
            except RecordError as error:
                self.drop_damaged(key, error)
            finally:
                snapshot.close()
        self.count_load(count, perf_counter() - started)
        return count

    def lease(self, keys: Sequence[bytes]) -> None:
        """Keeps chunks from being evicted until :meth:`release`."""
        with self.lock:
            self.leases.update(keys)

    def release(self, keys: Sequence[bytes]) -> None:
        """Ends a lease."""
        with self.lock:
            self.leases.subtract(keys)
            for key in set(keys):
                if self.leases[key] <= 0:
                    del self.leases[key]

    def put_many(
        self,
        items: Sequence[tuple[bytes, Record, Payload, Terms]],
        above: Sequence[Encoded],
        facts: Mapping[str, bytes],
        *,
        selective: bool,
    ) -> list[bool]:
        """Stores records on disk, where there is one, and in memory, as far as they are worth that.

        Args:
            items: what is stored.
            above: for each what memory gets, in whatever codec.
            facts: stored with them.
            selective: refuse what is worth less than what it would evict.
        """
        if self.disk is None:
            held = [InMemory(*self.levels.for_memory(*pair)) for pair in above]
            with self.lock:
                kept = [
                    self.cpu.put(key, kv, terms, selective=selective)
                    for (key, _, _, terms), kv in zip(items, held, strict=True)
                ]
                self.facts.update(facts)
                return kept
        rows = self.disk.put_many(items, facts)
        for (key, record, _, _), pair, row in zip(items, above, rows, strict=True):
            if row is not None:
                self.unreadable.discard(key)
                self.promote(key, pair, row)
                with self.lock:
                    self.tally.bytes_written += record.payload_bytes
        return [row is not None for row in rows]

    def missing(self, keys: Iterable[bytes]) -> list[bytes]:
        """Which chunks cannot be read from any tier, each once and in order, in one state of the folder."""
        wanted = list(dict.fromkeys(keys))
        if self.disk is not None:
            now, snapshot = self.disk.now(), self.disk.snapshot()
            try:
                self._forget_removed(snapshot)
                wanted = [key for key in wanted if key in self.unreadable or not snapshot.has(key, now)]
            finally:
                snapshot.close()
        with self.lock:
            return [key for key in wanted if key not in self.cpu and key not in self.gpu]

    def find(self, keys: Sequence[bytes], used: bool) -> tuple[dict[bytes, Source], Snapshot | None]:
        """Where each of ``keys`` can be read from, and the snapshot that those on disk are read through.

        Args:
            keys: which.
            used: count a use of each.
        """
        snapshot = None if self.disk is None else self.disk.snapshot()
        sources: dict[bytes, Source] = {}
        try:
            if snapshot is not None:
                self._forget_removed(snapshot)
            with self.lock:
                sources = self._in_memory(keys, used)
            if snapshot is not None:
                sources |= self._open(snapshot, [key for key in dict.fromkeys(keys) if key not in sources])
        finally:
            if snapshot is not None and not any(isinstance(source, Loading) for source in sources.values()):
                snapshot.close()
                snapshot = None
        if self.disk is not None and used:
            for key in sources:
                self.disk.touch(key)
        return sources, snapshot

    def finish(self, key: bytes, source: Source) -> None:
        """A batch is done with a chunk: the tiers above keep it if it is worth that."""
        if isinstance(source, Loading) and source.complete:
            self.promote(key, (source.record, source.payload), source.row)
        elif isinstance(source, InMemory) and self.gpu.budget_bytes:
            with self.lock:
                entry = self.cpu.find(key)
                if entry is not None:
                    terms = Terms(lifetime_s=max(self.cpu.remaining_s(key), 1e-9))
                    self.gpu.put(key, entry.kv.record.decode(entry.kv.payload), terms, entry.usage)

    def remove_many(self, keys: Iterable[bytes], facts: Iterable[str]) -> int:
        """Forgets chunks in every tier, and facts; how many chunks were stored."""
        keys, facts = list(keys), list(facts)
        removed = set() if self.disk is None else set(self.disk.remove_many(keys, facts=facts))
        with self.lock:
            for name in facts:
                self.facts.pop(name, None)
            removed |= {key for key in keys if self._forget(key)}
        return len(removed)

    def promote(self, key: bytes, kept: Encoded, row: Row) -> None:
        """Keeps in memory what is on disk, if it fits and is worth what it would evict."""
        if self.disk is None or not (self.cpu.budget_bytes or self.gpu.budget_bytes):
            return
        held = InMemory(*self.levels.for_memory(*kept)) if self.cpu.budget_bytes else None
        with self.lock:
            self._forget(key)
            # Asked under the lock: what is removed from disk after this is removed from memory after this.
            if not self.disk.contains(key):
                return
            terms = Terms(lifetime_s=max(row.expires_s - self.disk.now(), 1e-9))
            if self.gpu.budget_bytes:
                self.gpu.put(key, kept[0].decode(kept[1]), terms, row.usage)
            if held is not None:
                try:
                    self.cpu.put(key, held, terms, row.usage, selective=True)
                except StoreFullError as error:
                    logger.debug("%s stays on disk: %s", key.hex(), error)

    def drop_damaged(self, key: bytes, error: RecordError) -> None:
        """Forgets a record that proved damaged, so that its next read is a miss."""
        logger.warning("dropped the damaged record %s: %s", key.hex(), error)
        with self.lock:
            self.unreadable.add(key)
            self._forget(key)
        if self.disk is None or self.disk.readonly:
            return
        try:
            self.disk.remove(key, "damaged")
        except RagKVError as failure:
            logger.warning("the damaged record %s could not be deleted: %s", key.hex(), failure)
        else:
            self.unreadable.discard(key)

    def count_load(self, count: int, seconds: float) -> None:
        """Counts bytes read from disk, and the time that it took."""
        if count:
            with self.lock:
                self.tally.bytes_read += count
                self.tally.latency["load"].add(seconds)

    def forget_counts(self) -> None:
        """Begins to count anew: in a forked child, whose parent's numbers are not its own."""
        self.tally = Tally()
        for tier in (self.gpu, self.cpu, self.disk):
            if tier is not None:
                tier.evictions.clear()

    def counted(self) -> Tally:
        """What was done so far, the evictions of all tiers among it."""
        tiers = {"gpu": self.gpu, "cpu": self.cpu, "disk": self.disk}
        self.tally.evictions.update(
            {name: +Counter(tier.evictions) for name, tier in tiers.items() if tier is not None}
        )
        return self.tally

    def _in_memory(self, keys: Sequence[bytes], used: bool) -> dict[bytes, Source]:
        """What of ``keys`` is in memory, on the device first."""
        sources: dict[bytes, Source] = {}
        for key in dict.fromkeys(keys):
            pooled = self.gpu.use(key) if used else self.gpu.find(key)
            entry = self.cpu.use(key) if used else self.cpu.find(key)
            if pooled is not None:
                sources[key] = pooled
            elif entry is not None:
                sources[key] = entry.kv
        return sources

    def _forget(self, key: bytes) -> bool:
        """Drops a chunk from memory, whether it was there; held by the lock."""
        return any([self.cpu.remove(key), self.gpu.remove(key)])

    def _open(self, snapshot: Snapshot, keys: Sequence[bytes]) -> dict[bytes, Loading]:
        """What of ``keys`` is on disk and can be read."""
        loading: dict[bytes, Loading] = {}
        for key in keys:
            if key in self.unreadable or self.disk is None:
                continue
            try:
                found = snapshot.find(key, self.disk.now())
            except RecordError as error:
                self.drop_damaged(key, error)
                continue
            if found is not None:
                fits = found[0].payload_bytes <= max(self.cpu.budget_bytes, self.gpu.budget_bytes)
                loading[key] = Loading(snapshot, key, *found, keep=fits)
        return loading

    def _forget_removed(self, snapshot: Snapshot) -> None:
        """Drops from memory what another process has removed from the folder."""
        try:
            removals = snapshot.counters().removals
        except RecordError:
            removals = -1
        if removals == self._removals or self.disk is None:
            return
        with self.lock:
            for key in {*self.cpu, *self.gpu}:
                if not self.disk.contains(key):
                    self._forget(key)
            self._removals = removals


def _after_fork() -> None:
    """Whatever thread held a lock, it is not in the child; and the parent's batches are not the child's."""
    for tiers in _tiers:
        tiers.lock = threading.RLock()
        tiers.leases.clear()
        tiers.forget_counts()
        tiers.background = ThreadPoolExecutor(1, "ragkv-prefetch")
        if tiers.disk is not None:
            tiers.disk.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
