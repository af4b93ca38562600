"""Reading from a shared pool: several ranges of several chunks on their way at once, first layers first."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from ragkv.errors import RecordError, StoreError
from ragkv.store.payload import Payload
from ragkv.store.record import Record
from ragkv.store.remote.envelope import Opened
from ragkv.store.remote.pool import GoneError, Pool, PoolError
from ragkv.store.remote.records import name_of
from ragkv.store.source import Parts, Source


class Fetch:
    """The chunks that one look into a pool found. Once one of them is read, all ranges of all that are not released are asked for.

    Args:
        pool: where they are.
        threads: ask for ranges.
        lost: told the key of a chunk that the pool did not give, and why.
    """

    def __init__(self, pool: Pool, threads: ThreadPoolExecutor, lost: Callable[[bytes, PoolError], None]) -> None:
        self.pool, self.threads, self.lost = pool, threads, lost
        self._sources: list[RemoteSource] = []
        self._lock = threading.Lock()

    def join(self, source: RemoteSource) -> None:
        """One more chunk."""
        self._sources.append(source)

    def start(self) -> None:
        """Asks for the first ranges of all chunks, then for the second ones, and so on."""
        with self._lock:
            sources, self._sources = self._sources, []
        for number in range(max((len(source.groups) for source in sources), default=0)):
            for source in sources:
                if number < len(source.groups):
                    source.ask(number)


class RemoteSource(Source):
    """A record on its way from a pool to memory. Safe for several threads.

    Args:
        fetch: of all chunks that are read together.
        key: the chunk's.
        opened: its header.
        begun: its first bytes, as far as they were read with the header.
        range_bytes: of one request, about: segments that follow each other are asked for together.
        tier: its tier's name.
        arrived: told when it was read to its end.

    Attributes:
        groups: segments that are asked for together.
    """

    def __init__(
        self,
        fetch: Fetch,
        key: bytes,
        opened: Opened,
        begun: Any,
        range_bytes: int,
        tier: str,
        arrived: Callable[[RemoteSource], None],
    ) -> None:
        super().__init__(tier, opened.record)
        self.key, self.record, self.row = key, opened.record, opened.row
        self._fetch, self._opened, self._begun, self._arrived = fetch, opened, begun, arrived
        self.groups: list[range] = _groups(opened, len(begun), range_bytes)
        self._asked: list[Future[None] | None] = [None] * len(self.groups)
        self._left = set(range(len(self.groups)))
        self._payload: Payload | None = None
        self._lock = threading.Lock()
        self._released = False
        fetch.join(self)

    @property
    def whole(self) -> tuple[Record, Payload] | None:
        """The record, where all was read and verified."""
        return None if self._left else (self.record, self._room())

    def layer(self, layer: int) -> tuple[tuple[Tensor, Tensor], int]:
        """See :class:`Source`."""
        count = self.load(layer)
        return self.record.layer(self._room(), layer), count

    def parts(self, layer: int) -> tuple[Parts, int]:
        """See :class:`Source`."""
        count = self.load(layer)
        return self.record.parts(self._room(), layer), count

    def load(self, layer: int | None = None) -> int:
        """See :class:`Source`.

        Raises:
            RecordError: it is damaged, or the pool does not give it: then it is a miss.
        """
        count = 0
        for number in self._needed(layer):
            self._fetch.start()
            future = self.ask(number)
            if future is None:
                raise StoreError("the batch is finished with this chunk")
            try:
                future.result()
            except CancelledError as error:
                raise StoreError("the batch is finished with this chunk") from error
            except PoolError as error:
                self._fetch.lost(self.key, error)
                raise RecordError(f"the pool did not give it: {error}") from error
            with self._lock:
                if number in self._left:
                    self._left.discard(number)
                    count += sum(stop - start for start, stop in (self.record.spans[i] for i in self.groups[number]))
        if count and not self._left:
            self._arrived(self)
        return count

    def ask(self, number: int) -> Future[None] | None:
        """The request for a group, made where it was not yet; None once the chunk is released."""
        with self._lock:
            future = self._asked[number]
            if future is None and not self._released:
                try:
                    future = self._asked[number] = self._fetch.threads.submit(self._bring, number)
                except RuntimeError as error:
                    raise StoreError("the store is closed") from error
            return future

    def release(self) -> None:
        """See :class:`Source`. What has not been asked for will not be."""
        with self._lock:
            self._released = True
            asked = list(self._asked)
        for future in asked:
            if future is not None:
                future.cancel()

    def _needed(self, layer: int | None) -> list[int]:
        if not self._left:
            return []
        if layer is None:
            return sorted(self._left)
        segments = self.record.segments_of(layer)
        return [
            number
            for number in sorted(self._left)
            if self.groups[number].start < segments.stop and segments.start < self.groups[number].stop
        ]

    def _bring(self, number: int) -> None:
        """Reads a group, in a thread of the pool."""
        group = self.groups[number]
        start, stop = self._opened.place(group[0])[0], self._opened.place(group[-1])[1]
        if stop <= len(self._begun):
            data = self._begun[start:stop]
        else:
            read = self._fetch.pool.read(name_of(self.key), start, stop)
            if read is None:
                raise GoneError("it was deleted there meanwhile")
            data = memoryview(read)
        for index in group:
            first, last = self._opened.place(index)
            self._opened.take(index, data[first - start : last - start], self._room())

    def _room(self) -> Payload:
        with self._lock:
            if self._payload is None:
                try:
                    self._payload = Payload(self.record.payload_bytes)
                except (MemoryError, OSError, RuntimeError, ValueError) as error:
                    raise RecordError(f"it claims {self.record.payload_bytes} bytes") from error
            return self._payload


def _groups(opened: Opened, begun: int, range_bytes: int) -> list[range]:
    """Segments that follow each other, as many as fit into a request; first those that were read with the header."""
    segments: Sequence[int] = range(len(opened.record.spans))
    here = sum(1 for index in segments if opened.place(index)[1] <= begun)
    groups = [range(here)] if here else []
    first = here
    for index in segments[here:]:
        if opened.place(index)[1] - opened.place(first)[0] > range_bytes and index > first:
            groups.append(range(first, index))
            first = index
    if first < len(segments):
        groups.append(range(first, len(segments)))
    return groups
