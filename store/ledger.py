"""The books of a folder: how its entries were used, in which order they go, and when something falls due.

They lie in the folder itself, so that there is no index in memory to load, to bound, or to keep in step with other
processes. All changes are made through a :class:`Ledger`, inside one write transaction.

    usage   key -> Row, also of entries that were evicted (ghosts: their frequency and cost are remembered)
    order   group, priority, key -> nothing: the entries that may be evicted, and the ghosts, least first
    alarms  time, kind, key -> nothing: when entries expire and pins end
    state   counters; bytes and quotas of namespaces
"""

from __future__ import annotations

import math
import struct
from collections.abc import Container, Iterator, Set
from dataclasses import dataclass, field, replace
from typing import Any

from ragkv.errors import RecordError, StoreFullError
from ragkv.folder import Environment
from ragkv.store.policy import Policy
from ragkv.store.rows import NOBODY, Counters, Row, number, sortable

_SPACE = struct.Struct("<QQ")
_EVICTABLE, _GHOSTS, _SPACES = b"e", b"g", b"n"
_EXPIRES, _UNPINS = b"x", b"p"
_GHOSTS_PER_ENTRY, _LEAST_GHOSTS = 4, 1024
NO_QUOTA = (1 << 64) - 1


@dataclass
class Ledger:
    """The books, open for changes in a write transaction; :meth:`close` must be called before it is committed."""

    environment: Environment
    txn: Any
    policy: Policy
    held: Container[bytes]
    now: float
    counters: Counters = field(init=False)

    def __post_init__(self) -> None:
        data = self.txn.get(b"counters", db=self.environment.db(b"state"))
        try:
            self.counters = Counters.unpack(data)
        except RecordError:
            self.counters = self._recount()

    def row(self, key: bytes) -> Row | None:
        """What is known of an entry, also of one that was evicted; a damaged row is struck out."""
        data = self.txn.get(key, db=self.environment.db(b"usage"))
        try:
            return None if data is None else Row.unpack(key, data)
        except RecordError:
            self._delete(b"usage", key)
            self.counters = self._recount()
            return None

    def enter(self, key: bytes, row: Row) -> None:
        """Writes down an entry that was not there, and counts a use of it."""
        self._add_bytes(row.namespace, row.usage.size_bytes)
        self._alarm(key, row)
        self.use(key, row, 1)

    def leave(self, key: bytes, row: Row, *, remember: bool) -> None:
        """Strikes an entry out; what is remembered becomes a ghost."""
        for place in self._places(key, row):
            self._delete(b"order", place)
        if row.usage.size_bytes:
            self._add_bytes(row.namespace, -row.usage.size_bytes)
        else:
            self.counters.ghosts -= 1
        self._silence(key, row)
        row.usage.size_bytes = 0
        row.expires_s, row.pinned_from_s, row.pinned_until_s = math.inf, 0.0, 0.0
        if remember:
            self.counters.ghosts += 1
            self._write(key, row)
            self._trim_ghosts()
        else:
            self._delete(b"usage", key)

    def use(self, key: bytes, row: Row, times: int) -> None:
        """Counts uses of an entry and moves it to its new place in the order."""
        self._strike(key, row)
        self.counters.tick += 1
        row.used_s = self.now
        row.usage.frequency += times
        row.usage.tick = self.counters.tick
        row.priority = self.policy.priority(key, row.usage, self.counters.clock)
        self._write(key, row)

    def pin(self, key: bytes, row: Row, until_s: float) -> None:
        """Pins an entry until a time, 0 for not at all."""
        self._strike(key, row)
        self._silence(key, row)
        row.pinned_from_s, row.pinned_until_s = self.now, until_s
        self._alarm(key, row)
        self._write(key, row)

    def due(self) -> list[bytes]:
        """Ends the pins whose time has come; returns the keys whose lifetime has passed."""
        expired = []
        with self.txn.cursor(self.environment.db(b"alarms")) as cursor:
            items = []
            for item in cursor.iternext(values=False):
                if number(bytes(item[:8])) > self.now:
                    break
                items.append(bytes(item))
        for item in items:
            kind, key = item[8:9], item[9:]
            row = self.row(key)
            if kind == _EXPIRES:
                expired.append(key)
            elif row is not None:
                self.pin(key, row, 0.0)
            self._delete(b"alarms", item)
        if self.now < self.counters.written_s:
            self._end_lapsed_pins()
        return expired

    def victims(self, missing: int, passed: Container[bytes] = (), namespace: bytes | None = None) -> dict[bytes, Row]:
        """The entries to evict, least priority first, until ``missing`` bytes are free.

        Raises:
            StoreFullError: what may be evicted is not enough.
        """
        found: dict[bytes, Row] = {}
        group = _EVICTABLE if namespace is None else _SPACES + namespace
        candidates = self._in_order(group)
        while missing > 0 and (key := next(candidates, None)) is not None:
            row = self.row(key)
            if row is not None and key not in self.held and key not in passed:
                found[key] = row
                missing -= row.usage.size_bytes
        if missing > 0:
            raise StoreFullError(f"what is pinned or in use leaves {missing} bytes too few")
        return found

    def room_for(self, row: Row, budget_bytes: int, passed: Set[bytes]) -> dict[bytes, tuple[Row, str]]:
        """The entries to evict for one that is not in the books yet, with the reason.

        Args:
            row: the new entry's.
            budget_bytes: what all entries may take.
            passed: entries that must stay.

        Raises:
            StoreFullError: it cannot fit.
        """
        size = row.usage.size_bytes
        used, quota = self.space(row.namespace)
        if size > min(budget_bytes, quota):
            raise StoreFullError(f"an entry takes {size} bytes on disk, the most is {min(budget_bytes, quota)}")
        own = self.victims(used + size - quota, passed, row.namespace)
        freed = sum(victim.usage.size_bytes for victim in own.values())
        others = self.victims(self.counters.used_bytes - freed + size - budget_bytes, passed | own.keys())
        return {key: (victim, "quota") for key, victim in own.items()} | {
            key: (victim, "budget") for key, victim in others.items()
        }

    def age(self, priority: float) -> None:
        """Sets the clock forward: an entry of this priority was evicted, or not admitted."""
        self.counters.clock = max(self.counters.clock, priority)

    def promise(self, key: bytes, row: Row) -> float:
        """The priority that an entry would be given."""
        usage = replace(row.usage, frequency=row.usage.frequency + 1, tick=self.counters.tick + 1)
        return self.policy.priority(key, usage, self.counters.clock)

    def refuse(self, key: bytes, row: Row) -> None:
        """Remembers, as a ghost, an entry that is not in the books and was not worth its place."""
        self.age(self.promise(key, row))
        self.counters.tick += 1
        self.counters.ghosts += 1
        row.usage.size_bytes, row.expires_s = 0, math.inf
        row.usage.frequency += 1
        row.usage.tick, row.used_s = self.counters.tick, self.now
        self._write(key, row)
        self._trim_ghosts()

    def space(self, namespace: bytes) -> tuple[int, int]:
        """Bytes of a namespace's entries, and its quota."""
        data = self.txn.get(_SPACES + namespace, db=self.environment.db(b"state"))
        return (0, NO_QUOTA) if data is None else _SPACE.unpack(data)

    def set_quota(self, namespace: bytes, quota_bytes: int) -> None:
        """Bounds a namespace's bytes."""
        self.txn.put(
            _SPACES + namespace,
            _SPACE.pack(self.space(namespace)[0], quota_bytes),
            db=self.environment.db(b"state"),
        )

    def close(self) -> None:
        """Writes the counters down."""
        self.counters.written_s = self.now
        self.txn.put(b"counters", self.counters.pack(), db=self.environment.db(b"state"))

    def _write(self, key: bytes, row: Row) -> None:
        self.txn.put(key, row.pack(key), db=self.environment.db(b"usage"))
        for place in self._places(key, row):
            self._put(b"order", place)

    def _strike(self, key: bytes, row: Row) -> None:
        for place in self._places(key, row):
            self._delete(b"order", place)

    def _places(self, key: bytes, row: Row) -> list[bytes]:
        """Where an entry stands in the order; what is pinned stands nowhere."""
        if not row.usage.size_bytes:
            return [_GHOSTS + sortable(row.usage.tick) + key]
        if row.pinned_until_s:
            return []
        place = sortable(row.priority) + key
        return [_EVICTABLE + place] + ([_SPACES + row.namespace + place] if row.namespace != NOBODY else [])

    def _in_order(self, group: bytes) -> Iterator[bytes]:
        with self.txn.cursor(self.environment.db(b"order")) as cursor:
            if cursor.set_range(group):
                for item in cursor.iternext(values=False):
                    if item[: len(group)] != group:
                        return
                    yield bytes(item[len(group) + 8 :])

    def _end_lapsed_pins(self) -> None:
        """The clock was set back: pins from what is now the future are over, though their alarm will not come soon."""
        with self.txn.cursor(self.environment.db(b"alarms")) as cursor:
            pinned = [bytes(item[9:]) for item in cursor.iternext(values=False) if item[8:9] == _UNPINS]
        for key in pinned:
            row = self.row(key)
            if row is not None and not row.pinned(self.now):
                self.pin(key, row, 0.0)

    def _alarm(self, key: bytes, row: Row) -> None:
        for time_s, kind in ((row.expires_s, _EXPIRES), (row.pinned_until_s, _UNPINS)):
            if 0 < time_s < math.inf:
                self._put(b"alarms", sortable(time_s) + kind + key)

    def _silence(self, key: bytes, row: Row) -> None:
        for time_s, kind in ((row.expires_s, _EXPIRES), (row.pinned_until_s, _UNPINS)):
            if 0 < time_s < math.inf:
                self._delete(b"alarms", sortable(time_s) + kind + key)

    def _recount(self) -> Counters:
        """The counters from the rows; ticks go on behind the last one, removals are counted as one more."""
        counters = Counters(removals=1)
        with self.txn.cursor(self.environment.db(b"usage")) as cursor:
            for key, data in cursor:
                try:
                    row = Row.unpack(bytes(key), bytes(data))
                except RecordError:
                    continue
                counters.used_bytes += row.usage.size_bytes
                counters.ghosts += not row.usage.size_bytes
                counters.tick = max(counters.tick, row.usage.tick)
        return counters

    def _trim_ghosts(self) -> None:
        entries = self.txn.stat(self.environment.db(b"entries"))["entries"]
        if self.counters.ghosts <= max(_LEAST_GHOSTS, _GHOSTS_PER_ENTRY * entries):
            return
        oldest = next(self._in_order(_GHOSTS), None)
        row = None if oldest is None else self.row(oldest)
        if oldest is not None and row is not None:
            self.leave(oldest, row, remember=False)

    def _add_bytes(self, namespace: bytes, count: int) -> None:
        self.counters.used_bytes += count
        if namespace != NOBODY:
            used, quota = self.space(namespace)
            self.txn.put(
                _SPACES + namespace, _SPACE.pack(max(used + count, 0), quota), db=self.environment.db(b"state")
            )

    def _put(self, db: bytes, key: bytes) -> None:
        self.txn.put(key, b"", db=self.environment.db(db))

    def _delete(self, db: bytes, key: bytes) -> None:
        self.txn.delete(key, db=self.environment.db(db))
