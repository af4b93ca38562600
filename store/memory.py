# ruff: noqa: D102 - methods without a docstring keep the contract of tier.Tier
"""The CPU tier: chunks' KV in memory, within a budget, the least valuable evicted first."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from itertools import product

from ragkv.store.books import MemoryBooks
from ragkv.store.keys import PATH, labelled, tags_of
from ragkv.store.levels import Levels
from ragkv.store.planner import Planner
from ragkv.store.policy import Policy
from ragkv.store.rows import Row
from ragkv.store.source import InMemory, Source
from ragkv.store.tier import Offer, Tier

NO_FACTS: Mapping[str, bytes] = {}


class MemoryTier(Tier):
    """Entries in memory; it may be where a store keeps its chunks, or above that.

    Args:
        budget_bytes: what the tensors' memory may take together.
        policy: which entries go first.
        held: keys that must not be evicted now.
        lock: guards the tier; shared by the tiers of a store that are in memory.
        levels: say in which codec chunks are kept here.
        selective: keep a new entry only where it is worth more than what it would evict.
        gone: told the key of every entry that leaves.

    Attributes:
        facts: small values by name, beside the entries.
    """

    name = "cpu"
    volatile = True

    def __init__(
        self,
        budget_bytes: int,
        policy: Policy,
        held: Container[bytes],
        lock: threading.RLock,
        levels: Levels,
        *,
        selective: bool = False,
        gone: Callable[[bytes], object] = lambda key: None,
    ) -> None:
        super().__init__(time.monotonic)
        self.facts: dict[str, bytes] = {}
        self.lock = lock
        self._levels, self._selective, self._gone = levels, selective, gone
        self._held: dict[bytes, Source] = {}
        self._books = MemoryBooks()
        self._planner = Planner(
            self._books, policy, budget_bytes, held, lambda: self.now(), self._delete, self.evictions
        )

    @property
    def budget_bytes(self) -> int:
        return self._planner.budget_bytes

    @budget_bytes.setter
    def budget_bytes(self, most: int) -> None:
        self._planner.budget_bytes = most

    def find(self, keys: Sequence[bytes]) -> dict[bytes, Source]:
        with self.lock:
            self._planner.sweep()
            return {key: self._held[key] for key in keys if key in self._held}

    def missing(self, keys: Sequence[bytes]) -> list[bytes]:
        with self.lock:
            self._planner.sweep()
            return [key for key in keys if key not in self._held]

    def row(self, key: bytes) -> Row | None:
        return self._books.row(key)

    def stored(self) -> list[bytes]:
        """All that is here."""
        with self.lock:
            return list(self._held)

    def wants(self, entry: Offer) -> bool:
        with self.lock:
            self._planner.sweep()
            size = self.expected(entry)
            # What is here takes another's place, whatever it is worth; and without a size nothing can be said.
            if not self._selective or size is None or entry.key in self._held:
                return True
            return self._planner.wants(entry.key, size, entry.terms, usage=entry.usage)

    def prepare(self, entry: Offer) -> Offer:
        if entry.ready:
            return entry
        record, payload = self._levels.for_memory(entry.record, entry.payload)
        return entry._replace(record=record, payload=payload)

    def admit(self, entries: Sequence[Offer], facts: Mapping[str, bytes] = NO_FACTS) -> list[bool]:
        with self.lock:
            kept = [self._admit(entry) for entry in entries]
            self.facts.update(facts)
            return kept

    def touch(self, keys: Iterable[bytes]) -> None:
        with self.lock:
            for key in keys:
                self._planner.touch(key)

    def remove(self, keys: Iterable[bytes], reason: str | None = None, facts: Iterable[str] = ()) -> list[bytes]:
        with self.lock:
            for name in facts:
                self.facts.pop(name, None)
            return [key for key in dict.fromkeys(keys) if key in self._held and self._planner.drop(key, reason)]

    def beginning(self, beginnings: Collection[bytes]) -> dict[bytes, list[bytes]]:
        """See :meth:`TieredStore.beginning`."""
        found: dict[bytes, list[bytes]] = {beginning: [] for beginning in beginnings}
        lengths = {len(beginning) for beginning in beginnings}
        with self.lock:
            for key, length in product(self._held, lengths):
                if key[:length] in found:
                    found[key[:length]].append(key)
        return found

    def computed_of(self, keys: Collection[bytes]) -> list[bytes]:
        """See :meth:`TieredStore.computed_of`."""
        tags = tags_of(keys)
        with self.lock:
            return [key for key, held in self._held.items() if key.startswith(PATH) and labelled(held.label, tags)]

    def counts(self) -> tuple[int, int]:
        return len(self._held), self._books.counters.used_bytes

    def fact(self, name: str) -> bytes | None:
        """A small value, or None."""
        return self.facts.get(name)

    def pin(self, keys: Sequence[bytes], lifetime_s: float) -> int:
        """Keeps entries from being evicted for some seconds, 0 for no longer; how many are here."""
        with self.lock:
            return self._planner.pin(keys, lifetime_s)

    def set_quota(self, namespace: str, quota_bytes: int | None) -> None:
        """Bounds what a namespace's entries may take. Takes effect with its next entry."""
        with self.lock:
            self._planner.set_quota(namespace, quota_bytes)

    def after_fork(self) -> None:
        self.evictions.clear()

    def _admit(self, entry: Offer) -> bool:
        self._planner.sweep()
        row = self._planner.admit(
            entry.key, self.size(entry), entry.terms, usage=entry.usage, selective=self._selective
        )
        if row is not None:
            try:
                held = self._held[entry.key] = self._hold(entry)
                held.put_s = row.created_s if entry.put_s is None else entry.put_s
            except BaseException:
                self._planner.drop(entry.key)
                raise
        return row is not None

    def expected(self, entry: Offer) -> int | None:
        """What :meth:`size` will be of an entry that is not prepared; None where that is not known."""
        return self.size(entry) if entry.ready else self._levels.bytes_in_memory(entry.record, entry.payload)

    def size(self, entry: Offer) -> int:
        """Bytes that an entry takes here."""
        return entry.payload.taken_bytes

    def _hold(self, entry: Offer) -> Source:
        """The entry as it is kept here."""
        return InMemory(entry.record, entry.payload, self.name)

    def _delete(self, key: bytes) -> bool:
        there = self._held.pop(key, None) is not None
        if there:
            self._gone(key)
        return there
