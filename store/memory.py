"""The CPU tier: chunks' KV in memory, within a budget, the least valuable evicted first."""

from __future__ import annotations

import heapq
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

from ragkv.errors import StoreFullError
from ragkv.store.policy import Policy, Usage
from ragkv.store.terms import Terms

_GHOSTS_PER_ENTRY, _LEAST_GHOSTS = 4, 1024


Held = TypeVar("Held", bound="Weighed")


class Weighed(Protocol):
    """What the tier may hold: anything that knows its bytes."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""


@dataclass(slots=True, eq=False)
class Resident(Generic[Held]):
    """An entry in memory. Times are seconds of a clock that never jumps.

    Attributes:
        kv: its tensors; never written to once they are here.
        usage: how it was used.
        namespace: whose it is.
        expires_s: until when it may be read.
        pinned_until_s: until when it must not be evicted.
        priority: its place in the order of eviction.
    """

    kv: Held
    usage: Usage
    namespace: str
    expires_s: float
    pinned_until_s: float = 0.0
    priority: float = 0.0


class MemoryTier(Generic[Held]):
    """Entries in memory. Not safe for several threads by itself: the store holds its lock around every call.

    Args:
        budget_bytes: what the tensors may take together; 0 switches the tier off.
        policy: which entries go first.
        held: keys that must not be evicted now.
        now: a clock that never jumps, in seconds.
        gone: told the key of every entry that leaves.

    Attributes:
        used_bytes: what the tensors take.
        evictions: entries dropped, by reason.
    """

    def __init__(
        self,
        budget_bytes: int,
        policy: Policy,
        held: Container[bytes] = (),
        *,
        now: Callable[[], float] = time.monotonic,
        gone: Callable[[bytes], object] = lambda key: None,
    ) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self.evictions: Counter[str] = Counter()
        self._policy = policy
        self._held = held
        self._now = now
        self._gone = gone
        self._entries: dict[bytes, Resident[Held]] = {}
        self._ghosts: OrderedDict[bytes, Usage] = OrderedDict()
        self._order: list[tuple[float, bytes]] = []
        self._spaces: Counter[str] = Counter()
        self._quotas: dict[str, int] = {}
        self._clock = 0.0
        self._tick = 0

    def __contains__(self, key: bytes) -> bool:
        return self._alive(key) is not None

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[bytes]:
        return iter(list(self._entries))

    def find(self, key: bytes) -> Resident[Held] | None:
        """The entry; that is no use of it."""
        return self._alive(key)

    def remaining_s(self, key: bytes) -> float:
        """The seconds for which an entry may still be read; 0 where there is none."""
        entry = self._alive(key)
        return 0.0 if entry is None else entry.expires_s - self._now()

    def use(self, key: bytes) -> Resident[Held] | None:
        """The entry, and counts a use of it."""
        entry = self._alive(key)
        if entry is not None:
            entry.usage.frequency += 1
            self._rank(key, entry)
        return entry

    def put(self, key: bytes, kv: Held, terms: Terms, usage: Usage | None = None, *, selective: bool = False) -> bool:
        """Keeps an entry and counts a use of it.

        Args:
            key: what it is found under.
            kv: its tensors, which are the tier's from now on.
            terms: on which it is kept.
            usage: how it was used so far, where another tier knows that.
            selective: keep it only where it is worth more than what it would evict.

        Returns:
            Whether it was kept.

        Raises:
            StoreFullError: it cannot fit beside what is pinned or in use; nothing was changed.
        """
        size = kv.nbytes
        if usage is None:
            usage = self._remembered(key)
            usage.add_cost(terms.cost_s)
        usage.size_bytes = size
        entry = Resident(kv, usage, terms.namespace, self._now() + terms.lifetime_s)
        usage.frequency += 1
        victims = self._victims_for(key, entry, size)
        if selective and any(self._entries[victim].priority > self._priority(key, entry) for victim in victims):
            self._clock = max(self._clock, self._priority(key, entry))
            self._remember(key, usage)
            return False
        for victim, reason in victims.items():
            self._clock = max(self._clock, self._entries[victim].priority)
            self.remove(victim, reason)
        self.remove(key)
        self._entries[key] = entry
        self._add_bytes(entry.namespace, size)
        self._rank(key, entry)
        return True

    def remove(self, key: bytes, reason: str | None = None) -> bool:
        """Forgets an entry; whether there was one. What a batch holds stays valid.

        Args:
            key: which.
            reason: counted among the evictions; the entry's frequency and cost are then remembered.
        """
        entry = self._entries.pop(key, None)
        if entry is None:
            return False
        self._add_bytes(entry.namespace, -entry.usage.size_bytes)
        self._gone(key)
        if reason is not None:
            self.evictions[reason] += 1
            self._remember(key, entry.usage)
        return True

    def replace(self, key: bytes, kv: Held) -> None:
        """Swaps the tensors of an entry for others of as many bytes."""
        self._entries[key].kv = kv

    def pin(self, key: bytes, lifetime_s: float) -> bool:
        """Keeps an entry from being evicted for some seconds, 0 for no longer; whether it is here."""
        entry = self._alive(key)
        if entry is not None:
            entry.pinned_until_s = self._now() + lifetime_s if lifetime_s > 0 else 0.0
        return entry is not None

    def set_quota(self, namespace: str, quota_bytes: int | None) -> None:
        """Bounds what a namespace's entries may take. Takes effect with its next put."""
        self._quotas.pop(namespace, None)
        if quota_bytes is not None:
            self._quotas[namespace] = quota_bytes

    def _alive(self, key: bytes) -> Resident[Held] | None:
        entry = self._entries.get(key)
        if entry is not None and entry.expires_s <= self._now():
            self.remove(key, "expired")
            return None
        return entry

    def _victims_for(self, key: bytes, entry: Resident[Held], size: int) -> dict[bytes, str]:
        """The entries to evict for a new one, with the reason."""
        quota = self._quotas.get(entry.namespace, math.inf)
        if size > min(self.budget_bytes, quota):
            raise StoreFullError(f"an entry takes {size} bytes, the most is {min(self.budget_bytes, quota)}")
        old = self._entries.get(key)
        freed = {key: ""} if old else {}
        in_space = self._spaces[entry.namespace] - (
            old.usage.size_bytes if old and old.namespace == entry.namespace else 0
        )
        missing = in_space + size - quota
        own = dict.fromkeys(self._victims(missing, freed, entry.namespace), "quota") if missing > 0 else {}
        freed |= own
        missing = self.used_bytes - sum(self._entries[gone].usage.size_bytes for gone in freed)
        missing += size - self.budget_bytes
        return own | dict.fromkeys(self._victims(missing, freed), "budget")

    def _victims(self, missing: float, passed: Container[bytes], namespace: str | None = None) -> list[bytes]:
        """The entries of least priority that free so many bytes."""
        found: list[bytes] = []
        popped: list[tuple[float, bytes]] = []
        for item in self._pop() if missing > 0 else ():
            popped.append(item)
            key, entry = item[1], self._entries[item[1]]
            wanted = namespace is None or entry.namespace == namespace
            if wanted and key not in passed and key not in self._held and entry.pinned_until_s <= self._now():
                found.append(key)
                missing -= entry.usage.size_bytes
            if missing <= 0:
                break
        for item in popped:
            heapq.heappush(self._order, item)
        if missing > 0:
            raise StoreFullError(f"what is pinned or in use leaves {int(missing)} bytes too few in memory")
        return found

    def _pop(self) -> Iterator[tuple[float, bytes]]:
        """Entries from the least priority on; places that an entry has left are passed over."""
        while self._order:
            item = heapq.heappop(self._order)
            entry = self._entries.get(item[1])
            if entry is not None and entry.priority == item[0]:
                yield item

    def _rank(self, key: bytes, entry: Resident[Held]) -> None:
        """Gives an entry that has just been used its new place."""
        self._tick += 1
        entry.usage.tick = self._tick
        entry.priority = self._policy.priority(key, entry.usage, self._clock)
        heapq.heappush(self._order, (entry.priority, key))
        if len(self._order) > 2 * len(self._entries) + 64:
            self._order = [(entry.priority, key) for key, entry in self._entries.items()]
            heapq.heapify(self._order)

    def _priority(self, key: bytes, entry: Resident[Held]) -> float:
        """The priority that an entry would be given."""
        entry.usage.tick = self._tick + 1
        return self._policy.priority(key, entry.usage, self._clock)

    def _remembered(self, key: bytes) -> Usage:
        """How an entry was used that is put again, or was evicted not long ago."""
        old = self._entries.get(key)
        if old is not None:
            return replace(old.usage)
        return self._ghosts.pop(key, None) or Usage(0)

    def _remember(self, key: bytes, usage: Usage) -> None:
        self._ghosts[key] = usage
        while len(self._ghosts) > max(_LEAST_GHOSTS, _GHOSTS_PER_ENTRY * len(self._entries)):
            self._ghosts.popitem(last=False)

    def _add_bytes(self, namespace: str, count: int) -> None:
        self.used_bytes += count
        self._spaces[namespace] += count
