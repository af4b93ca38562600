"""Reading from the disk tier: a view of the folder that nothing changes, and records on their way to memory."""

from __future__ import annotations

import struct
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ragkv.errors import RecordError, StoreError
from ragkv.store.environment import Environment
from ragkv.store.layout import Payload
from ragkv.store.record import Record
from ragkv.store.rows import Counters, Row
from ragkv.store.target import Target
from ragkv.store.translation import translated

_SEGMENT = struct.Struct(">I")

# A place in the payload, and the uint8 array [H, T, bytes of a token] that what stands there is copied to.
Run = tuple[int, Any]


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
        start, stop = record.spans[index]
        with self._environment.gate, self._lock, translated(self._environment.path):
            out.numpy()[start:stop] = self._view(key, record, index)
        record.check_segment(index, out[start:stop])
        return stop - start

    def scatter(self, key: bytes, record: Record, runs: Mapping[int, list[Run]], verified: set[int]) -> int:
        """Copies parts of segments straight from the file.

        Args:
            key: the record's.
            record: its header.
            runs: what to copy, by segment.
            verified: segments whose checksum was compared; the others' are, before they are copied, and they are added.

        Returns:
            Bytes of the segments that were read for the first time.

        Raises:
            RecordError: a segment is not what was stored; then nothing of it was copied.
        """
        spans, count = record.spans, 0
        with self._environment.gate, self._lock, translated(self._environment.path):
            for index, parts in runs.items():
                view = self._view(key, record, index)
                # A segment that was just hashed is copied out of the processor's cache.
                if index not in verified:
                    record.check_segment(index, view)
                    verified.add(index)
                    count += len(view)
                for place, target in parts:
                    _copy(view, spans[index][0], place, target)
        return count

    def counters(self) -> Counters:
        """What the books sum up.

        Raises:
            RecordError: that is damaged; the next write mends it.
        """
        return Counters.unpack(self._get(b"state", b"counters"))

    def close(self) -> None:
        """Ends the transaction."""
        with self._environment.gate, self._lock:
            self._reading.close()

    @property
    def _txn(self) -> Any:
        if self._reading.txn is None:
            raise StoreError("the batch is closed, or belongs to the process that this one was forked from")
        return self._reading.txn

    def _view(self, key: bytes, record: Record, index: int) -> Any:
        """A segment in the file, as a uint8 array that is valid while the lock is held."""
        start, stop = record.spans[index]
        data = self._txn.get(segment_key(key, index), db=self._environment.db(b"segments"))
        if data is None or len(data) != stop - start:
            raise RecordError(f"segment {index} is missing or cut short")
        return np.frombuffer(data, dtype=np.uint8)

    def _get(self, db: bytes, key: bytes) -> bytes | None:
        with self._environment.gate, self._lock, translated(self._environment.path):
            data = self._txn.get(key, db=self._environment.db(db))
            return None if data is None else bytes(data)


class Loading:
    """A record on its way from a snapshot to memory, segment by segment. Safe for several threads.

    It is what a batch reads the chunk from.

    Attributes:
        key: what it is stored under.
        record: its header.
        row: what the books said of it.
    """

    tier = "disk"

    def __init__(self, snapshot: Snapshot, key: bytes, record: Record, row: Row, *, keep: bool = True) -> None:
        self.base, self.tokens, self.layers = record.base, record.tokens, len(record.shapes)
        self.sensitivity = record.sensitivity
        self.key = key
        self.record = record
        self.row = row
        self._keep = keep
        self._snapshot = snapshot
        self._missing = set(range(len(record.checksums)))
        self._verified: set[int] = set()
        self._payload: Payload | None = None
        self._lock = threading.Lock()

    @property
    def payload(self) -> Payload:
        """Its bytes, as far as they were read."""
        if self._payload is None:
            self._payload = Payload(self.record.payload_bytes)
        return self._payload

    @property
    def complete(self) -> bool:
        """Whether every segment was read and verified."""
        return not self._missing

    @property
    def direct(self) -> bool:
        """Whether layers can be copied straight from the file: they are stored as they are, and memory would not keep them."""
        return not self._keep and self.record.codec == "raw" and len(self._missing) == len(self.record.checksums)

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

    def place(self, layers: range, targets: Sequence[Target], start: int) -> int:
        """Copies layers into a prompt; the bytes that were read for them.

        What memory would not keep anyway is copied straight from the file.
        """
        if self.direct and all(target.plain for target in targets):
            return self._place_directly(layers, targets, start)
        count = 0
        for layer, target in zip(layers, targets, strict=True):
            pair, read = self.layer(layer)
            target.fill(start, *pair)
            count += read
        return count

    def _place_directly(self, layers: range, targets: Sequence[Target], start: int) -> int:
        runs: dict[int, list[Run]] = {}
        places, segments = self.record.layout.layers, self.record.segments
        for layer, target in zip(layers, targets, strict=True):
            place = places[layer]
            parts = target.memory(start, place.keys[""], place.values[""])
            for index in segments.of_layer[layer]:
                runs.setdefault(index, []).extend(parts)
        with self._lock:
            return self._snapshot.scatter(self.key, self.record, runs, self._verified)


def _copy(view: Any, start: int, place: int, target: Any) -> None:
    """Copies what a segment, which begins at ``start``, has of the part at ``place``."""
    stop, size = start + len(view), target.size
    if start <= place and place + size <= stop:
        target[:] = view[place - start : place - start + size].reshape(target.shape)
        return
    row = size // len(target)
    for head in range(len(target)):
        offset = place + head * row
        first, last = max(offset, start), min(offset + row, stop)
        if first < last:
            target[head].reshape(-1)[first - offset : last - offset] = view[first - start : last - start]


def segment_key(key: bytes, index: int) -> bytes:
    """What a segment is stored under."""
    return key + _SEGMENT.pack(index)
