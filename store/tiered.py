"""The store: chunks' KV in memory and on disk behind one interface."""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from ragkv.chunk import ChunkKV
from ragkv.errors import RecordError, StoreError, StoreFullError
from ragkv.store.batch import Batch, Source
from ragkv.store.codecs import get_codec
from ragkv.store.disk import DiskTier, Loading, Snapshot
from ragkv.store.encode import encode
from ragkv.store.memory import MemoryTier
from ragkv.store.policy import Policy, Usage, get_policy

logger = logging.getLogger("ragkv.store")


@dataclass(frozen=True)
class StoreStats:
    """What a store holds now, and what it did since it was opened.

    Attributes:
        entries: entries by tier.
        bytes: bytes by tier.
        hits: reads that found their chunk, by the tier that it came from.
        misses: reads that found nothing.
        evictions: entries evicted, by tier.
        damaged: records dropped because they failed their checksum or could not be read.
        bytes_read: bytes read from disk.
    """

    entries: dict[str, int]
    bytes: dict[str, int]
    hits: dict[str, int]
    misses: int
    evictions: dict[str, int]
    damaged: int
    bytes_read: int


class TieredStore:
    """KV of chunks in CPU memory and, with a path, on disk. Safe for several threads and processes.

    What is put is written through to disk at once; memory keeps what the policy holds most valuable. Both tiers keep
    within their budgets by evicting, except what an open batch holds.

    Args:
        path: folder of the disk tier, made with its parents if it is not there; None for memory only.
        gpu_bytes: budget of the GPU tier; 0 switches it off.
        cpu_bytes: budget of the CPU tier; 0 switches it off.
        disk_bytes: budget of the disk tier, in whole pages of the file.
        policy: name of the eviction policy, or one of your own. Each tier keeps its own clock.

    Raises:
        StoreError: no tier is left, or the folder cannot be opened.
        RecordError: the folder is damaged or has another format.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        gpu_bytes: int = 0,
        cpu_bytes: int = 4 << 30,
        disk_bytes: int = 100 << 30,
        policy: str | Policy = "pgdsf",
    ) -> None:
        if min(gpu_bytes, cpu_bytes, disk_bytes) < 0:
            raise StoreError(f"budgets are bytes, got gpu {gpu_bytes}, cpu {cpu_bytes}, disk {disk_bytes}")
        if gpu_bytes:
            raise StoreError("this version has no GPU tier: gpu_bytes must be 0")
        if not cpu_bytes and (path is None or not disk_bytes):
            raise StoreError("a store needs memory or disk: give cpu_bytes, or a path and disk_bytes")
        self.path = None if path is None else Path(path)
        self._lock = threading.RLock()
        self._leases: Counter[bytes] = Counter()
        self._unreadable: set[bytes] = set()
        self._facts: dict[str, bytes] = {}
        self._counts = _Counts()
        self._cpu = MemoryTier(cpu_bytes, get_policy(policy), self._leases)
        self._disk = None
        if self.path is not None and disk_bytes:
            self._disk = DiskTier(self.path, disk_bytes, get_policy(policy), self._leases)
        self._codec = get_codec("raw")
        self._closed = False

    def put(self, key: bytes, kv: ChunkKV, *, space: str = "", cost_s: float = 0.0, namespace: str = "") -> None:
        """Stores a chunk's KV; what was stored under the key is replaced. Durable, with a path, when it returns.

        Args:
            key: see :func:`chunk_key`.
            kv: L pairs ``[H, T, D]`` in fp32, bf16 or fp16; they are copied.
            space: fingerprint of what the KV depends on; kept in the record.
            cost_s: seconds that its prefill took; what the policy weighs.
            namespace: whose entry it is, for quotas. The key already keeps namespaces apart.

        Raises:
            StoreFullError: it cannot fit beside what is in use, or the disk is full. Nothing was evicted for it.
            StoreError: it is no KV that can be stored, or the folder is for reading only.
        """
        self._check_open()
        record, payload = encode(kv, codec=self._codec, space=space)
        usage = None
        if self._disk is not None:
            self._disk.put(key, record, payload, cost_s)
            self._unreadable.discard(key)
            usage = self._disk.usage(key)
        if usage is None:
            usage = Usage(0)
            usage.add_cost(cost_s)
        self._keep(key, record.decode(payload), usage, required=self._disk is None)

    def get(self, key: bytes) -> ChunkKV | None:
        """A chunk's KV, as tensors of your own; None where it is not stored or its record is damaged."""
        with self.read([key]) as batch:
            if batch.tiers[0] is None:
                return None
            try:
                layers = [batch.layer(0, layer) for layer in range(batch.layers[0] or 0)]
            except RecordError:
                return None
            base = batch.bases[0] or 0
        return ChunkKV([key.clone() for key, _ in layers], [value.clone() for _, value in layers], base)

    def read(self, keys: Sequence[bytes]) -> Batch:
        """Opens chunks for reading, layer by layer; nothing of them is evicted while the batch is open.

        Args:
            keys: may repeat and may be unknown: see :attr:`Batch.tiers`.
        """
        self._check_open()
        with self._lock:
            self._leases.update(keys)
            residents = {key: self._cpu.use(key) for key in keys}
        wanted = [key for key, entry in residents.items() if entry is None and key not in self._unreadable]
        snapshot = None
        try:
            snapshot, loading = self._load(wanted)
        except BaseException:
            self._release(keys)
            raise
        sources: dict[bytes, Source] = {key: entry.kv for key, entry in residents.items() if entry is not None}
        sources.update(loading)
        self._count_reads(keys, sources)
        return Batch(self, list(keys), sources, snapshot)

    def contains(self, key: bytes) -> bool:
        """Whether the chunk is stored, in any tier. Does not count as a use."""
        self._check_open()
        with self._lock:
            if key in self._cpu:
                return True
        return self._disk is not None and key not in self._unreadable and self._disk.contains(key)

    def remove(self, key: bytes) -> bool:
        """Forgets a chunk in every tier; whether it was stored. Open batches keep what they hold."""
        self._check_open()
        with self._lock:
            removed = self._cpu.remove(key)
        return (self._disk is not None and self._disk.remove(key)) or removed

    def stats(self) -> StoreStats:
        """What the store holds, and what it did since it was opened."""
        self._check_open()
        with self._lock:
            entries, sizes = {"cpu": len(self._cpu)}, {"cpu": self._cpu.used_bytes}
            evictions = {"cpu": self._cpu.evictions}
            if self._disk is not None:
                entries["disk"], sizes["disk"] = self._disk.counts()
                evictions["disk"] = self._disk.evictions
            counts = self._counts
            return StoreStats(
                entries, sizes, dict(counts.hits), counts.misses, evictions, counts.damaged, counts.bytes_read
            )

    def meta_get(self, name: str) -> bytes | None:
        """A small fact that :meth:`meta_put` stored, or None."""
        self._check_open()
        return self._facts.get(name) if self._disk is None else self._disk.fact(name)

    def meta_put(self, name: str, value: bytes) -> None:
        """Keeps a small fact beside the entries, durably where there is a path. It is never evicted."""
        self._check_open()
        if self._disk is None:
            self._facts[name] = value
        else:
            self._disk.set_fact(name, value)

    def flush(self) -> None:
        """Writes what is pending (how often entries were used) to disk."""
        self._check_open()
        if self._disk is not None:
            self._disk.flush()

    def close(self) -> None:
        """Flushes and closes; closing twice is fine. Batches must be closed before."""
        if self._closed:
            return
        with self._lock:
            if self._leases:
                raise StoreError("the store cannot be closed while batches are open")
            self._closed = True
        if self._disk is not None:
            self._disk.close()

    def __contains__(self, key: object) -> bool:
        return isinstance(key, bytes) and self.contains(key)

    def __len__(self) -> int:
        self._check_open()
        return len(self._cpu) if self._disk is None else self._disk.counts()[0]

    def __enter__(self) -> TieredStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _load(self, keys: Sequence[bytes]) -> tuple[Snapshot | None, dict[bytes, Loading]]:
        """What of ``keys`` is on disk, opened for loading."""
        if self._disk is None or not keys:
            return None, {}
        snapshot = self._disk.begin()
        loading: dict[bytes, Loading] = {}
        try:
            for key in keys:
                try:
                    record = snapshot.record(key)
                except RecordError as error:
                    self._drop_damaged(key, error)
                    continue
                if record is not None:
                    loading[key] = Loading(snapshot, key, record)
                    self._disk.touch(key)
        finally:
            if not loading:
                snapshot.close()
        return (snapshot if loading else None), loading

    def _keep(self, key: bytes, kv: ChunkKV, usage: Usage, *, required: bool) -> None:
        """Puts an entry into memory; where it is not required there, only if it fits."""
        with self._lock:
            try:
                self._cpu.put(key, kv, usage)
            except StoreFullError:
                self._cpu.remove(key)
                if required:
                    raise

    def _finish(self, loading: Loading) -> None:
        """A batch has read a record to its end: memory may keep it."""
        if self._disk is None or not self._cpu.budget_bytes:
            return
        usage = self._disk.usage(loading.key)
        if usage is not None:
            self._keep(loading.key, loading.record.decode(loading.payload), usage, required=False)

    def _drop_damaged(self, key: bytes, error: RecordError) -> None:
        logger.warning("dropped the damaged record %s: %s", key.hex(), error)
        with self._lock:
            self._counts.damaged += 1
            self._unreadable.add(key)
            self._cpu.remove(key)
        if self._disk is not None and not self._disk.environment.readonly:
            self._disk.remove(key)

    def _release(self, keys: Sequence[bytes]) -> None:
        with self._lock:
            self._leases.subtract(keys)
            for key in set(keys):
                if self._leases[key] <= 0:
                    del self._leases[key]

    def _count_reads(self, keys: Sequence[bytes], sources: dict[bytes, Source]) -> None:
        with self._lock:
            for key in keys:
                source = sources.get(key)
                if source is None:
                    self._counts.misses += 1
                else:
                    self._counts.hits["disk" if isinstance(source, Loading) else "cpu"] += 1

    def _count_bytes(self, count: int) -> None:
        with self._lock:
            self._counts.bytes_read += count

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError("the store is closed")


@dataclass
class _Counts:
    hits: Counter[str] = field(default_factory=lambda: Counter({"cpu": 0, "disk": 0}))
    misses: int = 0
    damaged: int = 0
    bytes_read: int = 0
