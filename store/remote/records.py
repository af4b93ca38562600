"""Chunks as the objects of a pool, by their keys."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from ragkv.store.payload import Payload
from ragkv.store.record import Record
from ragkv.store.remote.envelope import ID, Envelope, Opened
from ragkv.store.remote.pool import Pool
from ragkv.store.rows import Row

_SMALL_BYTES = 64 << 10  # of an object that is read whole at once, as soon as there was one
_HEAD_BYTES, _PAGE_BYTES = 16 << 10, 4 << 10  # of headers, before one was seen


class Records:
    """Reads and writes them. Whatever the pool does not do is a :class:`~ragkv.store.remote.pool.PoolError`.

    Args:
        pool: where they are.
        envelope: seals and opens them.
    """

    def __init__(self, pool: Pool, envelope: Envelope) -> None:
        self.pool: Pool = pool
        self._envelope = envelope
        self._head_bytes = _HEAD_BYTES  # by what was opened last

    def heads(self, keys: Sequence[bytes]) -> dict[bytes, memoryview]:
        """The first bytes of those that are there, for :meth:`open`: their headers, or all of small ones."""
        names = {name_of(key): key for key in keys}
        heads = self.pool.heads(list(names), self._head_bytes)
        return {names[name]: memoryview(head) for name, head in heads.items()}

    def begin_heads(self, keys: Sequence[bytes]) -> dict[bytes, Future[Any]]:
        """As :meth:`heads`, for whoever does not wait: None for one that is not there."""
        return {key: self.pool.begin(name_of(key), 0, self._head_bytes) for key in keys}

    def which(self, keys: Sequence[bytes]) -> set[bytes]:
        """Those that are there."""
        names = {name_of(key): key for key in keys}
        return {names[name] for name in self.pool.which(list(names))}

    def open(self, key: bytes, head: memoryview) -> tuple[Opened, memoryview]:
        """The object that begins so, and its first bytes up to its segments at least.

        Raises:
            RecordError, ForeignError: see :meth:`Envelope.open`.
        """
        needed = self._envelope.needed(head)
        if needed > len(head):
            rest: Any = self.pool.read(name_of(key), len(head), needed) or b""
            head = memoryview(b"".join((head, rest)))
        opened = self._envelope.open(key, head)
        small = needed + opened.record.payload_bytes <= _SMALL_BYTES
        self._head_bytes = _SMALL_BYTES if small else (needed // _PAGE_BYTES + 1) * _PAGE_BYTES
        return opened, head

    def seals(self, row: Row) -> bool:
        """Whether a chunk of this namespace may be written: see :meth:`Envelope.seals`."""
        return self._envelope.seals(row.namespace)

    def write(self, key: bytes, record: Record, payload: Payload, row: Row, lifetime_s: float) -> int:
        """Stores one; its bytes, 0 where they are too many for the pool."""
        data = self._envelope.seal(key, record, payload, row)
        if len(data) > self.pool.most_bytes:
            return 0
        self.pool.write(name_of(key), data, lifetime_s)
        return len(data)

    def delete(self, key: bytes, number: bytes = b"") -> bool:
        """Deletes one, with a number only the object of this id; whether that was so."""
        if number:
            head = self.pool.read(name_of(key), 0, ID.stop)
            if head is None or bytes(head)[ID] != number:
                return False
        self.pool.delete(name_of(key))
        return True


def name_of(key: bytes) -> str:
    """What a chunk's object is called."""
    digits = key.hex()
    return f"{digits[:2]}/{digits}"


def key_of(name: str) -> bytes | None:
    """The key of an object's chunk; None for what is no chunk's."""
    try:
        key = bytes.fromhex(name.rpartition("/")[2])
    except ValueError:
        return None
    return key if key and name_of(key) == name else None
