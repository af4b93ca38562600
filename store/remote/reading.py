"""Reading from a shared pool: several ranges of several chunks on their way at once, first layers first."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from ragkv.errors import RecordError, StoreError
from ragkv.store.payload import Payload
from ragkv.store.record import Record
from ragkv.store.remote.envelope import Opened
from ragkv.store.remote.heads import Heads
from ragkv.store.remote.pool import GoneError, PoolError
from ragkv.store.remote.records import name_of
from ragkv.store.remote.speed import Watched
from ragkv.store.source import Progress

FINISHED = "the batch is finished with this chunk"


@dataclass
class Fetch:
    """The chunks that one look into a pool found. Once one of them is read, all ranges of all that are not released are asked for.

    Attributes:
        heads: that found them.
        removals: how many the store's home had seen before the pool was looked into.
    """

    heads: Heads
    removals: int
    _readings: list[Reading] = field(default_factory=list)
    _watched: Watched | None = None
    _expected: float | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def join(self, reading: Reading) -> None:
        """One more chunk."""
        self._readings.append(reading)

    def start(self, backwards: bool = False) -> None:
        """Asks for the first ranges of all chunks, then for the second ones, and so on.

        Args:
            backwards: for one chunk after the other instead, the last one first: whoever computes from the front meets them.
        """
        with self._lock:
            readings, self._readings = self._readings, []
        given = reversed(readings) if backwards else readings
        order = [(number, reading, group) for reading in given for number, group in enumerate(reading.groups)]
        if not backwards:
            order.sort(key=lambda each: each[0])
        asked = list[tuple[Future[Any], int]]()
        with self.heads.records.pool.together():
            for _, reading, group in order:
                with suppress(StoreError):  # whoever reads it asks again, and is told
                    future = reading.ask(group)
                    asked += [] if future is None else [(future, group.stop - group.start)]
        if asked:
            speed = self.heads.speed
            for level in {reading.level for reading in readings}:
                records = [reading.record for reading in readings if reading.level == level]
                speed.sized(level, sum(one.payload_bytes for one in records) / sum(one.tokens for one in records))
            known = speed.loading
            self._expected = None if known is None else known.bytes_per_s
            self._watched = speed.watch(asked)

    def progress(self) -> Progress:
        """How far they are on their way."""
        watched = self._watched
        if watched is None:
            return Progress()
        return Progress(self.heads.speed.now() - watched.begin_s, watched.came, watched.left, self._expected)

    def late(self) -> None:
        """Counts a chunk that is given up. The pool is no faster than if all had come just now."""
        found = self.progress()
        size = found.came + found.left
        if size and (self._expected is None or size < found.since_s * self._expected):
            self.heads.speed.saw(size, found.since_s)
        self.heads.counts["late"] += 1

    def decoded(self, reading: Reading, seconds: float) -> None:
        """It took so long to decode a layer."""
        if reading.level:
            self.heads.speed.decoded(reading.level, seconds * len(reading.record.shapes) / reading.record.tokens)


@dataclass(eq=False)
class Group:
    """Segments that are asked for together: their first byte in the object, the one behind their last, and the request for them."""

    segments: range
    start: int
    stop: int
    asked: Future[Any] | None = None


@dataclass(eq=False)
class Reading:
    """A record on its way from a pool to memory, for all that read it at the time. Safe for several threads.

    Attributes:
        fetch: of all chunks that are read together.
        key: the chunk's.
        opened: its header.
        begun: its first bytes, as far as they were read with the header.
        range_bytes: of one request, about: segments that follow each other are asked for together.
        arrived: told when it was read to its end.
        level: the lossy one at which the object holds the chunk; empty for none.
        groups: what is asked for together.
    """

    fetch: Fetch
    key: bytes
    opened: Opened
    begun: Any
    range_bytes: int
    arrived: Callable[[Reading], None]
    level: str = ""
    groups: list[Group] = field(init=False)
    _payload: Payload | None = None
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _users: int = 0
    _broken: bool = False

    def __post_init__(self) -> None:
        self.groups = _groups(self.opened, len(self.begun), self.range_bytes)
        self._left, self._pool = list(self.groups), self.fetch.heads.records.pool
        self.fetch.join(self)

    @property
    def record(self) -> Record:
        """Its header."""
        return self.opened.record

    def join(self) -> bool:
        """Counts one more user; whether it can be read, or some of it could not be."""
        with self._lock:
            self._users += not self._broken
            return not self._broken

    def leave(self) -> None:
        """Counts one user less. When none is left, nothing more is asked for."""
        with self._lock:
            self._users -= 1
            self._broken = self._broken or (not self._users and bool(self._left))
            asked = [] if self._users else [group.asked for group in self._left]
        for future in asked:
            if future is not None:
                future.cancel()

    @property
    def whole(self) -> tuple[Record, Payload] | None:
        """The record, where all was read and verified."""
        return None if self._left else (self.record, self.payload)

    @property
    def payload(self) -> Payload:
        """Its bytes, as far as they were read."""
        with self._lock:
            if self._payload is None:
                try:
                    self._payload = Payload(self.record.payload_bytes)
                except (MemoryError, OSError, RuntimeError, ValueError) as error:
                    raise RecordError(f"it claims {self.record.payload_bytes} bytes") from error
            return self._payload

    def load(self, layer: int | None) -> int:
        """Reads what is missing of a layer, or of all; how many bytes.

        Raises:
            RecordError: it is damaged, or the pool does not give it: then it is a miss.
        """
        wanted = range(len(self.record.spans)) if layer is None else self.record.segments_of(layer)
        count = 0
        try:
            for group in list(self._left):
                if group.segments.start < wanted.stop and wanted.start < group.segments.stop:
                    self.fetch.start()
                    future = self.ask(group)
                    count += self._take(group, self.begun if future is None else self._pool.answer(future))
        except PoolError as error:
            if not self._users:
                raise StoreError(FINISHED) from error
            self._broken = True
            self.fetch.heads.lost(self.key, error)
            raise RecordError(f"the pool did not give it: {error}") from error
        except RecordError:
            self._broken = True
            raise
        if count and not self._left:
            self.arrived(self)
        return count

    def ask(self, group: Group) -> Future[Any] | None:
        """The request for a group, made where it was not yet; None for what is here, or was read with the header."""
        with self._lock:
            if group not in self._left:
                return None
            if group.asked is None and group.stop > len(self.begun):
                if not self._users:
                    raise StoreError(FINISHED)
                group.asked = self._pool.begin(name_of(self.key), group.start, group.stop)
            return group.asked

    def here(self, limit_s: float) -> bool:
        """Waits at most so long for all requests that were made; whether all are answered, or one failed."""
        with self._lock:
            asked = [group.asked for group in self._left if group.asked is not None]
        done, left = wait(asked, None if limit_s == math.inf else limit_s, "FIRST_EXCEPTION")
        return not left or any(future.cancelled() or future.exception() for future in done)

    def _take(self, group: Group, data: Any) -> int:
        """Puts a group to its place, and verifies it; its bytes, where nobody has done so before."""
        if data is None:
            raise GoneError("it was deleted there meanwhile")
        view, start = memoryview(data), 0 if data is self.begun else group.start
        with self._lock:
            if group not in self._left:
                return 0
            for index in group.segments:
                first, last = self.opened.place(index)
                self.opened.take(index, view[first - start : last - start], self.payload)
            self._left.remove(group)
            group.asked = None  # and its bytes
            spans = self.record.spans
            return spans[group.segments[-1]][1] - spans[group.segments[0]][0]


def _groups(opened: Opened, begun: int, range_bytes: int) -> list[Group]:
    """Segments that follow each other, as many as fit into a request; first those that were read with the header."""
    places = [opened.place(index) for index in range(len(opened.record.spans))]
    here, firsts = sum(stop <= begun for _, stop in places), [0]
    for index, (_, stop) in enumerate(places):
        full = index > here and stop - places[firsts[-1]][0] > range_bytes
        if index > firsts[-1] and (full or index == here):
            firsts.append(index)
    return [
        Group(range(first, behind), places[first][0], places[behind - 1][1])
        for first, behind in pairwise([*firsts, len(places)])
    ]
