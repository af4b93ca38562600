"""The disk tier: records in LMDB, kept within a budget."""

from __future__ import annotations

import logging
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ragkv.errors import RecordError, StoreError
from ragkv.folder import Environment, seal, unseal
from ragkv.store.layout import Payload
from ragkv.store.ledger import NO_QUOTA, Ledger
from ragkv.store.policy import Policy, Usage
from ragkv.store.record import Record
from ragkv.store.rows import Counters, Row, namespace_id
from ragkv.store.snapshot import Snapshot, segment_key
from ragkv.store.stats import Tally
from ragkv.store.terms import Terms

logger = logging.getLogger("ragkv.store")

FOLDER_VERSION = 2
DATABASES: dict[bytes, dict[str, Any]] = {
    name: {} for name in (b"entries", b"segments", b"usage", b"order", b"alarms", b"facts", b"state")
}
PAGE_BYTES = 4096
NO_FACTS: Mapping[str, bytes] = {}
_VERSION = struct.Struct("<Q")


class DiskTier:
    """Entries in a folder. Safe for several threads and processes.

    Args:
        path: the folder; made if it is not there.
        budget_bytes: what the records may take, in whole pages.
        policy: which entries go first.
        held: keys that must not be evicted now.
        selective: keep a new entry only where it is worth more than what it would evict.
        readonly: never write.
        now: the wall clock, in seconds.

    Attributes:
        evictions: entries dropped by this process, by reason.
    """

    def __init__(
        self,
        path: Path,
        budget_bytes: int,
        policy: Policy,
        held: Container[bytes] = (),
        *,
        selective: bool = False,
        readonly: bool = False,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.path = path
        self.budget_bytes = budget_bytes
        self.evictions: Counter[str] = Counter()
        self._policy = policy
        self._held = held
        self._selective = selective
        self._now = now
        self._touched: dict[bytes, int] = {}
        self._touch_lock = threading.Lock()
        self.environment = Environment.open(path, DATABASES, map_bytes=4 * budget_bytes, readonly=readonly)
        try:
            self._check_version()
        except BaseException:
            self.environment.close()
            raise

    @property
    def readonly(self) -> bool:
        """Whether nothing can be written."""
        return self.environment.readonly

    def snapshot(self) -> Snapshot:
        """A view of the folder as it is now, which no eviction changes."""
        return Snapshot(self.environment)

    def put(self, key: bytes, record: Record, payload: Payload, terms: Terms) -> Row | None:
        """Stores one record: see :meth:`put_many`."""
        return self.put_many([(key, record, payload, terms)])[0]

    def put_many(
        self, items: Sequence[tuple[bytes, Record, Payload, Terms]], facts: Mapping[str, bytes] = NO_FACTS
    ) -> list[Row | None]:
        """Stores records and small facts in one transaction, all or none; durable when it returns.

        Returns:
            What the books say of each now; None where one was not worth what it would have evicted.

        Raises:
            StoreFullError: they cannot fit; nothing was changed.
        """
        reasons: list[str] = []
        rows: list[Row | None] = []
        with self._ledger() as ledger:
            together: set[bytes] = set()
            for key, record, payload, terms in items:
                row = self._admit(ledger, key, record, terms, together, reasons)
                if row is not None:
                    self._write(ledger.txn, key, record, payload)
                    ledger.enter(key, row)
                rows.append(row)
                together.add(key)
            for name, value in facts.items():
                ledger.txn.put(name.encode(), value, db=self.environment.db(b"facts"))
        self.evictions.update(reasons)
        return rows

    def remove(self, key: bytes, reason: str | None = None) -> bool:
        """Forgets an entry; whether there was one. A reason is counted among the evictions."""
        return bool(self.remove_many([key], reason))

    def remove_many(self, keys: Iterable[bytes], reason: str | None = None, facts: Iterable[str] = ()) -> list[bytes]:
        """Forgets entries and facts in one transaction, see :meth:`remove`; those that there were."""
        keys, names = list(dict.fromkeys(keys)), [name.encode() for name in facts]
        with self.environment.read() as txn:
            keys = [key for key in keys if txn.get(key, db=self.environment.db(b"entries")) is not None]
            names = [name for name in names if txn.get(name, db=self.environment.db(b"facts")) is not None]
        if not keys and not names:
            return []
        removed = []
        # On a full disk there may be room to remove an entry, and none to rewrite many rows.
        with self._ledger(enter_uses=False, suspicious=reason == "damaged") as ledger:
            for key in keys:
                if ledger.txn.get(key, db=self.environment.db(b"entries")) is not None:
                    removed.append(key)
                self._drop(ledger, key, remember=reason is not None)
            for name in names:
                ledger.txn.delete(name, db=self.environment.db(b"facts"))
            ledger.counters.removals += len(removed)
        if removed and reason is not None:
            self.evictions[reason] += len(removed)
        return removed

    def pin(self, key: bytes, lifetime_s: float) -> bool:
        """Keeps an entry from being evicted for some seconds, 0 for no longer; whether it is stored."""
        with self._ledger() as ledger:
            row = ledger.row(key)
            if row is None or not row.alive(ledger.now):
                return False
            ledger.pin(key, row, ledger.now + lifetime_s if lifetime_s > 0 else 0.0)
            return True

    def set_quota(self, namespace: str, quota_bytes: int | None) -> None:
        """Bounds what a namespace's entries may take. Takes effect with its next put."""
        with self._ledger() as ledger:
            ledger.set_quota(namespace_id(namespace), NO_QUOTA if quota_bytes is None else quota_bytes)

    def contains(self, key: bytes) -> bool:
        """Whether a record is stored under the key, and has not expired."""
        row = self.row(key)
        return row is not None and row.alive(self._now())

    def row(self, key: bytes) -> Row | None:
        """What the books say of an entry, also of one that was evicted; None where they are damaged."""
        data = self._get(b"usage", key)
        try:
            return None if data is None else Row.unpack(key, data)
        except RecordError:
            return None

    def stored(self) -> list[bytes]:
        """All records that are stored, also those that have expired or that the books do not know."""
        with self.environment.read() as txn, txn.cursor(self.environment.db(b"entries")) as cursor:
            return [bytes(key) for key in cursor.iternext(values=False)]

    def touch(self, key: bytes) -> None:
        """Notes a use of an entry; the next write puts it into the books."""
        with self._touch_lock:
            self._touched[key] = self._touched.pop(key, 0) + 1

    def after_fork(self) -> None:
        """In a child: the thread that may have held the lock is not there."""
        self._touch_lock = threading.Lock()

    def now(self) -> float:
        """The wall clock, in seconds."""
        return self._now()

    def counts(self) -> tuple[int, Counters]:
        """How many entries there are, and what the books sum up."""
        with self.environment.read() as txn:
            data = txn.get(b"counters", db=self.environment.db(b"state"))
            return txn.stat(self.environment.db(b"entries"))["entries"], Counters.unpack(data)

    def fact(self, name: str) -> bytes | None:
        """A small durable value."""
        return self._get(b"facts", name.encode())

    def flush(self, done: Tally | None = None) -> None:
        """Puts the uses that were noted into the books and syncs the folder.

        Args:
            done: what a process did, to be added to the folder's history.
        """
        if (self._touched or (done is not None and done.any)) and not self.readonly:
            with self._ledger() as ledger:
                if done is not None:
                    history = self._read_history(ledger.txn)
                    history.merge(done)
                    data = seal(b"history", history.to_bytes())
                    ledger.txn.put(b"history", data, db=self.environment.db(b"state"))
        self.environment.sync()

    def history(self) -> Tally:
        """What all processes that closed the folder in good order did, since it was made."""
        with self.environment.read() as txn:
            return self._read_history(txn)

    def close(self, done: Tally | None = None) -> None:
        """Flushes and gives the folder back; where flushing fails, only uses that were noted are lost.

        Args:
            done: see :meth:`flush`.
        """
        try:
            self.flush(done)
        except StoreError as error:
            logger.warning("how often entries were used could not be written down: %s", error)
        finally:
            self.environment.close()

    @contextmanager
    def _ledger(self, *, enter_uses: bool = True, suspicious: bool = False) -> Iterator[Ledger]:
        """The books in a write transaction, with noted uses entered and what has expired dropped."""
        touched: dict[bytes, int] = {}
        if enter_uses:
            with self._touch_lock:
                touched, self._touched = self._touched, {}
        expired: list[bytes] = []
        try:
            with self.environment.write(suspicious=suspicious) as txn:
                ledger = Ledger(self.environment, txn, self._policy, self._held, self._now())
                for key, times in touched.items():
                    row = ledger.row(key)
                    if row is not None and row.usage.size_bytes:
                        ledger.use(key, row, times)
                expired = [key for key in ledger.due() if self._drop(ledger, key, remember=True)]
                yield ledger
                ledger.close()
        except BaseException:
            with self._touch_lock:
                self._touched = {**touched, **self._touched}
            raise
        self.evictions["expired"] += len(expired)

    def _admit(
        self, ledger: Ledger, key: bytes, record: Record, terms: Terms, passed: set[bytes], reasons: list[str]
    ) -> Row | None:
        """Makes room for a record; its row, not yet in the books, or None where it is not worth that.

        Args:
            ledger: the books.
            key: what it is to be stored under; what is stored there now is dropped.
            record: its header.
            terms: on which it is kept.
            passed: entries that must stay.
            reasons: gets one for each entry that was evicted.
        """
        row = self._drop(ledger, key, remember=False) or Row(Usage(0))
        row.usage.add_cost(terms.cost_s)
        row.usage.frequency += terms.uses
        row.usage.size_bytes = _pages(len(record.pack(key))) + sum(_pages(stop - start) for start, stop in record.spans)
        row.namespace = namespace_id(terms.namespace)
        row.created_s, row.expires_s = ledger.now, ledger.now + terms.lifetime_s
        victims = ledger.room_for(row, self.budget_bytes, passed)
        worth = ledger.promise(key, row)
        if self._selective and any(victim.priority > worth for victim, _ in victims.values()):
            ledger.refuse(key, row)
            return None
        for victim, (old, reason) in victims.items():
            ledger.age(old.priority)
            self._drop(ledger, victim, remember=True)
            reasons.append(reason)
        return row

    def _drop(self, ledger: Ledger, key: bytes, *, remember: bool) -> Row | None:
        """Deletes a record, also one that the books do not know, and strikes it out of them; what they said of it."""
        row = ledger.row(key)
        ledger.txn.delete(key, db=self.environment.db(b"entries"))
        index = 0
        while ledger.txn.delete(segment_key(key, index), db=self.environment.db(b"segments")):
            index += 1
        if row is not None:
            ledger.leave(key, row, remember=remember)
        return row

    def _write(self, txn: Any, key: bytes, record: Record, payload: Payload) -> None:
        data, segments = payload.data.numpy(), self.environment.db(b"segments")
        txn.put(key, record.pack(key), db=self.environment.db(b"entries"))
        for index, (start, stop) in enumerate(record.spans):
            txn.put(segment_key(key, index), data[start:stop], db=segments)

    def _get(self, db: bytes, key: bytes) -> bytes | None:
        with self.environment.read() as txn:
            data = txn.get(key, db=self.environment.db(db))
            return None if data is None else bytes(data)

    def _read_history(self, txn: Any) -> Tally:
        data = txn.get(b"history", db=self.environment.db(b"state"))
        try:
            return Tally() if data is None else Tally.from_bytes(unseal(b"history", bytes(data)))
        except RecordError:
            return Tally()

    def _check_version(self) -> None:
        version = self._get(b"state", b"format")
        if version is None and not self.readonly:
            with self.environment.write() as txn:
                txn.put(b"format", _VERSION.pack(FOLDER_VERSION), db=self.environment.db(b"state"))
        elif version != _VERSION.pack(FOLDER_VERSION):
            raise RecordError(
                f"{self.path} has a format that this version of ragkv does not read (wanted {FOLDER_VERSION}, got "
                f"{version!r}): use another folder, or delete it and let it be computed anew"
            )


def _pages(count: int) -> int:
    """Bytes of the pages that a value of ``count`` bytes takes, its page header included."""
    return -(-(count + 16) // PAGE_BYTES) * PAGE_BYTES
