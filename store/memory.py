"""The CPU tier: chunks' KV in memory, within a budget, the least valuable evicted first."""

from __future__ import annotations

import heapq
from collections.abc import Container
from dataclasses import dataclass

from ragkv.chunk import ChunkKV
from ragkv.errors import StoreFullError
from ragkv.store.policy import Policy, Usage


@dataclass(slots=True, eq=False)
class Resident:
    """An entry in memory.

    Attributes:
        kv: its tensors; never written to once they are here.
        usage: how it was used.
        priority: its place in the order of eviction.
    """

    kv: ChunkKV
    usage: Usage
    priority: float = 0.0


class MemoryTier:
    """Entries in memory. Not safe for several threads by itself: the store holds its lock around every call.

    Args:
        budget_bytes: what the tensors may take together; 0 switches the tier off.
        policy: which entries go first.
        held: keys that must not be evicted now.
    """

    def __init__(self, budget_bytes: int, policy: Policy, held: Container[bytes] = ()) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self.evictions = 0
        self._policy = policy
        self._held = held
        self._entries: dict[bytes, Resident] = {}
        self._order: list[tuple[float, bytes]] = []
        self._clock = 0.0
        self._tick = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def keys(self) -> list[bytes]:
        """All keys."""
        return list(self._entries)

    def find(self, key: bytes) -> Resident | None:
        """The entry, without counting a use."""
        return self._entries.get(key)

    def use(self, key: bytes) -> Resident | None:
        """The entry, and counts a use of it."""
        entry = self._entries.get(key)
        if entry is not None:
            self._rank(key, entry)
        return entry

    def put(self, key: bytes, kv: ChunkKV, usage: Usage) -> list[bytes]:
        """Keeps an entry and counts a use of it.

        Returns:
            The keys that were evicted for it.

        Raises:
            StoreFullError: it cannot fit beside what is leased; nothing was changed.
        """
        size = kv.nbytes
        old = self._entries.get(key)
        victims = self._victims(size - (old.usage.size_bytes if old else 0), key)
        for victim in victims:
            self._clock = max(self._clock, self._entries[victim].priority)
            self.remove(victim)
        self.remove(key)
        usage.size_bytes = size
        entry = self._entries[key] = Resident(kv, usage)
        self.used_bytes += size
        self.evictions += len(victims)
        self._rank(key, entry)
        return victims

    def remove(self, key: bytes) -> bool:
        """Forgets an entry; whether there was one. Tensors that a batch holds stay valid."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.used_bytes -= entry.usage.size_bytes
        return entry is not None

    def _victims(self, growth: int, newcomer: bytes) -> list[bytes]:
        """The entries to evict before ``growth`` more bytes fit."""
        missing = self.used_bytes + growth - self.budget_bytes
        victims: list[bytes] = []
        passed: list[tuple[float, bytes]] = []
        while missing > 0 and self._order:
            priority, key = item = heapq.heappop(self._order)
            entry = self._entries.get(key)
            if entry is None or entry.priority != priority:
                continue
            passed.append(item)
            if key not in self._held and key != newcomer:
                victims.append(key)
                missing -= entry.usage.size_bytes
        for item in passed:
            heapq.heappush(self._order, item)
        if missing > 0:
            raise StoreFullError(
                f"an entry does not fit into cpu_bytes = {self.budget_bytes}: what is in use leaves {missing} bytes "
                "too few"
            )
        return victims

    def _rank(self, key: bytes, entry: Resident) -> None:
        self._tick += 1
        entry.usage.frequency += 1
        entry.usage.tick = self._tick
        entry.priority = self._policy.priority(key, entry.usage, self._clock)
        heapq.heappush(self._order, (entry.priority, key))
        # Places that an entry has left are passed over when they come up; here they are kept from piling up.
        if len(self._order) > 2 * len(self._entries) + 64:
            self._order = [(entry.priority, key) for key, entry in self._entries.items()]
            heapq.heapify(self._order)
