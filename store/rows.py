"""What the books of a folder are written in: a row an entry, and the counters."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from ragkv.errors import RecordError
from ragkv.folder import seal, unseal
from ragkv.store.policy import Usage
from ragkv.store.terms import Terms

NOBODY = bytes(8)
_ROW = struct.Struct("<QddQQQdddddd8s")
_STATE = struct.Struct("<QdQQQdd")
_SIGN = 1 << 63
_ROW_NAME = "a row of the books"


@dataclass(slots=True)
class Row:
    """What the books say of an entry. Times are seconds of the wall clock.

    Attributes:
        usage: what the policy looks at. ``size_bytes`` is 0 for a ghost.
        priority: its place in the order.
        created_s: when it was put.
        used_s: when it was last used.
        expires_s: until when it may be read; infinite by default.
        pinned_from_s: when it was pinned.
        pinned_until_s: until when it is pinned; 0 where it is not.
        namespace: id of its namespace.
    """

    usage: Usage
    priority: float = 0.0
    created_s: float = 0.0
    used_s: float = 0.0
    expires_s: float = math.inf
    pinned_from_s: float = 0.0
    pinned_until_s: float = 0.0
    namespace: bytes = NOBODY

    def alive(self, now: float) -> bool:
        """Whether it may be read. A lifetime is an interval: a clock set back does not make it longer."""
        return self.usage.size_bytes > 0 and (self.expires_s == math.inf or self.created_s <= now < self.expires_s)

    def pinned(self, now: float) -> bool:
        """Whether it must not be evicted. A clock set back ends a pin that has a lifetime."""
        return self.pinned_until_s == math.inf or self.pinned_from_s <= now < self.pinned_until_s

    def terms(self, now: float) -> Terms:
        """On what terms another folder may keep the entry."""
        left_s = max(self.expires_s - now, 1e-9)
        return Terms(self.namespace, left_s, self.usage.cost_s, max(self.usage.frequency - 1, 0))

    def pack(self, key: bytes) -> bytes:
        """The row as bytes, bound to its key."""
        use = self.usage
        data = _ROW.pack(
            *(use.size_bytes, use.cost_s, use.heat, use.computed, use.frequency, use.tick),
            *(self.priority, self.created_s, self.used_s, self.expires_s, self.pinned_from_s, self.pinned_until_s),
            self.namespace,
        )
        return seal(key, data)

    @classmethod
    def unpack(cls, key: bytes, data: bytes) -> Row:
        """The row of :meth:`pack`.

        Raises:
            RecordError: it is damaged.
        """
        fields = _unpacked(_ROW, unseal(key, data, _ROW_NAME))
        return cls(Usage(*fields[:6]), *fields[6:])


@dataclass
class Counters:
    """What the books sum up.

    Attributes:
        used_bytes: what all entries take.
        clock: the policy's clock.
        tick: how many uses there were.
        ghosts: rows of entries that are no longer there.
        removals: how many entries were removed on purpose, or replaced.
        written_s: the wall clock when the books were last written.
        returns: see :meth:`~ragkv.store.policy.Policy.window`.
    """

    used_bytes: int = 0
    clock: float = 0.0
    tick: int = 0
    ghosts: int = 0
    removals: int = 0
    written_s: float = 0.0
    returns: float = 0.0

    @classmethod
    def unpack(cls, data: bytes | None) -> Counters:
        """The counters of :meth:`pack`; of an empty folder where there are none.

        Raises:
            RecordError: they are damaged.
        """
        if data is None:
            return cls()
        state = unseal(b"counters", data, _ROW_NAME)
        return cls(*_unpacked(_STATE, state.ljust(_STATE.size, b"\0")))  # older folders have no returns

    def pack(self) -> bytes:
        """The counters as bytes."""
        # A damaged folder may give back more than was counted.
        used, ghosts = max(self.used_bytes, 0), max(self.ghosts, 0)
        state = _STATE.pack(used, self.clock, self.tick, ghosts, self.removals, self.written_s, self.returns)
        return seal(b"counters", state)


def namespace_id(name: str | bytes) -> bytes:
    """8 bytes for a namespace, zeros for the empty one; an id stays as it is."""
    if isinstance(name, bytes):
        return name
    return blake2b(name.encode(), digest_size=8).digest() if name else NOBODY


def sortable(value: float) -> bytes:
    """8 bytes that sort as the numbers do."""
    (bits,) = struct.unpack(">Q", struct.pack(">d", value))
    return struct.pack(">Q", bits ^ (_SIGN if bits < _SIGN else 2 * _SIGN - 1))


def number(data: bytes) -> float:
    """The number of :func:`sortable`."""
    (bits,) = struct.unpack(">Q", data)
    (value,) = struct.unpack(">d", struct.pack(">Q", bits ^ (_SIGN if bits >= _SIGN else 2 * _SIGN - 1)))
    return float(value)


def _unpacked(fields: struct.Struct, data: bytes) -> tuple[Any, ...]:
    try:
        return fields.unpack(data)
    except struct.error as error:
        raise RecordError(f"{_ROW_NAME} is damaged: {error}") from error
