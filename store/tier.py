# ruff: noqa: D102 - InMemory keeps the contract of Source
"""What a tier is: a place where chunks' KV are kept. A store is an ordered list of them, fastest first."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from ragkv.chunk import ChunkKV
from ragkv.store.layout import Payload
from ragkv.store.policy import Usage
from ragkv.store.record import Record
from ragkv.store.rows import Row
from ragkv.store.target import Target
from ragkv.store.terms import Terms

# K's and V's tensors by the names that the codec gave them; in a pool "" is the pool of the layer, [N, H, P, D].
Parts = tuple[dict[str, Tensor], dict[str, Tensor]]


class Offer(NamedTuple):
    """A chunk that a tier may keep.

    Attributes:
        key: what it is found under.
        record: its header.
        payload: its bytes.
        terms: on which it is kept.
        usage: how it was used so far, where another tier knows that.
        kv: its numbers, where the tier wants them.
        ready: it is encoded as CPU memory keeps it.
    """

    key: bytes
    record: Record
    payload: Payload
    terms: Terms
    usage: Usage | None = None
    kv: ChunkKV | None = None
    ready: bool = False


class Source(Protocol):
    """A chunk as a tier holds it, opened for reading. Nothing that happens to the tier changes what it reads."""

    @property
    def tier(self) -> str:
        """Its tier's name."""

    @property
    def base(self) -> int:
        """Position at which the chunk's first token stood."""

    @property
    def tokens(self) -> int:
        """T, the chunk's tokens."""

    @property
    def layers(self) -> int:
        """L."""

    @property
    def sensitivity(self) -> Tensor | None:
        """``[T]``, see :class:`~ragkv.chunk.ChunkKV`."""

    @property
    def foreign(self) -> str:
        """See :class:`~ragkv.chunk.ChunkKV`."""

    @property
    def codec(self) -> str:
        """How :meth:`parts` are encoded."""

    @property
    def unrotated(self) -> bool:
        """Whether the keys among :meth:`parts` are as they were before rotary embedding."""

    @property
    def blocks(self) -> Tensor | None:
        """Where it lies in a pool, block by block; None elsewhere."""

    @property
    def whole(self) -> tuple[Record, Payload] | None:
        """The record, for tiers above; None where it was not read to its end, or is no record."""

    def parts(self, layer: int) -> tuple[Parts, int]:
        """K and V of a layer as they are held, and the bytes read from disk for it. Raises RecordError for damage."""

    def layer(self, layer: int) -> tuple[tuple[Tensor, Tensor], int]:
        """K and V ``[H, T, D]`` of a layer, and the bytes read from disk for it. Raises RecordError for damage."""

    def place(self, layers: range, targets: Sequence[Target], start: int) -> int:
        """Copies layers into a prompt, each to its target, from token ``start`` on; the bytes read from disk for it."""

    def load(self, layer: int | None = None) -> int:
        """Reads a layer, or all, into memory, where that is not yet so; the bytes read. Raises RecordError for damage."""

    def release(self) -> None:
        """It is not read any more. Doing so twice is fine."""


class InMemory:
    """A chunk in memory, as a record: what tiers in memory hold, and what a batch reads the chunk from."""

    blocks = None

    def __init__(self, record: Record, payload: Payload, tier: str = "cpu") -> None:
        self.tier = tier
        self.base, self.tokens, self.layers = record.base, record.tokens, len(record.shapes)
        self.sensitivity, self.foreign = record.sensitivity, record.foreign
        self.codec, self.unrotated = record.codec, record.turned_back
        self.whole = record, payload

    def parts(self, layer: int) -> tuple[Parts, int]:
        record, payload = self.whole
        return record.parts(payload, layer), 0

    def layer(self, layer: int) -> tuple[tuple[Tensor, Tensor], int]:
        record, payload = self.whole
        return record.layer(payload, layer), 0

    def place(self, layers: range, targets: Sequence[Target], start: int) -> int:
        record, payload = self.whole
        for layer, target in zip(layers, targets, strict=True):
            target.fill(start, *record.layer(payload, layer))
        return 0

    def load(self, layer: int | None = None) -> int:
        return 0

    def release(self) -> None:
        return


class Tier(ABC):
    """The contract. Every method is safe for several threads, and none waits for another's disk.

    Attributes:
        name: one a store; what :attr:`Batch.tiers` and the statistics call it.
        volatile: whether admitting costs no more than a copy: it is offered what is read from below it.
        budget_bytes: what its entries may take together; it evicts by itself to stay within, never what a batch holds.
        above_bytes: the largest budget of the volatile tiers above: what is larger is not kept there. The store says so.
        evictions: entries dropped by this process, by reason.
        written_bytes: payloads written to a disk so far.
        now: the clock of its rows, in seconds.
    """

    name: str
    volatile: bool = False
    budget_bytes: int
    above_bytes: int = 0

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self.evictions: Counter[str] = Counter()
        self.written_bytes = 0
        self.now = now

    @abstractmethod
    def find(self, keys: Sequence[bytes]) -> dict[bytes, Source]:
        """Opens those of the chunks that are here, in one state of the tier; each must be released. No use is counted."""

    @abstractmethod
    def missing(self, keys: Sequence[bytes]) -> list[bytes]:
        """Those of the chunks that are not here, in order and in one state of the tier. Changes nothing."""

    @abstractmethod
    def row(self, key: bytes) -> Row | None:
        """What is known of a chunk; None, or a row that is not alive, where it is not here. Changes nothing; quick."""

    @abstractmethod
    def admit(self, entries: Sequence[Offer]) -> list[bool]:
        """Keeps chunks, in place of what has their keys; whether each is kept.

        Evicts what is worth least, as far as that is needed.

        Raises:
            StoreFullError: they cannot fit beside what is pinned or in use.
            StoreError: they cannot be written.
        """

    @abstractmethod
    def remove(self, keys: Iterable[bytes], reason: str | None = None) -> list[bytes]:
        """Forgets chunks; those that were here. What was opened before stays readable.

        Args:
            keys: which; unknown ones are fine.
            reason: counted among the evictions; how they were used is then remembered.

        Raises:
            StoreError: nothing can be written; nothing was changed.
        """

    @abstractmethod
    def counts(self) -> tuple[int, int]:
        """How many entries there are, and their bytes."""

    def prepare(self, entry: Offer) -> Offer:
        """The entry as :meth:`admit` wants it: what takes long, such as encoding, is done here. Changes nothing."""
        return entry

    def touch(self, keys: Iterable[bytes]) -> None:  # noqa: B027
        """Counts a use of those of the chunks that are here."""

    def damaged(self, key: bytes) -> None:
        """A record proved damaged: from now on it is missing."""
        self.remove([key], "damaged")

    def removed(self, since: int) -> tuple[int, list[bytes] | None]:
        """How many removals there were ever, by whatever process, and which keys after the first ``since``: None for unknown."""
        return since, []

    def after_fork(self) -> None:  # noqa: B027
        """In a child: what threads of the parent held is free."""

    def close(self) -> None:  # noqa: B027
        """Gives back what it holds."""
