"""The disk tier: records in LMDB, kept within a budget by a policy whose state lies beside them.

Everything that eviction needs stands in the folder: how an entry was used (``usage``), and the entries in the order of
their priority (``order``). So there is no index in memory to load, to bound, or to keep in step with other processes.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ragkv.errors import RecordError, StoreFullError
from ragkv.store.environment import Environment
from ragkv.store.layout import Payload
from ragkv.store.policy import Policy, Usage
from ragkv.store.record import Record

FOLDER_VERSION = 1
PAGE_BYTES = 4096
_USAGE = struct.Struct("<QddQQQd")
_DOUBLE = struct.Struct("<d")
_COUNT = struct.Struct("<Q")
_SEGMENT = struct.Struct(">I")
_SIGN = 1 << 63


@dataclass(slots=True)
class Row:
    """What the folder keeps of an entry besides its record."""

    usage: Usage
    priority: float = 0.0

    def pack(self) -> bytes:
        """The row as bytes."""
        use = self.usage
        return _USAGE.pack(
            use.size_bytes, use.cost_s, use.last_cost_s, use.computed, use.frequency, use.tick, self.priority
        )

    @classmethod
    def unpack(cls, data: bytes) -> Row:
        """The row of :meth:`pack`."""
        *usage, priority = _USAGE.unpack(data)
        return cls(Usage(*usage), priority)


@dataclass
class DiskTier:
    """Entries in a folder. Safe for several threads and processes.

    Args:
        path: the folder; made if it is not there.
        budget_bytes: what the records may take, in whole pages.
        policy: which entries go first.
        held: keys that must not be evicted now.
    """

    path: Path
    budget_bytes: int
    policy: Policy
    held: Container[bytes] = ()
    evictions: int = 0
    _touched: dict[bytes, int] = field(default_factory=dict)
    _touch_lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.environment = Environment.open(self.path, map_bytes=4 * self.budget_bytes)
        self._check_version()

    def begin(self) -> Snapshot:
        """A view of the folder as it is now, which no eviction changes."""
        return Snapshot(self.environment, self.environment.begin())

    def put(self, key: bytes, record: Record, payload: Payload, cost_s: float) -> list[bytes]:
        """Stores a record in one transaction; durable when it returns.

        Returns:
            The keys that were evicted for it.

        Raises:
            StoreFullError: it cannot fit; nothing was changed.
        """
        header = record.pack(key)
        size = _pages(len(header)) + sum(_pages(stop - start) for start, stop in _spans(record))
        if size > self.budget_bytes:
            raise StoreFullError(f"an entry takes {size} bytes on disk, disk_bytes is {self.budget_bytes}")
        data = payload.data.numpy()
        with self.environment.write() as txn:
            self._apply_touches(txn)
            row = self._drop(txn, key) or Row(Usage(0))
            evicted = self._make_room(txn, size)
            row.usage.size_bytes = size
            row.usage.add_cost(cost_s)
            txn.put(key, header, db=self.environment.db(b"entries"))
            segments = self.environment.db(b"segments")
            for index, (start, stop) in enumerate(_spans(record)):
                txn.put(key + _SEGMENT.pack(index), data[start:stop], db=segments)
            self._use(txn, key, row, 1)
            self._add_bytes(txn, size)
        self.evictions += len(evicted)
        return evicted

    def remove(self, key: bytes) -> bool:
        """Forgets an entry; whether there was one."""
        if not self.contains(key):
            return False
        with self.environment.write() as txn:
            return self._drop(txn, key) is not None

    def contains(self, key: bytes) -> bool:
        """Whether a record is stored under the key."""
        with self.environment.read() as txn:
            return txn.get(key, db=self.environment.db(b"entries")) is not None

    def touch(self, key: bytes) -> None:
        """Notes a use of an entry; the next write stores it."""
        with self._touch_lock:
            self._touched[key] = self._touched.pop(key, 0) + 1

    def usage(self, key: bytes) -> Usage | None:
        """How an entry was used, as far as it is stored."""
        with self.environment.read() as txn:
            data = txn.get(key, db=self.environment.db(b"usage"))
            return None if data is None else Row.unpack(bytes(data)).usage

    def keys(self) -> list[bytes]:
        """All keys, in their order."""
        with self.environment.read() as txn, txn.cursor(self.environment.db(b"entries")) as cursor:
            return [bytes(key) for key in cursor.iternext(values=False)]

    def counts(self) -> tuple[int, int]:
        """Entries, and the bytes that they take."""
        with self.environment.read() as txn:
            return txn.stat(self.environment.db(b"entries"))["entries"], self._state(txn, b"bytes", _COUNT, 0)

    def fact(self, name: str) -> bytes | None:
        """A small durable value."""
        with self.environment.read() as txn:
            value = txn.get(name.encode(), db=self.environment.db(b"facts"))
            return None if value is None else bytes(value)

    def set_fact(self, name: str, value: bytes) -> None:
        """Stores a small durable value."""
        with self.environment.write() as txn:
            txn.put(name.encode(), value, db=self.environment.db(b"facts"))

    def flush(self) -> None:
        """Stores the uses that were noted and syncs the folder."""
        if self._touched and not self.environment.readonly:
            with self.environment.write() as txn:
                self._apply_touches(txn)
        self.environment.sync()

    def close(self) -> None:
        """Stores the uses that were noted and gives the folder back."""
        self.flush()
        self.environment.close()

    def _check_version(self) -> None:
        with self.environment.read() as txn:
            version = self._state(txn, b"format", _COUNT, None)
        if version is None:
            with self.environment.write() as txn:
                txn.put(b"format", _COUNT.pack(FOLDER_VERSION), db=self.environment.db(b"state"))
        elif version != FOLDER_VERSION:
            self.environment.close()
            raise RecordError(
                f"{self.path} has format version {version}, this version of ragkv reads {FOLDER_VERSION}: "
                "use another folder, or delete it and let it be computed anew"
            )

    def _make_room(self, txn: Any, size: int) -> list[bytes]:
        missing = self._state(txn, b"bytes", _COUNT, 0) + size - self.budget_bytes
        if missing <= 0:
            return []
        victims: list[tuple[bytes, float]] = []
        for key, priority in self._by_priority(txn):
            data = txn.get(key, db=self.environment.db(b"usage"))
            victims.append((key, priority))
            missing -= Row.unpack(bytes(data)).usage.size_bytes
            if missing <= 0:
                break
        if missing > 0:
            raise StoreFullError(
                f"an entry of {size} bytes does not fit into disk_bytes = {self.budget_bytes}: "
                f"what is in use leaves {missing} bytes too few"
            )
        for key, _ in victims:
            self._drop(txn, key)
        clock = self._state(txn, b"clock", _DOUBLE, 0.0)
        txn.put(b"clock", _DOUBLE.pack(max(clock, victims[-1][1])), db=self.environment.db(b"state"))
        return [key for key, _ in victims]

    def _by_priority(self, txn: Any) -> Iterator[tuple[bytes, float]]:
        with txn.cursor(self.environment.db(b"order")) as cursor:
            for item in cursor.iternext(values=False):
                key = bytes(item[8:])
                if key not in self.held:
                    yield key, _number(bytes(item[:8]))

    def _drop(self, txn: Any, key: bytes) -> Row | None:
        data = txn.get(key, db=self.environment.db(b"usage"))
        if data is None:
            return None
        row = Row.unpack(bytes(data))
        txn.delete(key, db=self.environment.db(b"usage"))
        txn.delete(_sortable(row.priority) + key, db=self.environment.db(b"order"))
        txn.delete(key, db=self.environment.db(b"entries"))
        index = 0
        while txn.delete(key + _SEGMENT.pack(index), db=self.environment.db(b"segments")):
            index += 1
        self._add_bytes(txn, -row.usage.size_bytes)
        return row

    def _use(self, txn: Any, key: bytes, row: Row, times: int) -> None:
        """Counts uses of an entry and moves it to its new place in the order."""
        tick = self._state(txn, b"tick", _COUNT, 0) + 1
        txn.put(b"tick", _COUNT.pack(tick), db=self.environment.db(b"state"))
        row.usage.frequency += times
        row.usage.tick = tick
        order = self.environment.db(b"order")
        txn.delete(_sortable(row.priority) + key, db=order)
        row.priority = self.policy.priority(key, row.usage, self._state(txn, b"clock", _DOUBLE, 0.0))
        txn.put(_sortable(row.priority) + key, b"", db=order)
        txn.put(key, row.pack(), db=self.environment.db(b"usage"))

    def _apply_touches(self, txn: Any) -> None:
        with self._touch_lock:
            touched, self._touched = self._touched, {}
        for key, times in touched.items():
            data = txn.get(key, db=self.environment.db(b"usage"))
            if data is not None:
                self._use(txn, key, Row.unpack(bytes(data)), times)

    def _add_bytes(self, txn: Any, count: int) -> None:
        total = self._state(txn, b"bytes", _COUNT, 0) + count
        txn.put(b"bytes", _COUNT.pack(total), db=self.environment.db(b"state"))

    def _state(self, txn: Any, name: bytes, kind: struct.Struct, default: Any) -> Any:
        data = txn.get(name, db=self.environment.db(b"state"))
        return default if data is None else kind.unpack(data)[0]


class Snapshot:
    """The folder as it was at one moment. Close it soon: pages that it sees are not used again until then."""

    def __init__(self, environment: Environment, txn: Any) -> None:
        self._environment = environment
        self._txn = txn
        # A transaction may change threads, and may not be used by two at once.
        self._lock = threading.Lock()

    def record(self, key: bytes) -> Record | None:
        """The header stored under a key.

        Raises:
            RecordError: it is damaged.
        """
        with self._lock:
            data = self._txn.get(key, db=self._environment.db(b"entries"))
            if data is None:
                return None
            data = bytes(data)
        return Record.unpack(key, data)

    def segment(self, key: bytes, record: Record, index: int, out: Tensor) -> int:
        """Copies a segment to its place in ``out`` (uint8 ``[payload_bytes]``) and verifies it there.

        Returns:
            Its bytes.

        Raises:
            RecordError: it is not what was stored.
        """
        start, stop = record.segment_span(index)
        with self._lock:
            data = self._txn.get(key + _SEGMENT.pack(index), db=self._environment.db(b"segments"))
            if data is None or len(data) != stop - start:
                raise RecordError(
                    f"segment {index} must have {stop - start} bytes, got {None if data is None else len(data)}"
                )
            out.numpy()[start:stop] = memoryview(data)
        record.check_segment(index, out[start:stop])
        return stop - start

    def close(self) -> None:
        """Ends the transaction."""
        with self._lock:
            self._txn.abort()


class Loading:
    """A record on its way from a snapshot to memory, segment by segment."""

    def __init__(self, snapshot: Snapshot, key: bytes, record: Record) -> None:
        self.key = key
        self.record = record
        self.payload = Payload(record.payload_bytes)
        self._snapshot = snapshot
        self._missing = set(range(len(record.checksums)))
        self._lock = threading.Lock()

    def layer(self, layer: int) -> tuple[tuple[Tensor, Tensor], int]:
        """K and V of a layer, and the bytes that were read for it."""
        count = 0
        if self._missing:
            with self._lock:
                for index in self.record.segments_of(layer):
                    if index in self._missing:
                        count += self._snapshot.segment(self.key, self.record, index, self.payload.data)
                        self._missing.discard(index)
        return self.record.layer(self.payload, layer), count

    @property
    def complete(self) -> bool:
        """Whether every segment was read and verified."""
        return not self._missing


def _spans(record: Record) -> list[tuple[int, int]]:
    return [record.segment_span(index) for index in range(len(record.checksums))]


def _pages(count: int) -> int:
    """Bytes of the pages that a value of ``count`` bytes takes, its page header included."""
    return -(-(count + 16) // PAGE_BYTES) * PAGE_BYTES


def _sortable(number: float) -> bytes:
    """8 bytes that sort as the numbers do."""
    (bits,) = struct.unpack(">Q", struct.pack(">d", number))
    return struct.pack(">Q", bits ^ (_SIGN if bits < _SIGN else 2 * _SIGN - 1))


def _number(data: bytes) -> float:
    """The number of :func:`_sortable`."""
    (bits,) = struct.unpack(">Q", data)
    (number,) = struct.unpack(">d", struct.pack(">Q", bits ^ (_SIGN if bits >= _SIGN else 2 * _SIGN - 1)))
    return float(number)
