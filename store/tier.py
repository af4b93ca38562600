"""What a tier is: a place where chunks' KV are kept. A store is an ordered list of them, fastest first."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from ragkv.chunk import ChunkKV
from ragkv.store.payload import Payload
from ragkv.store.policy import Usage
from ragkv.store.rates import Loading
from ragkv.store.record import Record
from ragkv.store.rows import Row
from ragkv.store.source import Asking, Source
from ragkv.store.stats import PoolStats
from ragkv.store.terms import Terms


class Offer(NamedTuple):
    """A chunk that a tier may keep.

    Attributes:
        key: what it is found under.
        record: its header.
        payload: its bytes.
        terms: on which it is kept.
        usage: how it was used so far, where another tier knows that.
        kv: its numbers, where whoever puts it has them and decoding would give the same.
        brought: these on the tier's device, see :meth:`~ragkv.store.pool.BlockPool.bring`.
        ready: it is encoded as CPU memory keeps it.
        put_s: see :class:`~ragkv.store.source.Source`.
    """

    key: bytes
    record: Record
    payload: Payload
    terms: Terms
    usage: Usage | None = None
    kv: ChunkKV | None = None
    brought: Sequence[Tensor] = ()
    ready: bool = False
    put_s: float | None = None


class Tier(ABC):
    """The contract. Every method is safe for several threads.

    Attributes:
        name: one a store; what :attr:`Batch.tiers` and the statistics call it.
        volatile: whether admitting costs no more than a copy: it is offered what is read from below it.
        readonly: whether nothing can be written.
        budget_bytes: what its entries may take together; it evicts by itself to stay within, never what a batch holds.
        above_bytes: the largest budget of the volatile tiers above: what is larger is not kept there. The store says so.
        evictions: entries dropped by this process, by reason.
        written_bytes: payloads written to a disk so far.
        now: the clock of its rows, in seconds.
    """

    name: str
    volatile: bool = False
    readonly: bool = False
    budget_bytes: int
    above_bytes: int = 0

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self.evictions: Counter[str] = Counter()
        self.written_bytes: int = 0
        self.now = now

    @abstractmethod
    def find(self, keys: Sequence[bytes]) -> dict[bytes, Source]:
        """Opens those of the chunks that are here, in one state of the tier; each must be released. No use is counted."""

    def find_away(self, keys: Sequence[bytes], asking: Asking) -> dict[bytes, Source]:
        """As :meth:`find`, by whoever does not wait for ever: for tiers that a network lies in front of."""
        return self.find(keys)

    @abstractmethod
    def missing(self, keys: Sequence[bytes]) -> list[bytes]:
        """Those of the chunks that are not here, in order and in one state of the tier. Changes nothing."""

    def missing_away(self, keys: Sequence[bytes], limit_s: float) -> list[bytes]:
        """As :meth:`missing`, by whoever waits so much longer than lately; what is not known then counts as here."""
        return self.missing(keys)

    @abstractmethod
    def row(self, key: bytes) -> Row | None:
        """What is known of a chunk; None, or a row that is not alive, where it is not here. Changes nothing; quick."""

    def known(self, key: bytes) -> Row | None:
        """The row of a chunk that can be read now."""
        row = self.row(key)
        return row if row is not None and row.alive(self.now()) else None

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

    def loading(self) -> Loading | None:
        """How fast chunks came from here lately; None where nobody knows, or it is measured beforehand."""
        return None

    def wants(self, entry: Offer) -> bool:
        """Asked before :meth:`prepare` where an entry need not be kept. What is not wanted counts as if it had been offered.

        Raises:
            StoreFullError: as :meth:`admit`.
        """
        return True

    def prepare(self, entry: Offer) -> Offer:
        """The entry as :meth:`admit` wants it: what takes long, such as encoding, is done here. Changes nothing."""
        return entry

    def touch(self, keys: Iterable[bytes]) -> None:  # noqa: B027
        """Counts a use of those of the chunks that are here."""

    def damaged(self, key: bytes) -> None:
        """A record proved damaged: from now on it is missing."""
        self.remove([key], "damaged")

    def stand_behind(self, home: Tier) -> None:  # noqa: B027
        """Told once, by the store, where that keeps what is put, before anything else; for tiers behind that read it from there."""

    def pool(self) -> PoolStats | None:
        """What went to a shared pool and came from it, where it is one."""
        return None

    def share(self, keys: Sequence[bytes]) -> int:
        """Is offered again, in the background, what is stored; how many of the chunks it may want."""
        return 0

    def flush(self, limit_s: float) -> None:  # noqa: B027
        """Waits until what was admitted, or removed, in the background is done.

        Raises:
            UploadError: that took longer than so many seconds.
        """

    def removed(self, since: int | None = None) -> tuple[int, list[bytes] | None]:
        """How many removals there were ever, by whatever process, and which keys after the first ``since``: None for unknown."""
        return 0, []

    def after_fork(self) -> None:  # noqa: B027
        """In a child: what threads of the parent held is free."""

    def close(self) -> None:  # noqa: B027
        """Gives back what it holds."""
