# ruff: noqa: D102 - methods without a docstring keep the contract of books.Books
"""The books of a tier in a folder.

They are read and changed inside one write transaction, so that there is no index in memory to load, to bound, or to keep in step
with other processes.

    usage   key -> Row, also of ghosts
    order   group, priority, key -> nothing: the entries that may be evicted, and the ghosts, least first
    alarms  time, kind, key -> nothing: when entries expire and pins end
    state   counters; bytes and quotas of namespaces; the last removals by number; what all processes did
"""

from __future__ import annotations

import logging
import math
import struct
from collections import Counter
from collections.abc import Generator
from contextlib import suppress
from typing import Any

from ragkv.errors import RecordError
from ragkv.folder import Environment, Transaction, seal, unseal
from ragkv.store.books import NO_QUOTA, Books
from ragkv.store.rows import NOBODY, Counters, Row, number, sortable
from ragkv.store.stats import Tally

logger: logging.Logger = logging.getLogger("ragkv.store")

_SPACE, _NUMBER = struct.Struct("<QQ"), struct.Struct(">Q")
_EVICTABLE, _GHOSTS, _SPACES = b"e", b"g", b"n"
_EXPIRES, _UNPINS = b"x", b"p"
_REMOVED = b"removed"
LOGGED_REMOVALS = 1024
DATABASES: dict[bytes, dict[str, Any]] = {
    name: {} for name in (b"entries", b"segments", b"usage", b"order", b"alarms", b"facts", b"state")
}
FOLDER_VERSION = 2
_VERSION = struct.Struct("<Q")


class FolderBooks(Books):
    """The books of a folder, open in a write transaction; :meth:`close` must be called before it is committed.

    Attributes:
        damaged: keys whose rows proved damaged: what was stored under them can neither be evicted nor found.
    """

    def __init__(self, txn: Transaction) -> None:
        self.txn = txn
        self.damaged: list[bytes] = []
        try:
            self.counters: Counters = Counters.unpack(txn.get("state", b"counters"))
        except RecordError:
            self.counters = Counters(removals=self._next_removal() + 1)  # one is missing in the log: all look anew
            self._recount()
            self.counters.clock = next((row.priority for _, row in self.least()), 0.0)

    @property
    def entries(self) -> int:
        return self.txn.count("entries")

    def row(self, key: bytes) -> Row | None:
        """A damaged row is struck out."""
        data = self.txn.get("usage", key)
        try:
            return None if data is None else Row.unpack(key, data)
        except RecordError:
            self.damaged.append(key)
            self.strike(key)
            self._recount()
            return None

    def place(self, key: bytes, row: Row) -> None:
        self.txn.put("usage", key, row.pack(key))
        for database, place in _places(key, row):
            self.txn.put(database, place, b"")

    def lift(self, key: bytes, row: Row) -> None:
        for database, place in _places(key, row):
            self.txn.delete(database, place)

    def strike(self, key: bytes) -> None:
        self.txn.delete("usage", key)

    def due(self, now: float) -> list[bytes]:
        # The clock was set back: pins from what is now the future are over, though their alarm will not come soon.
        back, past, early = now < self.counters.written_s, list[bytes](), list[bytes]()
        for item in self.txn.keys("alarms"):
            if number(item[:8]) <= now:
                past.append(item)
            elif back:
                early.append(item)
            else:
                break
        for item in past:
            self.txn.delete("alarms", item)
        return [item[9:] for item in (*past, *early)]

    def least(self, namespace: bytes | None = None) -> Generator[tuple[bytes, Row], None, None]:
        return self._in_order(_EVICTABLE if namespace is None else _SPACES + namespace)

    def oldest_ghost(self) -> bytes | None:
        return next((key for key, _ in self._in_order(_GHOSTS)), None)

    def space(self, namespace: bytes) -> tuple[int, int]:
        data = self.txn.get("state", _SPACES + namespace)
        return (0, NO_QUOTA) if data is None else _SPACE.unpack(data)

    def set_space(self, namespace: bytes, used_bytes: int, quota_bytes: int) -> None:
        self.txn.put("state", _SPACES + namespace, _SPACE.pack(used_bytes, quota_bytes))

    def log_removal(self, key: bytes) -> None:
        """Notes that a key was removed, for those who hold it in memory: see :func:`removed_since`."""
        name = _REMOVED + _NUMBER.pack(self.counters.removals)
        self.txn.put("state", name, seal(name, key))
        if self.counters.removals >= LOGGED_REMOVALS:
            self.txn.delete("state", _REMOVED + _NUMBER.pack(self.counters.removals - LOGGED_REMOVALS))
        self.counters.removals += 1

    def add_history(self, done: Tally, now: float) -> None:
        """Adds what a process did that closes the folder."""
        history = Tally.known(self.txn.get("state", b"history"))
        history.add_closing(done, now, self.entries, self.counters.used_bytes)
        self.txn.put("state", b"history", seal(b"history", history.to_bytes()))

    def close(self, now: float) -> None:
        """Writes the counters down."""
        self.counters.written_s = now
        self.txn.put("state", b"counters", self.counters.pack())

    def _in_order(self, group: bytes) -> Generator[tuple[bytes, Row], None, None]:
        """What stands there, least first. Where a row was damaged, its place is left: nothing stands there any more."""
        for place in self.txn.keys("order", group):
            key = place[len(group) + 8 :]
            row = self.row(key)
            if row is not None and ("order", place) in _places(key, row):
                yield key, row

    def _recount(self) -> None:
        """Sums up the rows; ticks go on behind the last one."""
        counters, spaces = self.counters, Counter[bytes]()
        counters.ghosts = 0
        for key, data in self.txn.items("usage"):
            with suppress(RecordError):
                row = Row.unpack(key, data)
                spaces[row.namespace] += row.usage.size_bytes
                counters.ghosts += not row.usage.size_bytes
                counters.tick = max(counters.tick, row.usage.tick)
        counters.used_bytes = spaces.total()
        for namespace in {*spaces, *(name[len(_SPACES) :] for name in self.txn.keys("state", _SPACES))} - {NOBODY}:
            self.set_space(namespace, spaces[namespace], self.space(namespace)[1])

    def _next_removal(self) -> int:
        """The number behind the last one in the log."""
        names = [name[len(_REMOVED) :] for name in self.txn.keys("state", _REMOVED)]
        return max((_NUMBER.unpack(name)[0] + 1 for name in names if len(name) == _NUMBER.size), default=0)


