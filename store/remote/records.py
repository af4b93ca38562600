"""Chunks as the objects of a pool, by their keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from ragkv.errors import RecordError
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
        begun = self.pool.heads(list(names), self._head_bytes)
        heads = {names[name]: memoryview(head) for name, head in begun.items()}
        rests = self.begin_rests(heads)
        return heads | self.joined(heads, dict(zip(rests, self.pool.answers(list(rests.values())), strict=True)))

    def begin_heads(self, keys: Sequence[bytes]) -> dict[bytes, Future[Any]]:
        """As :meth:`heads`, for whoever does not wait: None for one that is not there. Some may be shorter than their headers."""
        return {key: self.pool.begin(name_of(key), 0, self._head_bytes) for key in keys}

    def begin_rests(self, heads: Mapping[bytes, memoryview]) -> dict[bytes, Future[Any]]:
        """What is left of headers that did not come whole."""
        rests = dict[bytes, Future[Any]]()
        for key, head in heads.items():
            with suppress(RecordError):  # which opening it says
                needed = self._envelope.needed(head)
                if needed > len(head):
                    rests[key] = self.pool.begin(name_of(key), len(head), needed)
        return rests

    @staticmethod
    def joined(heads: Mapping[bytes, memoryview], rests: Mapping[bytes, Any]) -> dict[bytes, memoryview]:
        """Headers whose rest has come."""
        return {key: memoryview(b"".join((heads[key], rest or b""))) for key, rest in rests.items()}

    def which(self, keys: Sequence[bytes]) -> set[bytes]:
        """Those that are there."""
        names = {name_of(key): key for key in keys}
        return {names[name] for name in self.pool.which(list(names))}

    def open(self, key: bytes, head: memoryview) -> Opened:
        """The object that begins so, up to its segments at least.

        Raises:
            RecordError, ForeignError: see :meth:`Envelope.open`.
        """
        opened, needed = self._envelope.open(key, head), self._envelope.needed(head)
        small = needed + opened.record.payload_bytes <= _SMALL_BYTES
        self._head_bytes = _SMALL_BYTES if small else (needed // _PAGE_BYTES + 1) * _PAGE_BYTES
        return opened

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

    def delete(self, key: bytes, number: bytes) -> bool:
        """Deletes the object of this id; whether it was that."""
        head = self.pool.read(name_of(key), 0, ID.stop)
        if head is None or bytes(head)[ID] != number:
            return False
        self.pool.delete(name_of(key))
        return True

    def delete_all(self, keys: Sequence[bytes]) -> None:
        """Deletes those that are there."""
        self.pool.delete(*map(name_of, keys))


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
