"""Reading from the disk tier: a view of the folder that nothing changes, and records on their way to memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ragkv.errors import RecordError, StoreError
from ragkv.folder import Environment, Transaction
from ragkv.store.pages import segment_key
from ragkv.store.payload import Payload, extents
from ragkv.store.record import Record
from ragkv.store.rows import Row
from ragkv.store.source import Recorded
from ragkv.store.target import Target

# K's and V's memory, as uint8 [H, N x bytes of a token].
Rows = tuple[Any, Any]


class SegmentCopies(NamedTuple):
    """A segment in the file, and what is copied out of it: targets and sources."""

    segment: int
    view: Any
    copies: list[tuple[Any, Any]]


class DiskSnapshot:
    """The folder as it was at one moment. Close it soon: pages that it sees are not used again until then."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._reading = environment.begin()
        # A transaction may change threads, and may not be used by two at once.
        self._lock = threading.Lock()
        self._users = 0

    def find(self, key: bytes, now: float | None) -> tuple[Record, Row] | None:
        """The header stored under a key and what the books say of it; None where there is none or it has expired.

        Args:
            key: which.
            now: the wall clock; None to find what has expired too.

        Raises:
            RecordError: it is damaged.
        """
        with self.inside():
            header, row = self._txn.get("entries", key), self._txn.get("usage", key)
        if header is None or row is None:
            return None
        books = Row.unpack(key, row)
        return (Record.unpack(key, header), books) if now is None or books.alive(now) else None

    def holds(self, key: bytes) -> bool:
        """Whether there is a record under a key, also one that the books do not know."""
        with self.inside():
            return self._txn.has("entries", key)

    def segment(self, key: bytes, record: Record, index: int, out: Tensor) -> int:
        """Copies a segment to its place in ``out`` (uint8 ``[payload_bytes]``) and verifies it there.

        Returns:
            Its bytes.

        Raises:
            RecordError: it is not what was stored.
        """
        start, stop = record.spans[index]
        with self.inside():
            out.numpy()[start:stop] = self._view(key, index, start, stop)
        record.check_segment(index, out[start:stop])
        return stop - start

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Keeps others out, and the folder's memory in place, while it is read."""
        with self._environment.inside(), self._lock:
            yield

    def copies(self, key: bytes, record: Record, rows: Mapping[int, Rows], token: int) -> list[SegmentCopies]:
        """What to copy straight from the file for some layers that are stored as they are; valid :meth:`inside`.

        Args:
            key: the record's.
            record: its header.
            rows: where to, by layer; layers that follow each other.
            token: the one at which the chunk begins there.

        Raises:
            RecordError: a segment is missing.
        """
        spans, every = record.spans, extents(record.contents, record.segment_bytes)
        found = []
        for index in record.segments.of_layers(min(rows), max(rows)):
            view, copies = self._view(key, index, *spans[index]), []
            for layer, side, heads, first, last, start, stop, token_bytes in every[index]:
                if layer in rows:
                    at = token * token_bytes
                    target = rows[layer][side][heads, at + first : at + last]
                    copies.append((target, view[start:stop].reshape(target.shape)))
            found.append(SegmentCopies(index, view, copies))
        return found

    def join(self) -> None:
        """Counts one more reader."""
        self._users += 1

    def leave(self) -> None:
        """Counts one reader less; the last one closes it."""
        with self._environment.gate, self._lock:
            self._users -= 1
            if not self._users:
                self._reading.close()

    def close(self) -> None:
        """Ends the transaction."""
        with self._environment.gate, self._lock:
            self._reading.close()

    @property
    def _txn(self) -> Transaction:
        if self._reading.txn is None:
            raise StoreError("the batch is closed, or belongs to the process that this one was forked from")
        return self._reading

    def _view(self, key: bytes, index: int, start: int, stop: int) -> Any:
        """A segment in the file, as a uint8 array that is valid while the lock is held."""
        data = self._txn.view("segments", segment_key(key, index))
        if data is None or len(data) != stop - start:
            raise RecordError(f"segment {index} is missing or cut short")
        return np.frombuffer(data, dtype=np.uint8)


