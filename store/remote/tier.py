# ruff: noqa: D102 - methods without a docstring keep the contract of tier.Tier
"""The tier behind all others: a pool that many machines share."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import compress

from ragkv.errors import ArgumentError, OfOneProcess, StoreError, instance, whole_number
from ragkv.store.disk import DiskTier
from ragkv.store.notes import DELETE, SEND, FolderNotes, MemoryNotes, Notes, shared
from ragkv.store.rates import Loading
from ragkv.store.remote.arrivals import Arrivals
from ragkv.store.remote.envelope import Envelope
from ragkv.store.remote.heads import AVOIDED_S, MOST_ASKED, Heads
from ragkv.store.remote.levels import level_key, ordered
from ragkv.store.remote.manifest import Manifest
from ragkv.store.remote.opening import open_pool
from ragkv.store.remote.pool import Pool
from ragkv.store.remote.pruning import Pruned, Pruner
from ragkv.store.remote.publications import Publications
from ragkv.store.remote.reading import Fetch, Reading
from ragkv.store.remote.records import Records, key_of
from ragkv.store.remote.sending import Sender
from ragkv.store.remote.source import Sources
from ragkv.store.remote.speed import Speed
from ragkv.store.remote.uploads import Uploads
from ragkv.store.rows import Row
from ragkv.store.source import Asking, Source
from ragkv.store.stats import PoolStats
from ragkv.store.tier import Offer, Tier

logger: logging.Logger = logging.getLogger("ragkv.store")

_LONGEST_S = 86_400  # clients take no more than their own count of milliseconds


class RemoteTier(Tier, OfOneProcess, instead="make one where it is needed, RemoteTier(url)"):
    """Chunks in an object store, in Redis or in Mooncake's store, that many machines share. Safe for several threads and processes.

    What is put is sent in the background, from the store's folder or memory. What is read is verified like any record; what is
    damaged, of another version or encrypted otherwise is a miss. When the pool does not answer it is left alone for a second, then
    for twice as long each time, at most a minute; nothing fails meanwhile. What prompts computed (paths) is not sent.

    Args:
        pool: ``s3://BUCKET/PREFIX``, ``gs://``, ``az://``, ``file:///FOLDER``, ``memory://NAME``, ``redis://HOST``, ``rediss://``
            or ``mooncake://MASTER``; or a pool. Credentials are the client's own (``AWS_ACCESS_KEY_ID`` and the like): they are
            never written down.
        encryption_key: 32 bytes: what is sent is encrypted and authenticated (AES-GCM; ``ragkv[encryption]``), and nothing else is
            read. A mapping from namespaces to such keys (``""`` for what is of none) gives each its own: what is of a namespace
            that is not in it is neither sent nor read. Keys of chunks, sizes and times of access are not hidden.
        limit_s: seconds without any answer, at most a day, after which the pool counts as down, where something is read.
        requests: how many reads are on their way at once.
        uploads: how many chunks are sent at once, and held in memory for that.
        range_bytes: of one read, about.
        refresh_s: how often the pool is listed in the background, at the most; see docs/remote.md.
        name: what the statistics call it.
        readonly: write nothing to the pool and delete nothing there, whatever is put or removed. So it is, too, of a store that
            is open for reading only.
        levels: lossy ones at which chunks are sent besides, and taken where somebody is in a hurry (:class:`ragkv.Auto`): some of
            ``"int8"``, ``"fine"``, ``"medium"`` and ``"coarse"``, CacheGen's (arXiv:2310.07240); docs/remote.md has their figures.

    Attributes:
        readonly: see above.
        publications: which documents there are, where somebody has published that.

    Raises:
        StoreError: the URL or the key is none.
        ArgumentError, ArgumentTypeError: a setting is out of range, or of another type.
        MissingPackageError: the pool's client is not installed.
    """

    def __init__(
        self,
        pool: str | Pool,
        *,
        encryption_key: bytes | Mapping[str, bytes] | None = None,
        limit_s: float = 3.0,
        requests: int = 16,
        uploads: int = 4,
        range_bytes: int = 4 << 20,
        refresh_s: float = 60.0,
        name: str = "remote",
        readonly: bool = False,
        levels: Sequence[str] = (),
    ) -> None:
        super().__init__(time.time)
        instance("pool", pool, str | Pool, "a URL, as 's3://bucket/prefix', or a Pool")
        for what, count in {"requests": requests, "uploads": uploads, "range_bytes": range_bytes}.items():
            whole_number(what, count, 1)
        for what, seconds in {"limit_s": limit_s, "refresh_s": refresh_s}.items():
            instance(what, seconds, int | float, "a number of seconds")
            if not seconds > 0 or (what == "limit_s" and seconds > _LONGEST_S):
                raise ArgumentError(f"{what} must be more than 0, and limit_s at most {_LONGEST_S}, got {seconds}")
        instance("name", name, str, "a str")
        instance("readonly", readonly, bool, "True or False")
        self.name = name
        self.budget_bytes = 1 << 62
        envelope = Envelope(encryption_key)
        self._pool = open_pool(pool, limit_s, requests) if isinstance(pool, str) else pool
        self._records = Records(self._pool, envelope)
        self.readonly: bool = readonly
        self.publications: Publications = Publications(self._pool, envelope)
        self._levels = ordered(levels)
        self._speed = Speed(levels=self._levels)
        self._manifest = Manifest(self._pool, refresh_s, key_of)
        self._counts: Counter[str] = Counter()  # of what PoolStats has
        self._heads = Heads(self._records, self._speed, self._manifest, self._counts, self._drop)
        self._sources = Sources(name, self._heads, range_bytes, self._arrived)
        self._sending = uploads
        self._off = False
        self._notes: Notes = MemoryNotes()
        self._home: Tier | None = None
        self._uploads: Uploads | None = None
        self._arrivals: Arrivals | None = None

    def stand_behind(self, home: Tier) -> None:
        """See :class:`Tier`. What the folder says is still to be sent, is."""
        if self._home is not None:
            raise StoreError("a RemoteTier belongs to one store: make another one")
        self._home = home
        if isinstance(home, DiskTier):
            if home.readonly:
                self.readonly = True
                return
            self._notes = FolderNotes(home.environment)
            self._arrivals = Arrivals(home, self._still)
            home.notes = None if self.readonly else self._notes
        if self.readonly:
            return
        sender = Sender(home, self._records, self._manifest.note, self._counts, self._levels)
        self._uploads = Uploads(self._notes, sender.work, self._sending, self._counts)
        if len(self._notes):
            self._uploads.wake()

    def find(self, keys: Sequence[bytes]) -> dict[bytes, Source]:
        """See :class:`Tier`. Headers are read now, the rest when it is asked for."""
        return self.find_away(keys, Asking())

    def find_away(self, keys: Sequence[bytes], asking: Asking) -> dict[bytes, Source]:
        fetch = Fetch(self._heads, 0 if self._home is None else self._home.removed()[0])
        listed = self._listed
        likely = self._likely(keys, listed)
        levels = {level_key(key, asking.levels[key]): key for key in likely if key in asking.levels}
        at_levels = self._sources.open(fetch, self._likely(list(levels), listed), asking, levels)
        found = {levels[key]: source for key, source in at_levels.items()}
        left = [key for key in likely if key not in found and key not in asking.late]
        return found | self._sources.open(fetch, left, asking, {})

    def missing(self, keys: Sequence[bytes]) -> list[bytes]:
        """See :class:`Tier`. What a fresh listing names is taken to be there, as far as what is looked into can be read."""
        missing = set(self.missing_away(keys, math.inf))
        there = [key for key in keys if key not in missing]
        with self._heads.asking(there) as may:
            if may:
                missing |= self._heads.unreadable(there)
        return [key for key in keys if key in missing]

    def missing_away(self, keys: Sequence[bytes], limit_s: float) -> list[bytes]:
        listed, there = self._listed, set[bytes]()  # once: a listing may come at any moment
        for start in range(0, len(keys), MOST_ASKED):
            likely = self._likely(keys[start : start + MOST_ASKED], listed)
            there.update(likely if listed else self._heads.which(likely, limit_s))
        return [key for key in keys if key not in there]

    def row(self, key: bytes) -> Row | None:
        """See :class:`Tier`; known of what was read lately."""
        row, _ = self._heads.seen.get(key, (None, b""))
        return None if row is None or self._notes.deleting([key]) or not self._still(key) else row

    def admit(self, entries: Sequence[Offer]) -> list[bool]:
        """See :class:`Tier`. It is sent in the background."""
        if self._uploads is None:
            return [False] * len(entries)
        wanted = [shared(entry.key) for entry in entries]
        # A folder has noted it with the entry.
        new = () if isinstance(self._home, DiskTier) else compress(entries, wanted)
        self._uploads.note({entry.key: SEND for entry in new})
        return wanted

    def share(self, keys: Sequence[bytes]) -> int:
        """See :class:`Tier`. What the pool has already is not sent."""
        if self._uploads is None:
            return 0
        wanted = [key for key in keys if shared(key)]
        self._uploads.note(dict.fromkeys(wanted, SEND))
        return len(wanted)

    def lacking(self, keys: Sequence[bytes]) -> list[bytes]:
        """Those of the chunks that the pool does not have for us, each once: it is asked, whatever is known of it.

        Raises:
            PoolError: it does not answer.
        """
        keys = list(dict.fromkeys(keys))
        if self._pool.quick or len(keys) <= MOST_ASKED:
            there: Collection[bytes | None] = self._records.which(keys)
        else:
            there = {key_of(name) for name, _ in self._pool.names()}
        unread = self._heads.unreadable([key for key in keys if key in there])
        return [key for key in keys if key not in there or key in unread]

    def remove(self, keys: Iterable[bytes], reason: str | None = None) -> list[bytes]:
        """See :class:`Tier`. It is a miss at once, and deleted in the background, again and again until that succeeds.

        Those that were there are those that were read or listed lately.
        """
        if self._uploads is None:
            return []
        keys = [key for key in dict.fromkeys(keys) if shared(key)]
        known = {*self._manifest.holds(keys), *(self._heads.seen.keys() & keys)} - self._notes.deleting(keys)
        self._uploads.note(dict.fromkeys(keys, DELETE))
        self._manifest.note(keys, False)
        for key in keys:
            self._heads.seen.pop(key, None)
        return [key for key in keys if key in known]

    def damaged(self, key: bytes) -> None:
        """See :class:`Tier`. It is deleted, but for another object in its place; what was not given is only left alone."""
        if self._manifest.avoids(key):
            return
        seen = self._heads.seen.pop(key, None)
        if seen is not None:
            self._drop(key, seen[1], "a segment is not what was stored")
        else:  # read so long ago that nobody knows which object it was
            self._manifest.avoid(key, AVOIDED_S)

    def loading(self) -> Loading | None:
        return self._speed.loading

    def prune(
        self,
        grace_s: float = 7 * 86_400.0,
        *,
        older_than_s: float | None = None,
        dry_run: bool = False,
        progress: Callable[[int], object] = lambda done: None,
    ) -> Pruned:
        """Deletes the chunks in the pool that no published catalogue needs, for all that share it.

        Args:
            grace_s: what was sent less than so many seconds ago stays: whoever sent it may not have published it yet.
            older_than_s: in place of that: delete what was sent so many seconds ago, whoever needs it.
            dry_run: only count it.
            progress: called with how many more were looked at.

        Raises:
            PublicationError: nothing is published, so that nobody knows what is needed.
            RecordError, ForeignError: what is published cannot be read: as above.
            StoreError: the pool is for reading only, or does not answer. Nothing more is deleted.
        """
        age_s = grace_s if older_than_s is None else older_than_s
        instance("grace_s" if older_than_s is None else "older_than_s", age_s, int | float, "a number of seconds")
        if not age_s >= 0:
            raise ArgumentError(f"an age is at least 0 seconds, got {age_s}")
        if self.readonly and not dry_run:
            raise StoreError(f"nothing is deleted in {self._pool.name}: it is for reading only")
        publications = self.publications if older_than_s is None else None
        return Pruner(self._records, publications, age_s, self._sending, self._manifest.note).run(dry_run, progress)

    def counts(self) -> tuple[int, int]:
        """See :class:`Tier`; as of the last listing, and 0 of a pool that is not listed. Asks for nothing."""
        return self._manifest.counts()

    def pool(self) -> PoolStats:
        uploads = self._uploads
        pending = 0 if uploads is None else len(self._notes)
        down = self._heads.breaker.broken or (uploads is not None and uploads.failing)
        return PoolStats(self._pool.name, pending, down=down, **dict(self._counts))

    def flush(self, limit_s: float) -> None:
        if self._uploads is not None:
            self._uploads.flush(limit_s)

    def after_fork(self) -> None:
        """See :class:`Tier`. Object stores are the parent's alone: a child finds nothing there."""
        self.evictions.clear()
        self._counts.clear()
        self._off = not self._pool.forks
        for part in (self._pool, self._manifest, self._heads, self._sources, self._notes, self._arrivals):
            if part is not None:
                part.after_fork()
        if self._uploads is not None:
            self._uploads.after_fork(0 if self._off else self._sending)

    def close(self) -> None:
        """See :class:`Tier`. What is not sent yet stays noted in the folder; without a folder it never is."""
        for part in (self._arrivals, self._uploads):
            if part is not None:
                part.close()
        self._pool.close()

    @property
    def _listed(self) -> bool:
        """Whether the manifest says what is there."""
        return not self._pool.quick and self._manifest.fresh

    def _likely(self, keys: Sequence[bytes], listed: bool) -> list[bytes]:
        """Those of the keys that may be in the pool, and for which it may be asked."""
        wanted = [key for key in keys if shared(key) and not self._manifest.avoids(key)]
        if self._off or self._heads.breaker.left_s or not wanted:
            return []
        known = self._manifest.holds(wanted) if listed else set(wanted[:MOST_ASKED])
        known -= self._notes.deleting(known)
        return [key for key in wanted if key in known]

    def _drop(self, key: bytes, number: bytes, why: str) -> None:
        """An object is damaged: it is a miss from now on, and deleted, where it still is the one of this id."""
        self.evictions["damaged"] += 1
        self._manifest.avoid(key)
        logger.warning("the damaged object %s in the pool is dropped: %s", key.hex(), why)
        if self._uploads is not None:
            self._uploads.note({key: DELETE + number})

    def _still(self, key: bytes) -> bool:
        """Whether nobody removed a chunk that is being read since it was looked for."""
        removals = self._sources.removals(key)
        if removals is None or self._home is None:
            return True
        _, gone = self._home.removed(removals)
        return gone is not None and key not in gone

    def _arrived(self, reading: Reading) -> None:
        if self._arrivals is not None and not reading.level:
            self._arrivals.offer(reading)
