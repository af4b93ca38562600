"""Reading from the disk tier: a view of the folder that nothing changes, and records on their way to memory."""

from __future__ import annotations

import struct
import threading
from typing import Any

from torch import Tensor

from ragkv.errors import RecordError, StoreError
from ragkv.store.environment import Environment, translated
from ragkv.store.layout import Payload
from ragkv.store.record import Record
from ragkv.store.rows import Counters, Row

_SEGMENT = struct.Struct(">I")


class Snapshot:
    """The folder as it was at one moment. Close it soon: pages that it sees are not used again until then."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._reading = environment.begin()
        # A transaction may change threads, and may not be used by two at once.
        self._lock = threading.Lock()

    def find(self, key: bytes, now: float | None) -> tuple[Record, Row] | None:
        """The header stored under a key and what the books say of it; None where there is none or it has expired.

        Args:
            key: which.
            now: the wall clock; None to find what has expired too.

        Raises:
            RecordError: it is damaged.
        """
        header, row = self._get(b"entries", key), self._get(b"usage", key)
        if header is None or row is None:
            return None
        books = Row.unpack(key, row)
        return (Record.unpack(key, header), books) if now is None or books.alive(now) else None

    def segment(self, key: bytes, record: Record, index: int, out: Tensor) -> int:
        """Copies a segment to its place in ``out`` (uint8 ``[payload_bytes]``) and verifies it there.

        Returns:
            Its bytes.

        Raises:
            RecordError: it is not what was stored.
        """
        start, stop = record.segment_span(index)
        with self._lock, translated(self._environment.path):
            data = self._txn.get(segment_key(key, index), db=self._environment.db(b"segments"))
            if data is None or len(data) != stop - start:
                raise RecordError(f"segment {index} is missing or cut short")
            out.numpy()[start:stop] = memoryview(data)
        record.check_segment(index, out[start:stop])
        return stop - start

    def counters(self) -> Counters:
        """What the books sum up.

        Raises:
            RecordError: that is damaged; the next write mends it.
        """
        return Counters.unpack(self._get(b"state", b"counters"))

    def close(self) -> None:
        """Ends the transaction."""
        with self._lock:
            self._reading.close()

    @property
    def _txn(self) -> Any:
        if self._reading.txn is None:
            raise StoreError("the batch is closed, or belongs to the process that this one was forked from")
        return self._reading.txn

    def _get(self, db: bytes, key: bytes) -> bytes | None:
        with self._lock, translated(self._environment.path):
            data = self._txn.get(key, db=self._environment.db(db))
            return None if data is None else bytes(data)


class Loading:
    """A record on its way from a snapshot to memory, segment by segment. Safe for several threads.

    It is what a batch reads the chunk from.

    Attributes:
        key: what it is stored under.
        record: its header.
        row: what the books said of it.
        payload: its bytes, as far as they were read.
    """

    tier = "disk"

    def __init__(self, snapshot: Snapshot, key: bytes, record: Record, row: Row) -> None:
        self.base, self.tokens, self.layers = record.base, record.tokens, len(record.shapes)
        self.key = key
        self.record = record
        self.row = row
        self.payload = Payload(record.payload_bytes)
        self._snapshot = snapshot
        self._missing = set(range(len(record.checksums)))
        self._lock = threading.Lock()

    @property
    def complete(self) -> bool:
        """Whether every segment was read and verified."""
        return not self._missing

    def layer(self, layer: int) -> tuple[tuple[Tensor, Tensor], int]:
        """K and V of a layer, and the bytes that were read for it."""
        count = self.load(self.record.segments_of(layer)) if self._missing else 0
        return self.record.layer(self.payload, layer), count

    def load(self, segments: range) -> int:
        """Reads what is missing of some segments; how many bytes."""
        with self._lock:
            count = 0
            for index in self._missing.intersection(segments):
                count += self._snapshot.segment(self.key, self.record, index, self.payload.data)
                self._missing.discard(index)
            return count


def segment_key(key: bytes, index: int) -> bytes:
    """What a segment is stored under."""
    return key + _SEGMENT.pack(index)
