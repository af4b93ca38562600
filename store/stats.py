"""What a store holds and did, as plain numbers."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ragkv.errors import RecordError
from ragkv.folder import unseal
from ragkv.store.source import Source

_GROWTH = math.log(1.1)
_LEAST_S = 1e-9
_MOST_SAMPLES = 400
_COUNTS = ("misses", "tokens_hit", "puts", "refused", "bytes_read", "bytes_written")


class Moved(NamedTuple):
    """Where a chunk was that was moved to memory, and the bytes that were read for that."""

    tier: str
    bytes_read: int


@dataclass
class Latency:
    """Times of one stage, counted in buckets that grow by a tenth: quantiles are right to 5 %, and sums can be added up.

    Attributes:
        count: how many there were.
        total_s: seconds of all together.
        buckets: how many by the power of 1.1 seconds that they are nearest to.
    """

    count: int = 0
    total_s: float = 0.0
    buckets: Counter[int] = field(default_factory=Counter)

    def add(self, seconds: float) -> None:
        """Counts one time."""
        self.count += 1
        self.total_s += seconds
        self.buckets[round(math.log(max(seconds, _LEAST_S)) / _GROWTH)] += 1

    def merge(self, other: Latency) -> None:
        """Counts all times of another."""
        self.count += other.count
        self.total_s += other.total_s
        self.buckets.update(other.buckets)

    def quantile(self, share: float) -> float:
        """Seconds that this share of the times did not exceed; 0 where there were none."""
        missing = share * self.count
        for bucket in sorted(self.buckets):
            missing -= self.buckets[bucket]
            if missing <= 0:
                return math.exp(bucket * _GROWTH)
        return 0.0

    @property
    def median_s(self) -> float:
        """Seconds that one in two did not exceed."""
        return self.quantile(0.5)

    @property
    def p95_s(self) -> float:
        """Seconds that 95 in 100 did not exceed."""
        return self.quantile(0.95)

    def below(self, seconds: float) -> int:
        """How many times did not exceed so many seconds."""
        bound = math.log(seconds) / _GROWTH
        return sum(count for bucket, count in self.buckets.items() if bucket <= bound)


@dataclass
class Checks:
    """Prompts that were compared with a full prefill.

    Attributes:
        count: how many there were.
        kl: the KL of their first tokens to the full prefill's, in nats, summed up.
        agreed: of how many the first token was the same.
    """

    count: int = 0
    kl: float = 0.0
    agreed: int = 0

    def merge(self, other: Checks) -> None:
        """Counts those of another, too."""
        self.count, self.kl, self.agreed = self.count + other.count, self.kl + other.kl, self.agreed + other.agreed

    @property
    def mean_kl(self) -> float:
        """Nats, of one; 0 where there were none."""
        return self.kl / self.count if self.count else 0.0


@dataclass(frozen=True)
class PoolStats:
    """What this process sent to a shared pool, and how that answered.

    Attributes:
        pool: where it is.
        pending: chunks that wait to be sent, or to be deleted there.
        sent: chunks sent.
        sent_bytes: their bytes, as they lie there.
        skipped: chunks that were there already.
        deleted: chunks deleted there.
        dropped: chunks that were no longer stored here when their turn came, or are too large.
        failed: tries that failed and are made again.
        unanswered: reads that got no answer: misses.
        foreign: objects of another version, or encrypted otherwise: misses.
        late: chunks that came so slowly that they were computed instead.
        down: whether the last try failed; the pool is left alone for a while.
    """

    pool: str
    pending: int = 0
    sent: int = 0
    sent_bytes: int = 0
    skipped: int = 0
    deleted: int = 0
    dropped: int = 0
    failed: int = 0
    unanswered: int = 0
    foreign: int = 0
    late: int = 0
    down: bool = False


@dataclass(frozen=True)
class StoreStats:
    """What a store holds now, and what it did since it was opened in this process.

    Attributes:
        entries: entries by tier.
        bytes: bytes by tier; on disk in whole pages.
        file_bytes: length of the data file, free pages included.
        hits: reads that found their chunk, by the tier that it came from.
        misses: reads that found nothing.
        tokens_hit: tokens of the chunks that were found.
        puts: chunks stored.
        refused: chunks that were not worth what they would have evicted.
        evictions: entries dropped, by tier and reason (``budget``, ``quota``, ``expired``, ``damaged``).
        bytes_read: bytes read from disk, or a pool.
        bytes_written: bytes of the records written to disk.
        latency: times by stage: ``encode`` and ``write`` of a put, ``find`` and ``load`` (from disk) of a batch.
        checks: prompts that were compared with a full prefill, by the method that put them together.
        pools: shared pools, by their tier's name.
    """

    entries: dict[str, int]
    bytes: dict[str, int]
    file_bytes: int
    hits: dict[str, int]
    misses: int
    tokens_hit: int
    puts: int
    refused: int
    evictions: dict[str, dict[str, int]]
    bytes_read: int
    bytes_written: int
    latency: dict[str, Latency]
    checks: dict[str, Checks]
    pools: dict[str, PoolStats] = field(default_factory=dict)


class Sample(NamedTuple):
    """What a folder held when a process closed it, and what all processes had done by then.

    Attributes:
        at_s: when, in seconds since 1970.
        hits: reads that found their chunk, by tier.
        misses: reads that found nothing.
        evictions: entries dropped, by tier.
        entries: entries on disk.
        bytes: what they take, in whole pages.
    """

    at_s: float
    hits: dict[str, int]
    misses: int
    evictions: dict[str, int]
    entries: int
    bytes: int


@dataclass
class Tally:
    """The numbers while they are counted; whoever counts holds the store's lock.

    ``samples`` are those of a folder's history, the oldest first, and the very first of before the first closing: what was done
    from closing to closing are the differences. Where they become too many, older ones are left out.
    """

    hits: Counter[str] = field(default_factory=lambda: Counter({"gpu": 0, "cpu": 0, "disk": 0}))
    misses: int = 0
    tokens_hit: int = 0
    puts: int = 0
    refused: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    evictions: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    latency: defaultdict[str, Latency] = field(default_factory=lambda: defaultdict(Latency))
    checks: defaultdict[str, Checks] = field(default_factory=lambda: defaultdict(Checks))
    samples: list[Sample] = field(default_factory=list)

    @property
    def any(self) -> bool:
        """Whether anything was done."""
        return bool(self.latency or self.checks)

    def count_reads(self, keys: Sequence[bytes], sources: Mapping[bytes, Source], moved: Mapping[bytes, Moved]) -> None:
        """Counts what a batch found; what was moved to memory for it, where it was before."""
        for key in keys:
            source = sources.get(key)
            if source is None:
                self.misses += 1
            else:
                self.hits[moved[key].tier if key in moved else source.tier] += 1
                self.tokens_hit += source.tokens

    def merge(self, other: Tally) -> None:
        """Adds the numbers of another."""
        self.hits.update(other.hits)
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for tier, reasons in other.evictions.items():
            self.evictions[tier].update(reasons)
        for stage, latency in other.latency.items():
            self.latency[stage].merge(latency)
        for method, checks in other.checks.items():
            self.checks[method].merge(checks)

    def add_closing(self, done: Tally, at_s: float, entries: int, size_bytes: int) -> None:
        """Adds to a folder's history what a process did that closes it now, and a sample."""
        if not self.samples:
            self.samples.append(self._sample(at_s, entries, size_bytes))
        self.merge(done)
        self.samples.append(self._sample(at_s, entries, size_bytes))
        if len(self.samples) > _MOST_SAMPLES:
            half = _MOST_SAMPLES // 2
            self.samples = self.samples[:half:2] + self.samples[half:]

    def _sample(self, at_s: float, entries: int, size_bytes: int) -> Sample:
        evictions = {tier: sum(reasons.values()) for tier, reasons in self.evictions.items() if reasons}
        return Sample(round(at_s), dict(self.hits), self.misses, evictions, entries, size_bytes)

    def stats(self, **held: Any) -> StoreStats:
        """The numbers so far, beside what the tiers hold."""
        return StoreStats(
            **held,
            hits=dict(self.hits),
            misses=self.misses,
            tokens_hit=self.tokens_hit,
            puts=self.puts,
            refused=self.refused,
            evictions={tier: dict(reasons) for tier, reasons in self.evictions.items()},
            bytes_read=self.bytes_read,
            bytes_written=self.bytes_written,
            latency={
                stage: Latency(item.count, item.total_s, item.buckets.copy()) for stage, item in self.latency.items()
            },
            checks={method: replace(item) for method, item in self.checks.items()},
        )

    def to_bytes(self) -> bytes:
        """The numbers as JSON."""
        return json.dumps(self, default=vars, separators=(",", ":")).encode()

    @classmethod
    def known(cls, sealed: bytes | None) -> Tally:
        """The history of a folder; empty where there is none, or it is damaged."""
        try:
            return cls() if sealed is None else cls.from_bytes(unseal(b"history", bytes(sealed)))
        except RecordError:
            return cls()

    @classmethod
    def from_bytes(cls, data: bytes) -> Tally:
        """Reads :meth:`to_bytes`.

        Raises:
            RecordError: these are none.
        """
        try:
            facts: dict[str, Any] = json.loads(data)
            tally = cls()
            for name in _COUNTS:
                setattr(tally, name, int(facts[name]))
            tally.hits.update(facts["hits"])
            for tier, reasons in facts["evictions"].items():
                tally.evictions[tier].update(reasons)
            for stage, item in facts["latency"].items():
                buckets = Counter({int(bucket): int(count) for bucket, count in item["buckets"].items()})
                tally.latency[stage] = Latency(int(item["count"]), float(item["total_s"]), buckets)
            for method, item in facts.get("checks", {}).items():  # earlier versions wrote none
                tally.checks[str(method)] = Checks(int(item["count"]), float(item["kl"]), int(item["agreed"]))
            tally.samples = [
                Sample(float(at_s), _counts(hits), int(misses), _counts(evictions), int(count), int(size))
                for at_s, hits, misses, evictions, count, size in facts.get("samples", [])
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RecordError(f"the numbers of a store cannot be read: {error}") from error
        return tally


def _counts(item: Any) -> dict[str, int]:
    return {str(tier): int(count) for tier, count in item.items()}
