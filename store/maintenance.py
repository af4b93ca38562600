"""Care for a folder: list, verify, prune, compact, repair. What the command line calls.

What takes a path opens the folder itself; other processes may use it, except for :func:`repair` and :func:`compact`.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ragkv.errors import RecordError, StoreError
from ragkv.folder import refuse_open, replace_damaged, salvage
from ragkv.store.disk import DiskTier
from ragkv.store.folder_books import DATABASES
from ragkv.store.payload import Payload
from ragkv.store.policy import PGDSF
from ragkv.store.record import Record
from ragkv.store.rows import Row
from ragkv.store.snapshot import Loading
from ragkv.store.stats import Tally
from ragkv.store.tier import Offer

logger: logging.Logger = logging.getLogger("ragkv.store")

_DATA, _LOCK = "data.mdb", "lock.mdb"
_NO_BUDGET = 1 << 62
_REMOVED_AT_ONCE = 500


@dataclass(frozen=True)
class Entry:
    """One stored chunk, as a list shows it.

    Attributes:
        key: what it is stored under.
        label: what whoever put it knows it by; empty where nothing was said.
        space, codec: what it depends on, and how it is encoded; None where its header is damaged.
        tokens: T; 0 where its header is damaged.
        size_bytes: what it takes.
        frequency, hits: how often it was put or read; how often it was read.
        cost_s: mean seconds that computing it took.
        created_s, used_s: when it was put, and when its last use was written down, in seconds of the wall clock.
        expires_s: until when it may be read; infinite for ever.
        pinned: whether it must not be evicted now.
    """

    key: bytes
    label: str
    space: str | None
    codec: str | None
    tokens: int
    size_bytes: int
    frequency: int
    hits: int
    cost_s: float
    created_s: float
    used_s: float
    expires_s: float
    pinned: bool


@dataclass(frozen=True)
class Verdict:
    """What :func:`verify` found.

    Attributes:
        checked: records read to their end.
        bytes_read: bytes of their payloads.
        damaged: key and reason of each that failed.
        dropped: how many of these were removed.
    """

    checked: int
    bytes_read: int
    damaged: list[tuple[bytes, str]]
    dropped: int


def entries(path: str | os.PathLike[str]) -> Iterator[Entry]:
    """What a folder holds, in the order of the keys."""
    with opened(path) as tier:
        for key in tier.stored():
            entry = _entry(tier, key)
            if entry is not None:
                yield entry


def computed_of(path: str | os.PathLike[str], keys: Collection[bytes]) -> list[bytes]:
    """As :meth:`TieredStore.computed_of`."""
    with opened(path) as tier:
        return tier.computed_of(keys)


def verify(
    path: str | os.PathLike[str], *, drop: bool = False, progress: Callable[[int, int], None] | None = None
) -> Verdict:
    """Reads every record to its end and compares every checksum.

    Args:
        path: the folder.
        drop: remove what is damaged, so that it is computed anew.
        progress: called with the records done and their number.

    Raises:
        RecordError: the folder itself is damaged: see :func:`repair`.
    """
    damaged: list[tuple[bytes, str]] = []
    read = dropped = checked = 0
    with opened(path) as tier:
        keys = tier.stored()
        for done, key in enumerate(keys, 1):
            try:
                loaded = load(tier, key, expired=True)
                checked += loaded is not None
                read += loaded[0].payload_bytes if loaded else 0
            except RecordError as error:
                checked += 1
                damaged.append((key, str(error)))
                dropped += len(tier.remove([key], "damaged")) if drop else 0
            if progress is not None:
                progress(done, len(keys))
    return Verdict(checked, read, damaged, dropped)


def structure(path: str | os.PathLike[str]) -> list[str]:
    """What is wrong with LMDB's own pages, a line each; where there is something, :func:`repair` makes a new file."""
    try:
        with opened(path) as tier:
            return tier.environment.problems()
    except RecordError as error:
        return [str(error)]


def prune(path: str | os.PathLike[str], wanted: Callable[[Entry], bool], *, dry_run: bool = False) -> list[Entry]:
    """Removes the entries that are wanted gone, such as those of another model's space; which they are."""
    chosen = [entry for entry in entries(path) if wanted(entry)]
    if not dry_run:
        remove(path, [entry.key for entry in chosen])
    return chosen


