"""What nobody needs goes from a pool: KV that no published catalogue names, after a while."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

from ragkv.errors import RecordError
from ragkv.store.remote.envelope import ForeignError
from ragkv.store.remote.levels import with_levels
from ragkv.store.remote.pool import GoneError
from ragkv.store.remote.publications import Publications
from ragkv.store.remote.records import Records, key_of

_AT_ONCE = 256


@dataclass(frozen=True)
class Pruned:
    """What went from a pool, or would go.

    Attributes:
        objects: how many; each lossy level of a chunk is one.
        size_bytes: theirs.
        needed: those that stay because a published catalogue names them; 0 where none was asked.
        young: those that stay because they are not old enough.
        unreadable: those that stay because nobody can tell how old they are: damaged, encrypted with another key, or
            refused (in an archive).
    """

    objects: int = 0
    size_bytes: int = 0
    needed: int = 0
    young: int = 0
    unreadable: int = 0


@dataclass
class Pruner:
    """Looks for what is to go, and deletes it.

    An object's age is counted from when it was sent. What is sent anew meanwhile is another object of the same name, and stays; so
    does what a catalogue names that is published meanwhile: both are looked for once more right before chunks are deleted.

    Attributes:
        records: the pool's chunks.
        publications: what says which of them are needed; ``None``: age alone counts.
        age_s: seconds that a chunk stays at least.
        threads: how many are deleted at once.
        told: called with keys that were deleted, and False.
    """

    records: Records
    publications: Publications | None
    age_s: float
    threads: int
    told: Callable[[Collection[bytes], bool], object]
    _ids: set[tuple[str, bytes]] = field(default_factory=set)
    _needed: set[bytes] = field(default_factory=set)

    def run(self, dry_run: bool, progress: Callable[[int], object]) -> Pruned:
        """Deletes what is to go, or only counts it.

        Raises:
            PublicationError: nothing is published.
            RecordError, ForeignError: a published catalogue cannot be read, so that nobody knows what is needed.
            PoolError: the pool does not answer. Nothing more is deleted.
        """
        self._look()
        sizes = {key_of(name): size for name, size in self.records.pool.names()}
        keys = [key for key in sizes if key is not None]
        there = [key for key in keys if key not in self._needed]
        gone, young, unreadable = list[bytes](), 0, 0
        with ThreadPoolExecutor(self.threads, "ragkv-pool-prune") as threads:
            for start in range(0, len(there), _AT_ONCE):
                batch = there[start : start + _AT_ONCE]
                old, fresh, unread = self._old(batch)
                young, unreadable = young + fresh, unreadable + unread
                if not dry_run and old:
                    if self.publications is not None and self.publications.ids() != self._ids:
                        self._look()
                    deleted = list(threads.map(self._delete, old.keys(), old.values()))
                    old = {key: old[key] for key, done in zip(old, deleted, strict=True) if done}
                gone += old
                progress(len(batch))
        return Pruned(len(gone), sum(sizes[key] for key in gone), len(keys) - len(there), young, unreadable)

    def _look(self) -> None:
        """Finds out what is needed. What is published meanwhile shows in the ids, which are taken before."""
        if self.publications is not None:
            self._ids = self.publications.ids()
            self._needed = with_levels(self.publications.keys())

    def _old(self, keys: Sequence[bytes]) -> tuple[dict[bytes, bytes], int, int]:
        """Those that are old enough, with their objects' ids; how many are not, and how many cannot be read."""
        old, young, now, heads = dict[bytes, bytes](), 0, time.time(), dict[bytes, memoryview]()
        with suppress(GoneError):  # all are refused
            heads = self.records.heads(keys)
        unreadable = len(keys) - len(heads)
        for key, head in heads.items():
            try:
                opened = self.records.open(key, head)
            except (RecordError, ForeignError):
                unreadable += 1
                continue
            if now - opened.row.created_s < self.age_s:
                young += 1
            else:
                old[key] = opened.id
        return old, young, unreadable

    def _delete(self, key: bytes, number: bytes) -> bool:
        if key in self._needed or not self.records.delete(key, number):
            return False
        self.told([key], False)
        return True