class Loading(Recorded):
    """A record on its way from a snapshot to memory, segment by segment. Safe for several threads."""

    def __init__(self, snapshot: DiskSnapshot, key: bytes, record: Record, row: Row, *, keep: bool = True) -> None:
        super().__init__("disk", record)
        self.key = key
        self.row = row
        self.put_s = row.created_s
        self._keep = keep
        self._snapshot = snapshot
        self._missing = set(range(len(record.checksums)))
        self._verified: set[int] = set()
        self._payload: Payload | None = None
        self._lock = threading.Lock()
        self._released = False
        snapshot.join()

    @property
    def payload(self) -> Payload:
        """Its bytes, as far as they were read."""
        if self._payload is None:
            self._payload = Payload(self.record.payload_bytes)
        return self._payload

    @property
    def whole(self) -> tuple[Record, Payload] | None:
        """The record, where every segment was read and verified."""
        return None if self._missing else (self.record, self.payload)

    @property
    def direct(self) -> bool:
        """Whether layers can be copied straight from the file: they are stored as they are, and memory would not keep them."""
        return not self._keep and self.record.codec == "raw" and len(self._missing) == len(self.record.checksums)

    def load(self, layer: int | None = None) -> int:
        """Reads what is missing of a layer, or of all; how many bytes."""
        wanted = range(len(self.record.checksums)) if layer is None else self.record.segments_of(layer)
        if self._missing.isdisjoint(wanted):  # whoever reads ahead may hold the lock
            return 0
        with self._lock:
            if self._released:
                raise StoreError("the batch is finished with this chunk")
            count = 0
            for index in self._missing.intersection(wanted):
                count += self._snapshot.segment(self.key, self.record, index, self.payload.data)
                self._missing.discard(index)
            return count

    def release(self) -> None:
        """It is not read any more."""
        with self._lock:
            released, self._released = self._released, True
        if not released:
            self._snapshot.leave()

    def place(self, layers: range, targets: Sequence[Target], start: int) -> int:
        """Copies layers into a prompt; the bytes that were read for them.

        What memory would not keep anyway is copied straight from the file.
        """
        rows = self._rows(layers, targets, start) if self.direct else None
        return super().place(layers, targets, start) if rows is None else self._place_directly(rows, start)

    def _place_directly(self, rows: dict[int, Rows], start: int) -> int:
        """A segment is verified right behind its copy, out of the processor's cache, where that takes next to nothing."""
        count = 0
        with self._snapshot.inside():
            # All that is Python's comes first: it is slow once the copies have emptied the processor's caches.
            found = self._snapshot.copies(self.key, self.record, rows, start) if rows else []
            for index, view, copies in found:
                for target, source in copies:
                    target[...] = source
                if index not in self._verified:
                    self.record.check_segment(index, view)
                    self._verified.add(index)
                    count += len(view)
        return count

    def _rows(self, layers: range, targets: Sequence[Target], start: int) -> dict[int, Rows] | None:
        """Each layer's memory in the prompt; None where one has none that a file can be copied to.

        Raises:
            StoreError: a target does not fit.
            RecordError: the record contradicts itself.
        """
        rows: dict[int, Rows] = {}
        fitting = None
        for layer, target in zip(layers, targets, strict=True):
            if target.rows is None:
                return None
            stored, dtype = self.record.contents.layers[layer].kinds, self.record.dtypes[layer]
            if fitting != (stored, dtype, self.record.shapes[layer], target.kinds):
                fitting = stored, dtype, self.record.shapes[layer], target.kinds
                said = tuple((shape, dtype) for shape in self.record.shapes[layer])
                if stored != said:
                    raise RecordError(f"layer {layer} must be {said}, the record has {stored}")
                target.check(stored, start)
            rows[layer] = target.rows
        return rows
