"""What the books of a folder are written in: a row an entry, and the counters."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from ragkv.store.environment import Environment
from ragkv.store.policy import Usage

NOBODY = bytes(8)
_ROW = struct.Struct("<QddQQQdddddd8s")
_STATE = struct.Struct("<QdQQQ")
_SIGN = 1 << 63


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

    def pack(self) -> bytes:
        """The row as bytes."""
        use = self.usage
        return _ROW.pack(
            *(use.size_bytes, use.cost_s, use.last_cost_s, use.computed, use.frequency, use.tick),
            *(self.priority, self.created_s, self.used_s, self.expires_s, self.pinned_from_s, self.pinned_until_s),
            self.namespace,
        )

    @classmethod
    def unpack(cls, data: bytes) -> Row:
        """The row of :meth:`pack`."""
        fields = _ROW.unpack(data)
        return cls(Usage(*fields[:6]), *fields[6:])


@dataclass
class Counters:
    """What the books sum up: what all entries take, the policy's clock and tick, ghosts, and the removals so far."""

    used_bytes: int = 0
    clock: float = 0.0
    tick: int = 0
    ghosts: int = 0
    removals: int = 0

    @classmethod
    def read(cls, environment: Environment, txn: Any) -> Counters:
        """The counters of a folder."""
        data = txn.get(b"counters", db=environment.db(b"state"))
        return cls() if data is None else cls(*_STATE.unpack(data))

    def pack(self) -> bytes:
        """The counters as bytes."""
        return _STATE.pack(self.used_bytes, self.clock, self.tick, self.ghosts, self.removals)


def namespace_id(name: str) -> bytes:
    """8 bytes for a namespace, zeros for the empty one."""
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
