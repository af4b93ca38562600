"""The store: chunks' KV in memory and on disk behind one interface."""

from __future__ import annotations

import math
import os
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from itertools import product
from pathlib import Path
from time import perf_counter

import torch

from ragkv.chunk import ChunkKV
from ragkv.errors import ArgumentTypeError, OfOneProcess, RecordError, StoreError, instance
from ragkv.folder.filesystem import folder_path
from ragkv.store.batch import Batch
from ragkv.store.codecs import Codec, get_codec
from ragkv.store.disk import DiskTier
from ragkv.store.gpu import GpuTier
from ragkv.store.keeping import Keeping
from ragkv.store.keys import checked_keys
from ragkv.store.levels import Levels
from ragkv.store.memory import NO_FACTS, MemoryTier
from ragkv.store.policy import Policy, get_policy
from ragkv.store.prefetch import Prefetch
from ragkv.store.rates import Loading
from ragkv.store.remote import RemoteTier
from ragkv.store.rope import RotationLike, ropes_of
from ragkv.store.source import Asking, Source
from ragkv.store.stats import Checks, Moved, StoreStats
from ragkv.store.terms import Item, checked_names
from ragkv.store.tier import Tier
from ragkv.store.tiers import Tiers


class TieredStore(Keeping, OfOneProcess, instead="open its folder where it is needed, ragkv.TieredStore(path)"):
    """KV of chunks in CPU memory and, with a path, on disk. Safe for several threads and processes.

    What is put is written through to disk at once; memory keeps what the policy holds most valuable. Both tiers keep
    within their budgets by evicting, except what is pinned or held by an open batch.

    Args:
        path: folder of the disk tier, made with its parents if it is not there; None for memory only.
        gpu_bytes, cpu_bytes, disk_bytes: budgets of the tiers, on disk in whole pages of the file, in memory that is pinned for a
            GPU in powers of two; 0 switches one off.
        policy: name of the eviction policy, or one of your own. Each tier keeps its own clock.
        codec: how KV is encoded on disk: ``raw``, ``lossless``, ``int8``, ``fp8``, ``int4``, ``cachegen``, or one of these
            with other settings.
        cpu_codec: how CPU memory keeps KV: encoded from what is put, and from what is on disk once that is read again. By
            default what decoding gives, so that a chunk is the same wherever it comes from. The GPU tier keeps numbers.
        selective: refuse a new entry where the tier is full and it is worth less than what it would evict, so that
            chunks that are asked for once do not flush the store; :meth:`put` then returns False.
        readonly: open the folder for reading only, and write nothing to a shared pool. A folder that may not be written to is
            opened so by itself.
        device: where the GPU tier lies.
        tiers: further tiers, such as a shared pool: searched in this order for what memory and disk do not have, and offered
            whatever is put. See :class:`~ragkv.store.tier.Tier`.
        remote: a shared pool behind all others: its URL, as ``s3://BUCKET/PREFIX`` or ``redis://HOST``, or a
            :class:`~ragkv.store.remote.RemoteTier` of your own settings. See docs/remote.md.

    Attributes:
        remote: the shared pool; None where there is none.

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
        codec: str | Codec = "raw",
        cpu_codec: str | Codec | None = None,
        selective: bool = False,
        readonly: bool = False,
        device: torch.device | str = "cuda",
        tiers: Sequence[Tier] = (),
        remote: str | RemoteTier | None = None,
    ) -> None:
        budgets = (gpu_bytes, cpu_bytes, disk_bytes)
        if not all(isinstance(budget, int | float) and budget >= 0 for budget in budgets):
            raise StoreError(f"budgets are bytes, got gpu {gpu_bytes!r}, cpu {cpu_bytes!r}, disk {disk_bytes!r}")
        folder = None if path is None else folder_path(path)
        instance("tiers", tiers, Sequence, "a list of further tiers")
        for name, value in {"selective": selective, "readonly": readonly}.items():
            instance(name, value, bool, "True or False")
        self.path: Path | None = folder if disk_bytes else None
        if not cpu_bytes and self.path is None:
            raise StoreError("a store needs memory or disk: give cpu_bytes, or a path and disk_bytes")
        in_memory = None if cpu_codec is None else get_codec(cpu_codec)
        self._levels = Levels(in_memory if in_memory and self.path is None else get_codec(codec), in_memory)
        self._policy = get_policy(policy)
        self._closed = False
        instance(
            "remote", remote, str | RemoteTier | None, "the URL of a pool, as 's3://bucket/prefix', or a RemoteTier"
        )
        self.remote: RemoteTier | None = RemoteTier(remote) if isinstance(remote, str) else remote
        if self.remote is not None:
            self.remote.readonly |= readonly
        leases: Counter[bytes] = Counter()
        lock = threading.RLock()
        gpu = GpuTier(gpu_bytes, device, self._policy, leases, lock) if gpu_bytes else None
        self._gpu: GpuTier | None = gpu
        memory = MemoryTier(
            cpu_bytes,
            self._policy,
            leases,
            lock,
            self._levels,
            selective=selective or self.path is not None,
            # Without a disk, memory is where a chunk is stored: what leaves it is not to be found above either.
            gone=(lambda key: gpu.remove([key])) if gpu and self.path is None else (lambda key: None),
        )
        self._disk: DiskTier | None = None
        if self.path is not None:
            self._disk = DiskTier(self.path, disk_bytes, self._policy, leases, selective=selective, readonly=readonly)
        home = self._disk or memory
        above = [tier for tier in (gpu, memory) if tier and tier is not home and tier.budget_bytes]
        try:
            if self._disk is not None:
                self._disk.rank()
            self._tiers = Tiers(above, home, [*tiers, *filter(None, [self.remote])], leases, lock)
        except BaseException:
            home.close()
            raise
        self._prefetch = Prefetch(self._tiers)

    def put(
        self,
        key: bytes,
        kv: ChunkKV,
        *,
        space: str = "",
        cost_s: float = 0.0,
        namespace: str = "",
        lifetime_s: float = math.inf,
        label: str = "",
        rotations: Sequence[RotationLike | None] = (),
    ) -> bool:
        """Stores a chunk's KV; what was stored under the key is replaced. Durable, with a path, when it returns.

        Args:
            key: see :func:`chunk_key`.
            kv: L pairs ``[H, T, D]`` in fp32, bf16 or fp16; they are copied.
            space: fingerprint of what the KV depends on; kept in the record.
            cost_s: seconds that its prefill took; what the policy weighs.
            namespace: whose entry it is, for quotas. The key already keeps namespaces apart.
            lifetime_s: seconds after which it is a miss.
            label: what you know it by, at most 256 characters; kept in the record and shown by lists.
            rotations: how each layer's keys turn; ``int8``, ``int4`` and ``cachegen`` err less in K when they are told.

        Returns:
            Whether it is stored now: always, unless the store is selective.

        Raises:
            StoreFullError: it cannot fit beside what is pinned or in use, or the disk is full. Nothing was evicted.
            StoreError: it is no KV that can be stored, or the folder is for reading only.
        """
        item = Item(key, kv, cost_s, label)
        return self.put_many([item], space=space, namespace=namespace, lifetime_s=lifetime_s, rotations=rotations)[0]

    def put_many(
        self,
        items: Sequence[Item | tuple[bytes, ChunkKV, float]],
        *,
        facts: Mapping[str, bytes] = NO_FACTS,
        space: str = "",
        namespace: str = "",
        lifetime_s: float = math.inf,
        rotations: Sequence[RotationLike | None] = (),
    ) -> list[bool]:
        """Stores several chunks and small facts, on disk in one transaction: all or none, and synced once.

        Args:
            items: key, KV, seconds that the prefill took, and a label, of each.
            facts: small values by name, see :meth:`meta_get`; there need be no items.
            space, namespace, lifetime_s, rotations: see :meth:`put`.

        Returns:
            Whether each is stored now.

        Raises:
            StoreFullError, StoreError: see :meth:`put`. On disk nothing was changed.
        """
        tiers, started = self._open, perf_counter()
        try:
            given = [Item(*item) for item in items]
        except TypeError as error:
            raise ArgumentTypeError(f"items must be a list of (key, KV, seconds, label), got {items!r:.80}") from error
        offers, above = self._levels.offers(given, space, ropes_of(rotations), namespace, lifetime_s)
        with tiers.lock:
            tiers.tally.latency["encode"].add(perf_counter() - started)
        return tiers.put_many(offers, above, facts)

    def get(self, key: bytes) -> ChunkKV | None:
        """A chunk's KV, as tensors of your own; None where it is not stored or its record is damaged."""
        with self.read([key]) as batch:
            try:
                return None if batch.tiers[0] is None else batch.kv(0)
            except RecordError:
                return None

    def read(
        self, keys: Sequence[bytes], moved: Mapping[bytes, Moved] | None = None, asking: Asking | None = None
    ) -> Batch:
        """Opens chunks for reading, layer by layer; nothing of them is evicted while the batch is open.

        Args:
            keys: may repeat and may be unknown: see :attr:`Batch.tiers`.
            moved: what :meth:`prefetch` was given for these chunks: they are counted as hits of where they were.
            asking: how it is asked for what comes over a network; by default whoever reads has time.
        """
        return self._open.read(checked_keys(keys), moved or {}, asking)

    def prefetch(self, keys: Sequence[bytes], moved: dict[bytes, Moved] | None = None) -> Future[int]:
        """Starts moving chunks to memory, one after the other in a thread of the store. That is no use of them for the policy.

        Args:
            keys: may repeat and may be unknown.
            moved: is told where each chunk that is moved was.

        Returns:
            A future of the bytes read; nobody needs to wait for it.
        """
        return self._prefetch.begin(checked_keys(keys), {} if moved is None else moved)

    def contains(self, key: bytes) -> bool:
        """Whether the chunk is stored, in any tier. Does not count as a use."""
        return not self.missing([key])

    def missing(self, keys: Iterable[bytes]) -> list[bytes]:
        """Those of the chunks that are stored in no tier, each once and in order. Does not count as a use."""
        return self._open.missing(checked_keys(keys))

    def where(self, keys: Iterable[bytes], limit_s: float = math.inf) -> dict[bytes, str]:
        """The tier that each chunk would be read from now; missing ones are not named. Does not count as a use.

        Args:
            keys: may be unknown.
            limit_s: so much longer than lately is waited for a shared pool: what it has not denied by then counts as there.
        """
        return self._open.where(checked_keys(keys), limit_s)

    def loading(self) -> dict[str, Loading]:
        """How fast chunks came lately from tiers behind, such as a pool, by name."""
        found = {tier.name: tier.loading() for tier in self._tiers.behind}
        return {name: loading for name, loading in found.items() if loading is not None}

    def sizes(self, keys: Iterable[bytes]) -> dict[str, int]:
        """Bytes that chunks take, by tier; a tier that holds none of them is not named. Does not count as a use."""
        sizes = Counter[str]()
        for key, tier in product(set(checked_keys(keys)), self._open.tiers):
            if row := tier.known(key):
                sizes[tier.name] += row.usage.size_bytes
        return dict(sizes)

    @property
    def unclaimed_bytes(self) -> int:
        """What the GPU tier will take of its device when the first chunk comes to it; 0 where it has, or where there is none."""
        return 0 if self._gpu is None else self._gpu.unclaimed_bytes

    def remove(self, key: bytes) -> bool:
        """Forgets a chunk in every tier; whether it was stored. Open batches keep what they hold."""
        return self.remove_many([key]) == 1

    def remove_many(self, keys: Iterable[bytes], facts: Iterable[str] = ()) -> int:
        """Forgets chunks in every tier, and small facts, on disk in one transaction; how many chunks were stored."""
        return self._open.remove_many(checked_keys(keys), checked_names(facts))

    def headers(self, keys: Iterable[bytes]) -> dict[bytes, Source]:
        """What is known of stored chunks, their KV left aside: base, tokens, rows, what they attended to. Not a use of them."""
        sources = self._open.find(checked_keys(keys))
        for source in sources.values():
            source.release()
        return sources

    def stats(self) -> StoreStats:
        """What the store holds, and what it did since it was opened."""
        return self._open.stats()

    def count_check(self, method: str, kl: float, agreed: bool) -> None:
        """Count a prompt that was compared with a full prefill, for :meth:`stats`.

        Args:
            method: that put it together.
            kl: of its first token to the full prefill's, in nats.
            agreed: whether the first token is the same.
        """
        tiers = self._open
        with tiers.lock:
            tiers.tally.checks[method].merge(Checks(1, kl, int(agreed)))

    def share(self) -> int:
        """Sends a shared pool what was stored before it was given one, in the background; how many chunks are looked at.

        What the pool has is not sent again. See :meth:`flush`.
        """
        return self._open.share()

    def flush(self, limit_s: float = 60.0) -> None:
        """Writes what is pending (how often entries were used) to disk, and waits until a shared pool has what was put.

        Raises:
            UploadError: the pool did not have it after so many seconds. It is noted, and sent later.
        """
        instance("limit_s", limit_s, int | float, "a number of seconds")
        self._open.flush(limit_s)

    def close(self) -> None:
        """Flushes and closes; closing twice is fine. Batches must be closed before."""
        with self._tiers.lock:
            if self._closed:
                return
            if self._tiers.leases:
                raise StoreError("the store cannot be closed while batches are open")
            self._closed = True
        self._prefetch.close()  # it reads from what is closed next
        self._tiers.close()

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    @property
    def _open(self) -> Tiers:
        """Its tiers, while it is open."""
        if self._closed:
            raise StoreError("the store is closed")
        return self._tiers

    def __contains__(self, key: object) -> bool:
        return isinstance(key, bytes) and self.contains(key)

    def __enter__(self) -> TieredStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