def remove(path: str | os.PathLike[str], keys: Sequence[bytes]) -> int:
    """Removes entries, many in one transaction; how many there were."""
    with opened(path) as tier:
        parts = range(0, len(keys), _REMOVED_AT_ONCE)
        return sum(len(tier.remove(keys[start : start + _REMOVED_AT_ONCE])) for start in parts)


def history(path: str | os.PathLike[str]) -> Tally:
    """What the processes that used a folder and closed it did, all together."""
    with opened(path) as tier:
        return tier.history()


def compact(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Rewrites a folder's file without its free pages; its length before and after.

    No store may have the folder open. Until the new file is complete the old one stays in place.

    Raises:
        StoreError: it is open in this process.
    """
    folder = Path(path)
    refuse_open(folder)
    before = (folder / _DATA).stat().st_size
    with _scratch(folder / "compacting") as target:
        with opened(folder) as tier:
            tier.environment.copy(target)
        after = (target / _DATA).stat().st_size
        with open(target / _DATA, "rb") as file:
            os.fsync(file.fileno())
        (folder / _LOCK).unlink(missing_ok=True)
        os.replace(target / _DATA, folder / _DATA)
    return before, after


def repair(path: str | os.PathLike[str]) -> int:
    """Makes a folder usable that does not open or fails in its structure: what can be read is kept.

    The damaged file stays beside the new one, see :func:`~ragkv.folder.replace_damaged`. No store may have the folder
    open.

    Returns:
        How many records were saved.
    """
    folder = Path(path)
    refuse_open(folder)
    saved = 0
    with _scratch(folder / "rescue") as rescue, _scratch(folder / "repaired") as repaired:
        with opened(repaired, _NO_BUDGET - 1) as tier, suppress(RecordError):
            salvage(folder / _DATA, rescue, DATABASES)
            with opened(rescue) as old:
                for key in old.stored():
                    saved += _save(old, tier, key)
        replace_damaged(folder, repaired / _DATA)
    return saved


@contextmanager
def opened(path: str | os.PathLike[str], disk_bytes: int = _NO_BUDGET) -> Iterator[DiskTier]:
    """A folder's disk tier, for as long as a function needs it; without a budget it evicts nothing.

    Raises:
        StoreError: there is no folder, and no budget to make one with.
    """
    if disk_bytes == _NO_BUDGET and not (Path(path) / _DATA).exists():
        raise StoreError(f"{path} is not a folder of a store")
    with closing(DiskTier(Path(path), disk_bytes, PGDSF())) as tier:
        yield tier


def load(tier: DiskTier, key: bytes, *, expired: bool = False) -> tuple[Record, Payload, Row] | None:
    """A record, read to its end and verified; None where another process has removed it.

    Raises:
        RecordError: it is damaged, the books do not know it, or it has expired and that was not asked for.
    """
    with closing(tier.snapshot()) as snapshot:
        found = snapshot.find(key, None if expired else tier.now())
        if found is None and not snapshot.holds(key):
            return None
        if found is None:
            raise RecordError("the books do not know it, or it has expired")
        loading = Loading(snapshot, key, *found)
        loading.load()
    return loading.record, loading.payload, loading.row


def _save(old: DiskTier, new: DiskTier, key: bytes) -> bool:
    """Copies a record with its lifetime, if it can be read."""
    try:
        loaded = load(old, key)
    except RecordError as error:
        logger.warning("%s is lost: %s", key.hex(), str(error))
        return False
    if loaded is None:
        return False
    record, payload, row = loaded
    return new.admit([Offer(key, record, payload, row.terms(old.now()))])[0]


def _entry(tier: DiskTier, key: bytes) -> Entry | None:
    row = tier.row(key)
    if row is None:
        return None
    record = None
    with closing(tier.snapshot()) as snapshot:
        try:
            found = snapshot.find(key, None)
            record = found[0] if found else None
        except RecordError as error:
            logger.warning("the header of %s is damaged: %s", key.hex(), str(error))
    return Entry(
        key=key,
        label=record.label if record else "",
        space=record.space if record else None,
        codec=record.codec if record else None,
        tokens=record.tokens if record else 0,
        size_bytes=row.usage.size_bytes,
        frequency=row.usage.frequency,
        hits=max(row.usage.frequency - row.usage.computed, 0),
        cost_s=row.usage.cost_s,
        created_s=row.created_s,
        used_s=row.used_s,
        expires_s=row.expires_s,
        pinned=row.pinned(tier.now()),
    )


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder for as long as it is needed, empty whatever a killed process left in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