def removed_since(environment: Environment, since: int | None) -> tuple[int, list[bytes] | None]:
    """How many removals a folder ever saw, evictions not among them, and which keys after the first ``since``; None for none.

    None instead of the keys where the log does not reach back so far, or is damaged.
    """
    removals, keys = since or 0, list[bytes]()
    with environment.transaction() as txn:
        try:
            removals = Counters.unpack(txn.get("state", b"counters")).removals
            since = removals if since is None else since
            if not 0 <= removals - since <= LOGGED_REMOVALS:
                return removals, None
            for place in range(since, removals):
                name = _REMOVED + _NUMBER.pack(place)
                keys.append(unseal(name, txn.get("state", name) or b""))
        except RecordError:
            return removals, None
        return removals, keys


def check_version(environment: Environment) -> None:
    """Notes the version of a new folder, and empties one of the version before.

    Raises:
        RecordError: the folder has a version that is not read.
    """
    with environment.transaction() as txn:
        version = txn.get("state", b"format")
    if version == _VERSION.pack(FOLDER_VERSION):
        return
    if environment.readonly or version not in (None, _VERSION.pack(FOLDER_VERSION - 1)):
        raise RecordError(
            f"{environment.path} has a format that this version of ragkv does not read (wanted {FOLDER_VERSION}, got "
            f"{version!r}): use another folder, or delete it and let it be computed anew"
        )
    with environment.transaction(write=True) as change:
        version = change.get("state", b"format")
        if version == _VERSION.pack(FOLDER_VERSION):  # another process was faster
            return
        if version is not None:  # its KV have other keys now: nobody could ask for them
            logger.warning(
                "%s was made by the version before: its KV are dropped and will be read anew", environment.path
            )
            for name in DATABASES:
                change.clear(name.decode())
        change.put("state", b"format", _VERSION.pack(FOLDER_VERSION))


def _places(key: bytes, row: Row) -> list[tuple[str, bytes]]:
    """Where an entry stands in the order and among the alarms: the database, and the key there."""
    if not row.usage.size_bytes:
        return [("order", _GHOSTS + sortable(row.usage.tick) + key)]
    times = (row.expires_s, _EXPIRES), (row.pinned_until_s, _UNPINS)
    places = [("alarms", sortable(time_s) + kind + key) for time_s, kind in times if 0 < time_s < math.inf]
    if not row.pinned_until_s:
        place = sortable(row.priority) + key
        groups = [_EVICTABLE] if row.namespace == NOBODY else [_EVICTABLE, _SPACES + row.namespace]
        places += [("order", group + place) for group in groups]
    return places
