"""How chunks move between the tiers: found for a batch, offered to those above, dropped where they prove damaged."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import compress
from time import perf_counter

from ragkv.errors import RecordError, StoreError
from ragkv.store.batch import Batch
from ragkv.store.copies import Copies
from ragkv.store.disk import DiskTier
from ragkv.store.memory import MemoryTier
from ragkv.store.source import Asking, Source
from ragkv.store.stats import Moved, StoreStats, Tally
from ragkv.store.terms import Terms, check_facts
from ragkv.store.tier import Offer, Tier

logger: logging.Logger = logging.getLogger("ragkv.store")


_tiers: weakref.WeakSet[Tiers] = weakref.WeakSet()


class Tiers:
    """The tiers of one store, in order, and what its threads share. The owner of its batches.

    What is put is kept by the home tier, or the put fails. Tiers above hold copies of what they find worth it; tiers behind are
    offered whatever is put, and searched for what no other has: when they fail, that is a miss.

    Args:
        above: in memory, fastest first.
        home: where chunks are stored.
        behind: further tiers.
        leases: open batches by key; the store's own tiers evict nothing that stands in it.
        lock: guards the tiers in memory; held for moments only, never while a disk is written.

    Attributes:
        tally: what was done so far.

    Raises:
        StoreError: two tiers have one name.
    """

    def __init__(
        self,
        above: Sequence[MemoryTier],
        home: MemoryTier | DiskTier,
        behind: Sequence[Tier],
        leases: Counter[bytes],
        lock: threading.RLock,
    ) -> None:
        self.above: list[MemoryTier] = list(above)
        self.home: MemoryTier | DiskTier = home
        self.behind: list[Tier] = list(behind)
        self.tiers: list[Tier] = [*above, home, *behind]
        self.named: dict[str, Tier] = {tier.name: tier for tier in self.tiers}
        if len(self.named) < len(self.tiers):
            raise StoreError(f"tiers need names of their own, got {[tier.name for tier in self.tiers]}")
        for tier in self.tiers:
            tier.above_bytes = max((upper.budget_bytes for upper in self.over(tier)), default=0)
        with ExitStack() as stood:
            for tier in self.behind:
                tier.stand_behind(home)
                stood.callback(tier.close)
            stood.pop_all()
        self.leases = leases
        self.lock: threading.RLock = lock
        self._batches: weakref.WeakSet[Batch] = weakref.WeakSet()
        self.tally: Tally = Tally()
        self.copies: Copies = Copies(self.above, home, lock)
        _tiers.add(self)

    def read(self, keys: Sequence[bytes], moved: Mapping[bytes, Moved], asking: Asking | None) -> Batch:
        """Opens a batch: nothing of it is evicted until it says so with :meth:`release`.

        ``moved`` is what :meth:`~ragkv.store.prefetch.Prefetch.load` was told to fill for it.
        """
        started, leased = perf_counter(), Counter(keys)
        with self.lock:
            self.leases.update(leased)
        try:
            sources = self.find(keys, used=True, asking=asking)
        except BaseException:
            self.release(keys)
            raise
        batch = Batch(self, keys, sources)
        with self.lock:
            self._batches.add(batch)
            self.tally.count_reads(keys, sources, moved)
            self.tally.latency["find"].add(perf_counter() - started)
        return batch

    def release(self, keys: Sequence[bytes]) -> None:
        """Ends a lease."""
        with self.lock:
            self.leases.subtract(keys)
            for key in set(keys):
                if self.leases[key] <= 0:
                    del self.leases[key]

    def put_many(self, offers: Sequence[Offer], above: Sequence[Offer], facts: Mapping[str, bytes]) -> list[bool]:
        """Stores chunks and facts at home, or raises a StoreError; whether each is worth it.

        Other tiers keep copies as far as they can: those ``above`` of the same chunks in whatever codec.
        """
        check_facts(facts)
        started = perf_counter()
        kept = self.home.admit([self.home.prepare(offer) for offer in offers], facts)
        for better, here in zip(above, kept, strict=True):
            self.copies.forget([better.key])
            if here:
                self.copies.offer(better, self.home, self.above)
        stored = list(compress(offers, kept))
        for tier in self.behind if stored else ():
            with self._spared(tier):
                tier.admit([tier.prepare(offer) for offer in stored])
        with self.lock:
            self.tally.puts += len(stored)
            self.tally.refused += len(kept) - len(stored)
            if offers:
                self.tally.latency["write"].add(perf_counter() - started)
        return kept

    def missing(self, keys: Iterable[bytes]) -> list[bytes]:
        """Which chunks cannot be read from any tier, each once and in order."""
        keys = dict.fromkeys(keys)
        there = self.where(keys)
        return [key for key in keys if key not in there]

    def where(self, keys: Iterable[bytes], limit_s: float | None = None) -> dict[bytes, str]:
        """The tier that each chunk would be read from now; those that are in none are not named. Opens nothing.

        Without the limit, see :meth:`Tier.missing_away`, whatever has to be asked is.
        """
        self.copies.catch_up()
        wanted, places = list(dict.fromkeys(keys)), dict[bytes, str]()
        for tier in self.tiers:
            with self._spared(tier):
                if wanted:
                    missing = tier.missing(wanted) if limit_s is None else tier.missing_away(wanted, limit_s)
                    places |= dict.fromkeys(set(wanted) - set(missing), tier.name)
                    wanted = missing
        return places

    def find(self, keys: Collection[bytes], used: bool = False, asking: Asking | None = None) -> dict[bytes, Source]:
        """Opens chunks, each in the first tier that has it; ``used``: counts a use of each."""
        self.copies.catch_up()
        wanted, asking = list(dict.fromkeys(keys)), asking or Asking()
        sources: dict[bytes, Source] = {}
        try:
            for tier in self.tiers:
                if wanted:
                    with self._spared(tier):
                        sources |= tier.find_away(wanted, asking)
                    wanted = [key for key in wanted if key not in sources]
            for tier in self.tiers if used and sources else ():
                with self._spared(tier):
                    tier.touch(sources)
        except BaseException:
            for source in sources.values():
                source.release()
            raise
        return sources

    def finish(self, key: bytes, source: Source) -> None:
        """A batch is done with a chunk: the tiers above keep it if it is worth that, but for what is held at a lossy level."""
        if source.level:
            return
        origin = self.named[source.tier]
        above = [tier for tier in self.over(origin) if tier in self.behind or tier.missing([key])]
        if above and source.whole is not None:
            self.copies.offer(Offer(key, *source.whole, Terms(), put_s=source.put_s), origin, above)

    def remove_many(self, keys: Iterable[bytes], facts: Iterable[str]) -> int:
        """Forgets chunks in every tier, and facts; how many chunks were stored.

        What a tier behind raises is raised when all others have forgotten them.
        """
        keys = list(keys)
        removed: set[bytes] = set()
        failures: list[Exception] = []
        # From below to above: what is still below could come up again.
        for tier in reversed(self.behind):
            try:
                removed.update(tier.remove(keys))
            except Exception as error:
                failures.append(error)
        removed.update(self.home.remove(keys, facts=facts))
        removed.update(*(tier.remove(keys) for tier in self.above))
        if failures:
            raise failures[0]
        return len(removed)

    def drop_damaged(self, key: bytes, source: Source, error: RecordError) -> None:
        """Forgets a record that could not be read from a tier, so that its next read there is a miss."""
        tier = self.named[source.tier]
        logger.warning("%s in %s cannot be read, and is dropped there: %s", key.hex(), tier.name, str(error))
        self.copies.forget([key])
        with self._spared(tier):
            tier.damaged(source.key or key)

    def count_load(self, count: int, seconds: float) -> None:
        """Counts bytes read from disk, and the time that it took."""
        if count:
            with self.lock:
                self.tally.bytes_read += count
                self.tally.latency["load"].add(seconds)

    def after_fork(self) -> None:
        """In a child: the parent's batches and numbers are not its own."""
        for batch in self._batches:
            batch.disown()
        self.leases.clear()
        self.tally = Tally()
        for tier in self.tiers:
            tier.after_fork()

    def stats(self) -> StoreStats:
        """What the tiers hold, and what was done so far."""
        counts = {"gpu": (0, 0), "cpu": (0, 0)} | {tier.name: (0, 0) for tier in self.tiers}
        for tier in self.tiers:
            with self._spared(tier):
                counts[tier.name] = tier.counts()
        entries, sizes = ({name: pair[side] for name, pair in counts.items()} for side in (0, 1))
        file_bytes = self.home.environment.file_bytes() if isinstance(self.home, DiskTier) else 0
        pools = {tier.name: pool for tier in self.behind if (pool := tier.pool()) is not None}
        with self.lock:
            return self.counted().stats(entries=entries, bytes=sizes, file_bytes=file_bytes, pools=pools)

    def share(self) -> int:
        """Offers tiers behind all that is stored; how many chunks any of them may want."""
        keys = self.home.stored()
        return max((tier.share(keys) for tier in self.behind), default=0)

    def flush(self, limit_s: float) -> None:
        """Has home write down what is pending, and waits for what tiers behind do in the background, see :meth:`Tier.flush`."""
        self.home.flush(limit_s)
        until = perf_counter() + limit_s
        for tier in self.behind:
            tier.flush(max(0.0, until - perf_counter()))

    def close(self) -> None:
        """Closes the tiers."""
        for tier in reversed(self.tiers):  # those behind read from home
            with self._spared(tier):
                if isinstance(tier, DiskTier):
                    tier.close(self.counted())
                else:
                    tier.close()

    def counted(self) -> Tally:
        """What was done so far, by all tiers."""
        self.tally.evictions.update({tier.name: +Counter(tier.evictions) for tier in self.tiers})
        self.tally.bytes_written = sum(tier.written_bytes for tier in self.tiers)
        return self.tally

    def over(self, tier: Tier) -> list[Tier]:
        """The tiers that are offered what is read from this one."""
        return [upper for upper in self.tiers[: self.tiers.index(tier)] if upper.volatile]

    def below(self, keys: Sequence[bytes]) -> Sequence[bytes]:
        """Those of the chunks that are in no such tier."""
        for tier in self.tiers:
            keys = tier.missing(keys) if tier.volatile else keys
        return keys

    @contextmanager
    def _spared(self, tier: Tier) -> Iterator[None]:
        """Turns what a tier behind raises into a warning."""
        try:
            yield
        except Exception as error:
            if tier not in self.behind:
                raise
            logger.warning("the tier %s failed: %s", tier.name, repr(error))


_forking = threading.local()  # what a thread has taken to fork: several may fork at once


def _before_fork() -> None:
    """What is in memory is not forked in the middle of a change."""
    _forking.held = list(_tiers)
    for tiers in _forking.held:
        tiers.lock.acquire()


def _after_fork(in_child: bool) -> None:
    for tiers in _forking.held:
        if in_child:
            tiers.after_fork()
        tiers.lock.release()
    _forking.held.clear()


if hasattr(os, "register_at_fork"):
    # Before that of the folders, whose locks are taken under this one: the last to be registered goes first.
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=partial(_after_fork, False),
        after_in_child=partial(_after_fork, True),
    )
