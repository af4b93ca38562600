# ruff: noqa: D102 - methods without a docstring keep the contract of tier.Tier
"""The disk tier: records in LMDB, kept within a budget."""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from itertools import compress
from pathlib import Path

from ragkv.errors import RecordError, StoreError
from ragkv.folder import Environment, Transaction
from ragkv.store.buffers import taken
from ragkv.store.folder_books import DATABASES, FolderBooks, check_version, removed_since
from ragkv.store.keys import PATH, labelled, tags_of
from ragkv.store.memory import NO_FACTS
from ragkv.store.notes import FolderNotes
from ragkv.store.pages import delete, store, stored_size
from ragkv.store.planner import Planner
from ragkv.store.policy import PGDSF, Policy
from ragkv.store.rows import Counters, Row
from ragkv.store.snapshot import DiskSnapshot, Loading
from ragkv.store.source import Source
from ragkv.store.stats import Tally
from ragkv.store.tier import Offer, Tier

logger: logging.Logger = logging.getLogger("ragkv.store")


class DiskTier(Tier):
    """Entries in a folder. Safe for several threads and processes.

    Args:
        path: the folder; made if it is not there.
        budget_bytes: what the records may take, in whole pages.
        policy, held, selective: see :class:`~ragkv.store.memory.MemoryTier`.
        readonly: never write.

    Attributes:
        notes: notes with each entry that it is to be sent to a pool; None where there is none.
    """

    name = "disk"

    def __init__(
        self,
        path: Path,
        budget_bytes: int,
        policy: Policy,
        held: Container[bytes] = (),
        *,
        selective: bool = False,
        readonly: bool = False,
    ) -> None:
        super().__init__()
        self.path = path
        self.budget_bytes = budget_bytes
        self._policy = policy
        self._held = held
        self._selective = selective
        self.notes: FolderNotes | None = None
        # Damaged records that could not be deleted, and when each was put.
        self._unreadable: dict[bytes, float | None] = {}
        self._touched: Counter[bytes] = Counter()
        self._counting = threading.Lock()
        self.environment: Environment = Environment.open(path, DATABASES, map_bytes=4 * budget_bytes, readonly=readonly)
        self.readonly: bool = self.environment.readonly
        try:
            check_version(self.environment)
        except BaseException:
            self.environment.close()
            raise

    def snapshot(self) -> DiskSnapshot:
        """A view of the folder as it is now, which no eviction changes."""
        return DiskSnapshot(self.environment)

    def find(self, keys: Sequence[bytes]) -> dict[bytes, Source]:
        """See :class:`Tier`. A header that proves damaged is dropped."""
        found: dict[bytes, Source] = {}
        with ExitStack() as unused:
            snapshot = unused.enter_context(closing(self.snapshot()))
            for key in keys:
                try:
                    there = None if self._known_damaged(key) else snapshot.find(key, self.now())
                except RecordError as error:
                    logger.warning("dropped the damaged record %s: %s", key.hex(), str(error))
                    self.damaged(key)
                    continue
                if there is not None:
                    fits = taken(there[0].payload_bytes) <= self.above_bytes
                    found[key] = Loading(snapshot, key, *there, keep=fits)
            if found:
                unused.pop_all()
        return found

    def size(self, entry: Offer) -> int:
        """Bytes that an entry takes here, in whole pages."""
        return stored_size(entry)

    def missing(self, keys: Sequence[bytes]) -> list[bytes]:
        now = self.now()
        with self.environment.transaction() as txn:
            return [key for key in keys if self._known_damaged(key) or not self._alive(txn, key, now)]

    def admit(
        self,
        entries: Sequence[Offer],
        facts: Mapping[str, bytes] = NO_FACTS,
        *,
        still: Callable[[bytes], bool] | None = None,
    ) -> list[bool]:
        """Stores records and small facts in one transaction, all or none; durable when it returns.

        ``still`` says of what arrived from a pool whether it is wanted still. It is not noted to be sent there, and is left where
        it is stored or to be deleted.
        """
        kept: list[bool] = []
        written: set[bytes] = set()
        with self._planner() as planner:
            txn = planner.books.txn
            for entry in entries:
                if still is not None and not (still(entry.key) and self._welcome(txn, entry.key)):
                    kept.append(False)
                    continue
                if txn.has("entries", entry.key):  # others may have it in memory
                    planner.books.log_removal(entry.key)
                row = planner.admit(entry.key, self.size(entry), entry.terms, passed=written, selective=self._selective)
                if row is not None:
                    store(txn, entry)
                    if self.notes is not None and still is None:
                        self.notes.send(txn, entry.key)
                kept.append(row is not None)
                written.add(entry.key)
            for name, value in facts.items():
                txn.put("facts", name.encode(), value)
        size = sum(entry.record.payload_bytes for entry in compress(entries, kept))
        with self._counting:
            self.written_bytes += size
        return kept

    def remove(self, keys: Iterable[bytes], reason: str | None = None, facts: Iterable[str] = ()) -> list[bytes]:
        """Forgets entries and facts in one transaction; none where nothing is named.

        It is noted of what is not here, too: that may be in memory, of whatever process, or on its way from a pool.
        """
        keys, names = [key for key in dict.fromkeys(keys) if key], [name.encode() for name in facts]
        with self.environment.transaction() as txn:
            if self.readonly:
                keys = [key for key in keys if txn.has("entries", key)]
            names = [name for name in names if txn.has("facts", name)]
        if not keys and not names:
            return []
        # On a full disk there may be room to remove an entry, and none to rewrite many rows.
        with self._planner(enter_uses=False, suspicious=reason == "damaged") as planner:
            gone = [key for key in keys if planner.drop(key, reason)]
            for key in keys:
                planner.books.log_removal(key)
            for name in names:
                planner.books.txn.delete("facts", name)
        return gone

    def damaged(self, key: bytes) -> None:
        try:
            self._unreadable[key] = self._created_s(key)
            if not self.readonly:
                self.remove([key], "damaged")
                self._unreadable.pop(key, None)
        except StoreError as failure:
            logger.warning("the damaged record %s could not be deleted: %s", key.hex(), failure)

    def removed(self, since: int | None = None) -> tuple[int, list[bytes] | None]:
        return removed_since(self.environment, since)

    def pin(self, keys: Sequence[bytes], lifetime_s: float) -> int:
        """Keeps entries from being evicted for some seconds, 0 for no longer; how many are stored."""
        with self._planner() as planner:
            return planner.pin(keys, lifetime_s)

    def set_quota(self, namespace: str, quota_bytes: int | None) -> None:
        """Bounds what a namespace's entries may take. Takes effect with its next put."""
        with self._planner() as planner:
            planner.set_quota(namespace, quota_bytes)

    def row(self, key: bytes) -> Row | None:
        """What the books say of an entry, also of one that was evicted; None where they are damaged."""
        data = self._get("usage", key)
        try:
            return None if data is None else Row.unpack(key, data)
        except RecordError:
            return None

    def rank(self) -> None:
        """Has entries stand in the order of the policy, where another one kept the folder before."""
        name = getattr(self._policy, "name", type(self._policy).__name__).encode()
        if self.readonly or (self._get("state", b"policy") or PGDSF.name.encode()) == name:
            return
        try:
            with self._planner(enter_uses=False) as planner:
                planner.rank(list(planner.books.txn.keys("usage")))
                planner.books.txn.put("state", b"policy", name)
        except StoreError as error:  # the disk is full, or pages are damaged: what is there can be read all the same
            logger.warning("%s stays in the order of the policy before: %s", self.path, str(error))

    def stored(self, beginning: bytes = b"") -> list[bytes]:
        """All records whose keys begin so, also those that have expired or that the books do not know."""
        with self.environment.transaction() as txn:
            return list(txn.keys("entries", beginning))

    def beginning(self, beginnings: Collection[bytes]) -> dict[bytes, list[bytes]]:
        """See :meth:`TieredStore.beginning`."""
        return {beginning: self.stored(beginning) for beginning in beginnings}

    def computed_of(self, keys: Collection[bytes]) -> list[bytes]:
        """See :meth:`TieredStore.computed_of`. What cannot be read is among them."""
        tags = tags_of(keys)
        computed = self.stored(PATH) if tags else []

        def named(key: bytes) -> bool:
            try:
                found = snapshot.find(key, None)
            except RecordError:
                return True
            return found is not None and labelled(found[0].label, tags)

        with closing(self.snapshot()) as snapshot:
            return list(filter(named, computed))

    def touch(self, keys: Iterable[bytes]) -> None:
        """Notes a use of entries; the next write puts it into the books."""
        if not self.readonly:
            with self._counting:
                self._touched.update(list(keys))

    def after_fork(self) -> None:
        self.evictions.clear()
        self.written_bytes: int = 0
        self._touched = Counter()
        self._counting = threading.Lock()

    def counts(self) -> tuple[int, int]:
        with self.environment.transaction() as txn:
            entries = txn.count("entries")
        return entries, self.counters().used_bytes

    def counters(self) -> Counters:
        """What the books sum up."""
        return Counters.unpack(self._get("state", b"counters"))

    def fact(self, name: str) -> bytes | None:
        """A small durable value."""
        return self._get("facts", name.encode())

    def history(self) -> Tally:
        """What all processes that closed the folder in good order did, since it was made."""
        return Tally.known(self._get("state", b"history"))

    def flush(self, limit_s: float = math.inf, done: Tally | None = None) -> None:
        """Puts the uses that were noted into the books, and what a process did into the folder's history, and syncs."""
        if (self._touched or (done is not None and done.any)) and not self.readonly:
            with self._planner() as planner:
                if done is not None:
                    planner.books.add_history(done, self.now())
        self.environment.sync()

    def close(self, done: Tally | None = None) -> None:
        """Flushes, and gives the folder back. Where that fails, only uses that were noted are lost."""
        try:
            self.flush(done=done)
        except StoreError as error:
            logger.warning("how often entries were used could not be written down: %s", str(error))
        finally:
            self.environment.close()

    @contextmanager
    def _planner(self, *, enter_uses: bool = True, suspicious: bool = False) -> Iterator[Planner[FolderBooks]]:
        """A write transaction, with noted uses entered and what has expired dropped."""
        touched: Counter[bytes] = Counter()
        if enter_uses:
            with self._counting:
                touched, self._touched = self._touched, touched
        try:
            with self.environment.transaction(write=True, suspicious=suspicious) as txn:
                books, now = FolderBooks(txn), self.now()
                planner = Planner(
                    books, self._policy, self.budget_bytes, self._held, lambda: now, partial(self._delete, txn)
                )
                for key, times in touched.items():
                    planner.touch(key, times)
                planner.sweep()
                yield planner
                books.close(now)
        except BaseException:
            with self._counting:
                self._touched.update(touched)
            raise
        with self._counting:
            self.evictions.update(planner.evicted)
        for key in filter(self._stray, books.damaged):
            self.damaged(key)

    def _delete(self, txn: Transaction, key: bytes) -> bool:
        """Deletes a record, also one that the books do not know; whether there was one. What is not here cannot be sent."""
        if self.notes is not None:
            self.notes.unsend(txn, key)
        return delete(txn, key)

    def _welcome(self, txn: Transaction, key: bytes) -> bool:
        """Whether a chunk of a pool may come: it is neither here nor to be deleted there."""
        unwanted = self.notes is not None and self.notes.deletes(txn, key)
        return not unwanted and not self._alive(txn, key, self.now())

    def _alive(self, txn: Transaction, key: bytes, now: float) -> bool:
        row = txn.get("usage", key)
        try:
            return row is not None and Row.unpack(key, row).alive(now) and txn.has("entries", key)
        except RecordError:
            return False

    def _stray(self, key: bytes) -> bool:
        """Whether there is a record that the books do not know."""
        with self.environment.transaction() as txn:
            return txn.has("entries", key) and not txn.has("usage", key)

    def _known_damaged(self, key: bytes) -> bool:
        """Whether it was found damaged, and nobody put it again since."""
        return key in self._unreadable and self._unreadable[key] == self._created_s(key)

    def _created_s(self, key: bytes) -> float | None:
        row = self.row(key)
        return None if row is None else row.created_s

    def _get(self, database: str, key: bytes) -> bytes | None:
        with self.environment.transaction() as txn:
            return txn.get(database, key)
