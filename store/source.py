# ruff: noqa: D102 - methods without a docstring keep the contract of Source
"""A chunk as a tier holds it, opened for reading: what a batch takes its layers from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, NamedTuple

from torch import Tensor

from ragkv.chunk import Attended
from ragkv.store.payload import Payload
from ragkv.store.record import Record
from ragkv.store.target import Target


class Progress(NamedTuple):
    """How far chunks are on their way that were asked for together.

    Attributes:
        since_s: seconds since they were asked for.
        came: bytes that are here.
        left: bytes that are not.
        bytes_per_s: as fast as the last ones came when these were asked for; None where nobody knew.
    """

    since_s: float = 0.0
    came: int = 0
    left: int = 0
    bytes_per_s: float | None = None


# K's and V's tensors by the names that the codec gave them; in a pool "" is the pool of the layer, [N, H, P, D].
Parts = tuple[dict[str, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Asking:
    """How whoever reads asks for what comes over a network.

    Attributes:
        limit_s: so much longer than lately it may take until it is known what is there.
        late: is told the keys of which that was not known in time; they are no misses.
        levels: names of lossy levels of a pool, by key: where it has that, it is taken in place of what was stored.
    """

    limit_s: float = inf
    late: set[bytes] = field(default_factory=set)
    levels: Mapping[bytes, str] = field(default_factory=dict)


class Source(ABC):
    """The contract. Nothing that happens to the tier changes what it reads. Damage is a RecordError.

    Attributes:
        tier: its tier's name.
        record: its header; what that says of the chunk is here, too.
        tokens: T.
        layers: L.
        codec: how :meth:`parts` are encoded.
        unrotated: whether the keys among :meth:`parts` are as they were before rotary embedding.
        slots: ``[T]`` int64 on the CPU: where in a pool each token lies, block x P + place in it; None elsewhere.
        kept: whatever readers found out of :meth:`parts` and keep there for the next: it stays as long as these do.
        away: it comes over a network, once :meth:`begin` was called, whatever the caller does meanwhile.
        level: the lossy level at which it is held; empty for what was stored.
        key: under which its tier holds it, where that is not the chunk's own.
        put_s: when it was put where the store keeps it, by that tier's clock; None where nobody knows, as of what came from a pool.
    """

    slots: Tensor | None = None
    away: bool = False
    level: str = ""
    key: bytes = b""
    put_s: float | None = None

    def __init__(self, tier: str, record: Record) -> None:
        self.tier: str = tier
        self.record: Record = record
        self.label: str = record.label
        self.base: int = record.base
        self.tokens: int = record.tokens
        self.layers: int = len(record.shapes)
        self.sensitivity: Tensor | None = record.sensitivity
        self.foreign: str = record.foreign
        self.rows: Tensor | None = record.rows
        self.attended: Attended | None = record.attended
        self.codec: str = record.codec
        self.unrotated: bool = record.turned_back
        self.kept: dict[str, Any] = {}

    @property
    def direct(self) -> bool:
        """Whether :meth:`place` copies straight from a file, the fastest way to read it."""
        return False

    @property
    def whole(self) -> tuple[Record, Payload] | None:
        """The record, for tiers above; None where it was not read to its end, or is no record."""
        return None

    @abstractmethod
    def parts(self, layer: int) -> Parts:
        """K and V of a layer as they are held; :meth:`load` it before."""

    @abstractmethod
    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V ``[H, T, D]`` of a layer; :meth:`load` it before."""

    def load(self, layer: int | None = None) -> int:
        """Reads a layer, or all, into memory, where that is not yet so; the bytes."""
        return 0

    def place(self, layers: range, targets: Sequence[Target], start: int) -> int:
        """Copies layers into a prompt, each to its target, from token ``start`` on; the bytes that were read for it."""
        count = 0
        for layer, target in zip(layers, targets, strict=True):
            count += self.load(layer)
            target.fill(start, *self.layer(layer))
        return count

    def begin(self) -> None:  # noqa: B027
        """Asks for what is away, and for all that was found with it: one chunk after the other, the last one first."""

    def here(self, limit_s: float) -> bool:
        """Waits at most so long; whether nothing of it is away any more, or it cannot be had, which reading it says."""
        return True

    def progress(self) -> Progress:
        """How far it is on its way."""
        return Progress()

    def give_up(self) -> None:
        """It comes too slowly: what is not here yet is not asked for any more."""
        self.release()

    def release(self) -> None:  # noqa: B027
        """It is not read any more. Doing so twice is fine."""


class Recorded(Source):
    """A chunk as the bytes of its record."""

    @property
    @abstractmethod
    def payload(self) -> Payload:
        """Its bytes, as far as they were loaded."""

    def parts(self, layer: int) -> Parts:
        parts = self.record.parts(self.payload, layer)
        self.record.check(layer, *parts)
        return parts

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.record.layer(self.payload, layer)


class InMemory(Recorded):
    """A chunk in memory: what tiers in memory hold."""

    def __init__(self, record: Record, payload: Payload, tier: str = "cpu") -> None:
        super().__init__(tier, record)
        self._payload = payload

    @property
    def payload(self) -> Payload:
        """All its bytes."""
        return self._payload

    @property
    def whole(self) -> tuple[Record, Payload]:
        return self.record, self._payload
