# ruff: noqa: D102 - methods without a docstring keep the contract of Books
"""The books of a tier: what its planner knows of the entries. Here they are in memory, in ``folder_books.py`` in a folder."""

from __future__ import annotations

import heapq
import math
from collections.abc import Generator
from itertools import count
from typing import Protocol

from ragkv.store.rows import Counters, Row

NO_QUOTA = (1 << 64) - 1


class Books(Protocol):
    """A row for each entry and for each ghost (an entry that was evicted), and the orders they stand in."""

    counters: Counters

    @property
    def entries(self) -> int:
        """How many entries there are; ghosts are none."""

    def row(self, key: bytes) -> Row | None:
        """What is known of an entry or a ghost."""

    def place(self, key: bytes, row: Row) -> None:
        """Writes a row down, where it stands (among what may be evicted, or the ghosts; what is pinned nowhere), and its alarms."""

    def lift(self, key: bytes, row: Row) -> None:
        """Takes that back, before the row is changed."""

    def strike(self, key: bytes) -> None:
        """Forgets the row of what was lifted."""

    def due(self, now: float) -> list[bytes]:
        """What may have expired, or whose pin may have ended. It is not told again."""

    def least(self, namespace: bytes | None = None) -> Generator[tuple[bytes, Row], None, None]:
        """What may be evicted, of all or of one namespace, least priority first. Nothing may be placed meanwhile."""

    def oldest_ghost(self) -> bytes | None:
        """The ghost whose use is longest ago."""

    def space(self, namespace: bytes) -> tuple[int, int]:
        """Bytes of a namespace's entries, and its quota; (0, NO_QUOTA) where nothing was said of it."""

    def set_space(self, namespace: bytes, used_bytes: int, quota_bytes: int) -> None:
        """See :meth:`space`. The nameless namespace is never set."""


class MemoryBooks(Books):
    """The books of a tier in memory."""

    def __init__(self) -> None:
        self.counters: Counters = Counters()
        self._rows: dict[bytes, Row] = {}
        self._ghosts: dict[bytes, None] = {}
        # Heaps. Places that an entry has left stay there, and are passed over: an entry stands at its newest place alone.
        self._order: list[tuple[float, bytes, int]] = []
        self._places: dict[bytes, int] = {}
        self._alarms: list[tuple[float, bytes, bool]] = []
        self._spaces: dict[bytes, tuple[int, int]] = {}
        self._numbers = count()

    @property
    def entries(self) -> int:
        return len(self._rows) - len(self._ghosts)

    def row(self, key: bytes) -> Row | None:
        return self._rows.get(key)

    def place(self, key: bytes, row: Row) -> None:
        self._rows[key] = row
        if not row.usage.size_bytes:
            self._ghosts[key] = None
        elif not row.pinned_until_s:
            place = self._places[key] = next(self._numbers)
            heapq.heappush(self._order, (row.priority, key, place))
            if len(self._order) > 2 * len(self._rows) + 64:
                self._order = [item for item in self._order if self._places.get(item[1]) == item[2]]
                heapq.heapify(self._order)
        if row.expires_s < math.inf or row.pinned_until_s:
            self._alarm(key, row)

    def lift(self, key: bytes, row: Row) -> None:
        if self._places.pop(key, None) is None:
            self._ghosts.pop(key, None)

    def strike(self, key: bytes) -> None:
        self._rows.pop(key, None)

    def due(self, now: float) -> list[bytes]:
        found = []
        while self._alarms and self._alarms[0][0] <= now:
            found.append(heapq.heappop(self._alarms)[1])
        return found

    def least(self, namespace: bytes | None = None) -> Generator[tuple[bytes, Row], None, None]:
        popped = []
        try:
            while self._order:
                item = heapq.heappop(self._order)
                key = item[1]
                if self._places.get(key) == item[2]:
                    popped.append(item)
                    if namespace is None or self._rows[key].namespace == namespace:
                        yield key, self._rows[key]
        finally:
            for item in popped:
                heapq.heappush(self._order, item)

    def oldest_ghost(self) -> bytes | None:
        return next(iter(self._ghosts), None)

    def space(self, namespace: bytes) -> tuple[int, int]:
        return self._spaces.get(namespace, (0, NO_QUOTA))

    def set_space(self, namespace: bytes, used_bytes: int, quota_bytes: int) -> None:
        self._spaces[namespace] = used_bytes, quota_bytes

    def _alarm(self, key: bytes, row: Row) -> None:
        for time_s, unpins in ((row.expires_s, False), (row.pinned_until_s, True)):
            if 0 < time_s < math.inf:
                heapq.heappush(self._alarms, (time_s, key, unpins))
        if len(self._alarms) > 4 * len(self._rows) + 64:
            self._alarms = [item for item in set(self._alarms) if self._rings(*item)]
            heapq.heapify(self._alarms)

    def _rings(self, time_s: float, key: bytes, unpins: bool) -> bool:
        row = self._rows.get(key)
        return row is not None and time_s == (row.pinned_until_s if unpins else row.expires_s)
