"""Which entries a tier keeps: admission, victims, quotas, pins, lifetimes, ghosts and the policy's clock.

Logic alone: what is known of entries lies in its :class:`~ragkv.store.books.Books`, and their payloads in the tier.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence, Set
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from ragkv.errors import StoreFullError
from ragkv.store.books import NO_QUOTA, Books
from ragkv.store.policy import Policy, Usage
from ragkv.store.rows import Row, namespace_id
from ragkv.store.terms import Terms

GHOSTS_PER_ENTRY, LEAST_GHOSTS = 4, 1024
_SLOW = 20  # the mean of few entries must not jump


AnyBooks = TypeVar("AnyBooks", bound=Books)


@dataclass
class Planner(Generic[AnyBooks]):
    """Keeps a tier within its budget. Not safe for several threads by itself.

    Attributes:
        books: what is known of the entries.
        policy: which entries go first.
        budget_bytes: what the entries may take together.
        held: keys that must not be evicted now.
        now: a clock, in seconds.
        delete: deletes an entry's payload; whether there was one.
        evicted: entries dropped so far, by reason.
    """

    books: AnyBooks
    policy: Policy
    budget_bytes: int
    held: Container[bytes] = ()
    now: Callable[[], float] = lambda: 0.0
    delete: Callable[[bytes], bool] = lambda key: True
    evicted: Counter[str] = field(default_factory=Counter)

    def admit(
        self,
        key: bytes,
        size_bytes: int,
        terms: Terms,
        *,
        usage: Usage | None = None,
        passed: Set[bytes] = frozenset(),
        selective: bool = False,
    ) -> Row | None:
        """Makes room for an entry, writes it down and counts a use of it. It takes the place, and the pin, of what has its key.

        Args:
            key: of the entry.
            size_bytes: what it takes.
            terms: on which it is kept.
            usage: how it was used so far, where another tier knows that.
            passed: entries that must stay.
            selective: keep it only where it is pinned, or worth more than what it would evict.

        Returns:
            Its row; None where it was not worth that, and is remembered as a ghost.

        Raises:
            StoreFullError: it cannot fit beside what is pinned or in use; nothing was changed.
        """
        row, old = self._arriving(key, size_bytes, terms, usage)
        self._note_return(old)
        victims = self._room_for(key, row, old, passed)
        self.drop(key)
        worth = self._worth(key, row)
        if selective and not _worthy(row, worth, victims):
            self._refuse(key, row, worth)
            return None
        for victim, (gone, reason) in victims.items():
            self._age(gone.priority)
            self.drop(victim, reason)
        self.use(key, row)
        self._count(row.namespace, size_bytes)
        return row

    def wants(self, key: bytes, size_bytes: int, terms: Terms, *, usage: Usage | None = None) -> bool:
        """Whether :meth:`admit` would keep an entry that is not here, if selective; what it would not is refused, as there.

        Raises:
            StoreFullError: as there.
        """
        counters = self.books.counters
        row, old = self._arriving(key, size_bytes, terms, usage)
        returns = counters.returns
        self._note_return(old)
        victims, worth = self._room_for(key, row, old, frozenset()), self._worth(key, row)
        if _worthy(row, worth, victims):
            counters.returns = returns  # it is noted once it is admitted
            return True
        self.drop(key)
        self._refuse(key, row, worth)
        return False

    def _refuse(self, key: bytes, row: Row, worth: float) -> None:
        """Remembers an entry that is not kept, as a ghost."""
        self._age(worth)
        self._used(row, 1)
        self._haunt(key, row)

    def _arriving(self, key: bytes, size_bytes: int, terms: Terms, usage: Usage | None) -> tuple[Row, Row | None]:
        """The row of an entry that comes, its use not counted, and what is known under its key."""
        old, now = self.books.row(key), self.now()
        row = Row(replace(usage or (old.usage if old else Usage(0))), namespace=namespace_id(terms.namespace))
        row.usage.size_bytes = size_bytes
        row.created_s, row.expires_s = now, now + terms.lifetime_s
        if old is not None and old.alive(now):
            row.pinned_from_s, row.pinned_until_s = old.pinned_from_s, old.pinned_until_s
        if usage is None:
            row.usage.add_cost(terms.cost_s)
            if terms.uses:
                self._add_uses(row.usage, terms.uses)
        else:
            row.usage.tick = self.books.counters.tick  # each tier has its own
        return row, old

    def use(self, key: bytes, row: Row, times: int = 1) -> None:
        """Counts uses of an entry and moves it to its new place in the order."""
        books = self.books
        books.lift(key, row)
        self._used(row, times)
        row.priority = self._priority(key, row.usage)
        books.place(key, row)

    def touch(self, key: bytes, times: int = 1) -> None:
        """Counts uses of an entry, where there is one."""
        row = self.books.row(key)
        if row is not None and row.usage.size_bytes:
            self.use(key, row, times)

    def rank(self, keys: Iterable[bytes]) -> None:
        """Gives entries the priorities that they have by this policy: so far they stood in the order of another one."""
        self.books.counters.clock = 0.0
        for key in keys:
            row = self.books.row(key)
            if row is not None and row.usage.size_bytes:
                self.books.lift(key, row)
                since = (row.usage.tick - self.books.counters.tick) / self._half_life()
                row.priority = self.policy.priority(key, row.usage, since)
                self.books.place(key, row)

    def drop(self, key: bytes, reason: str | None = None) -> bool:
        """Deletes an entry; whether there was one, be it without a row.

        Args:
            key: which.
            reason: counted among the evictions; frequency and cost are then remembered, as a ghost.
        """
        row, there = self.books.row(key), self.delete(key)
        if row is not None:
            self.books.lift(key, row)
            if row.usage.size_bytes:
                self._count(row.namespace, -row.usage.size_bytes)
            else:
                self.books.counters.ghosts -= 1
            if reason is None:
                self.books.strike(key)
            else:
                self._haunt(key, row)
        if there and reason is not None:
            self.evicted[reason] += 1
        return there

    def pin(self, keys: Sequence[bytes], lifetime_s: float) -> int:
        """Keeps entries from being evicted for some seconds, 0 for no longer; of how many of the keys there are some."""
        rows = {key: self.books.row(key) for key in keys}
        found = {key: row for key, row in rows.items() if row is not None and row.alive(self.now())}
        for key, row in found.items():
            self._pin(key, row, lifetime_s)
        return sum(key in found for key in keys)

    def _pin(self, key: bytes, row: Row, lifetime_s: float) -> None:
        self.books.lift(key, row)
        row.pinned_from_s = self.now()
        row.pinned_until_s = row.pinned_from_s + lifetime_s if lifetime_s > 0 else 0.0
        self.books.place(key, row)

    def sweep(self) -> None:
        """Drops what has expired, and ends the pins whose time has come."""
        now = self.now()
        for key in self.books.due(now):
            row = self.books.row(key)
            if row is None or row.expires_s <= now:
                self.drop(key, "expired")
            elif row.pinned_until_s and not row.pinned(now):
                self._pin(key, row, 0.0)

    def set_quota(self, namespace: str, quota_bytes: int | None) -> None:
        """Bounds what a namespace's entries may take. Takes effect with its next entry."""
        name = namespace_id(namespace)
        quota = NO_QUOTA if quota_bytes is None else min(quota_bytes, NO_QUOTA)
        self.books.set_space(name, self.books.space(name)[0], quota)

    def _room_for(self, key: bytes, row: Row, old: Row | None, passed: Set[bytes]) -> dict[bytes, tuple[Row, str]]:
        """The entries to evict for a new one, with the reason."""
        size, freed = row.usage.size_bytes, old.usage.size_bytes if old else 0
        used, quota = self.books.space(row.namespace)
        if size > min(self.budget_bytes, quota):
            raise StoreFullError(f"an entry takes {size} bytes, the most is {min(self.budget_bytes, quota)}")
        used -= freed if old and old.namespace == row.namespace else 0
        passed = passed | {key}
        own = self._victims(used + size - quota, passed, row.namespace)
        freed += sum(victim.usage.size_bytes for victim in own.values())
        missing = self.books.counters.used_bytes - freed + size - self.budget_bytes
        others = self._victims(missing, passed | own.keys())
        reasons = {"quota": own, "budget": others}
        return {name: (victim, why) for why, found in reasons.items() for name, victim in found.items()}

    def _victims(self, missing: int, passed: Set[bytes], namespace: bytes | None = None) -> dict[bytes, Row]:
        """The entries of least priority that free so many bytes."""
        found: dict[bytes, Row] = {}
        if missing > 0:
            with closing(self.books.least(namespace)) as candidates:
                for key, row in candidates:
                    if key not in self.held and key not in passed:
                        found[key] = row
                        missing -= row.usage.size_bytes
                    if missing <= 0:
                        return found
            raise StoreFullError(f"what is pinned or in use leaves {missing} bytes too few")
        return found

    def _worth(self, key: bytes, row: Row) -> float:
        """The priority that an entry would be given."""
        usage = replace(row.usage)
        self._add_uses(usage, 1)
        return self._priority(key, usage)

    def _priority(self, key: bytes, usage: Usage) -> float:
        """The policy's, of what was just used."""
        counters = self.books.counters
        priority, window = self.policy.priority(key, usage, counters.clock), self.policy.window(counters.returns)
        return max(priority, self._least_priority() + window) if window else priority

    def _least_priority(self) -> float:
        with closing(self.books.least()) as candidates:
            return next((row.priority for _, row in candidates), -math.inf)

    def _age(self, priority: float) -> None:
        """Sets the clock forward: an entry of this priority was evicted, or not admitted."""
        if not self.policy.half_life:
            self.books.counters.clock = max(self.books.counters.clock, priority)

    def _note_return(self, old: Row | None) -> None:
        """Notes, of an entry that was evicted, whether it is asked for soon."""
        if old is not None and not old.usage.size_bytes:
            counters, entries = self.books.counters, self.books.entries
            soon = counters.tick - old.usage.tick < entries
            counters.returns += (soon - counters.returns) / (_SLOW + entries)

    def _half_life(self) -> float:
        """Uses after which a use counts half."""
        return self.policy.half_life * max(self.books.entries, 1) if self.policy.half_life else math.inf

    def _add_uses(self, usage: Usage, times: int) -> None:
        """Counts uses of now."""
        tick = self.books.counters.tick + times
        usage.heat = usage.heat * 2.0 ** (min(usage.tick - tick, 0) / self._half_life()) + times
        usage.frequency += times
        usage.tick = tick

    def _used(self, row: Row, times: int) -> None:
        counters = self.books.counters
        self._add_uses(row.usage, times)
        row.used_s = self.now()
        counters.tick = row.usage.tick
        if self.policy.half_life:
            counters.clock += times / self._half_life()

    def _haunt(self, key: bytes, row: Row) -> None:
        """Remembers how an entry was used that is not there; the oldest ghost goes when there are too many."""
        row.usage.size_bytes = 0
        row.expires_s, row.pinned_from_s, row.pinned_until_s = math.inf, 0.0, 0.0
        self.books.counters.ghosts += 1
        self.books.place(key, row)
        if self.books.counters.ghosts > max(LEAST_GHOSTS, GHOSTS_PER_ENTRY * self.books.entries):
            oldest = self.books.oldest_ghost()
            if oldest is not None:
                self.drop(oldest)

    def _count(self, namespace: bytes, size_bytes: int) -> None:
        self.books.counters.used_bytes += size_bytes
        if any(namespace):
            used, quota = self.books.space(namespace)
            self.books.set_space(namespace, max(used + size_bytes, 0), quota)


def _worthy(row: Row, worth: float, victims: Mapping[bytes, tuple[Row, str]]) -> bool:
    """Whether an entry is pinned, or worth no less than each of those that it would evict."""
    return bool(row.pinned_until_s) or not any(victim.priority > worth for victim, _ in victims.values())
