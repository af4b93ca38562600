"""What a store holds and did, as plain numbers."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ragkv.store.batch import Source


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
        bytes_read: bytes read from disk.
        bytes_written: bytes of the records written to disk.
        seconds: time spent, by stage (``encode``, ``write``, ``find``).
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
    seconds: dict[str, float]


@dataclass
class Tally:
    """The numbers while they are counted; whoever counts holds the store's lock."""

    hits: Counter[str] = field(default_factory=lambda: Counter({"gpu": 0, "cpu": 0, "disk": 0}))
    misses: int = 0
    tokens_hit: int = 0
    puts: int = 0
    refused: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def count_reads(self, keys: Sequence[bytes], sources: Mapping[bytes, Source]) -> None:
        """Counts what a batch found."""
        for key in keys:
            source = sources.get(key)
            if source is None:
                self.misses += 1
            else:
                self.hits[source.tier] += 1
                self.tokens_hit += source.tokens

    def stats(
        self, entries: dict[str, int], sizes: dict[str, int], evictions: dict[str, dict[str, int]], file_bytes: int
    ) -> StoreStats:
        """The numbers so far, beside what the tiers hold."""
        return StoreStats(
            entries=entries,
            bytes=sizes,
            file_bytes=file_bytes,
            hits=dict(self.hits),
            misses=self.misses,
            tokens_hit=self.tokens_hit,
            puts=self.puts,
            refused=self.refused,
            evictions=evictions,
            bytes_read=self.bytes_read,
            bytes_written=self.bytes_written,
            seconds=dict(self.seconds),
        )
