"""How a note is worked off: a chunk goes from where it is stored to a pool, or is deleted there."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from ragkv.errors import RecordError, StoreError
from ragkv.store.encode import recoded
from ragkv.store.notes import DELETE, SEND
from ragkv.store.payload import Payload
from ragkv.store.record import Record
from ragkv.store.remote.envelope import ForeignError
from ragkv.store.remote.levels import LEVELS, level_key, with_levels
from ragkv.store.remote.pool import GoneError
from ragkv.store.remote.records import Records
from ragkv.store.remote.uploads import Done
from ragkv.store.tier import Tier

logger: logging.Logger = logging.getLogger("ragkv.store")


@dataclass
class Sender:
    """Works off one note at a time; several threads may.

    Attributes:
        home: where chunks are stored.
        records: the pool's.
        told: of keys, whether the pool has them now.
        counts: of the bytes of all objects that were sent: ``sent_bytes``.
        levels: lossy ones at which chunks are sent besides.
    """

    home: Tier
    records: Records
    told: Callable[[Collection[bytes], bool], object]
    counts: Counter[str]
    levels: Sequence[str]
    _warned: set[str] = field(default_factory=set)

    def work(self, key: bytes, what: bytes) -> Done:
        """Does what is noted of a key.

        Raises:
            StoreError: not now.
        """
        if what == SEND:
            return self._send(key)
        number = what[len(DELETE) :]
        if number:
            gone = self.records.delete(key, number)
            self.told([key], not gone)
            return Done.DELETED if gone else Done.SKIPPED
        self._delete_all(key)
        return Done.DELETED

    def _send(self, key: bytes) -> Done:
        row = self.home.known(key)
        if row is None:
            return Done.DROPPED
        if not self.records.seals(row):
            self._warn(key, "there is no key for its namespace")
            return Done.DROPPED
        lifetime_s = row.terms(self.home.now()).lifetime_s
        codecs = {key: None, **{level_key(key, level): LEVELS[level].codec for level in self.levels}}
        there = self._there(list(codecs), lifetime_s)
        self.told(there, True)
        if len(there) == len(codecs):
            return Done.SKIPPED
        whole = self._read(key)
        if whole is None:
            return Done.DROPPED
        now = time.time()  # the clock of a tier in memory is its own
        here = replace(row, created_s=now, expires_s=now + lifetime_s)
        sent = Done.SKIPPED
        for held in (each for each in codecs if each not in there):
            try:
                codec = codecs[held]
                record, payload = whole if codec is None else recoded(*whole, codec)
            except StoreError as error:  # as of numbers that are not finite: it never will
                self._warn(key, f"at a level: {error}")
                continue
            size = self.records.write(held, record, payload, here, lifetime_s)
            if not size:
                self._warn(key, "it is too large for it")
                return Done.DROPPED
            self.counts["sent_bytes"] += size
            self.told([held], True)
            sent = Done.SENT
        if self.home.row(key) is None:  # removed meanwhile, and perhaps deleted there before it came
            self._delete_all(key)
            return Done.DROPPED
        return sent

    def _delete_all(self, key: bytes) -> None:
        """Deletes a chunk at all levels that there may be."""
        every = with_levels([key])
        self.records.delete_all(list(every))
        self.told(every, False)

    def _read(self, key: bytes) -> tuple[Record, Payload] | None:
        """What is stored under a key; None where that is nothing any more, or damaged."""
        source = self.home.find([key]).get(key)
        if source is None:
            return None
        try:
            source.load()
            return source.whole
        except RecordError as error:
            logger.warning("%s is damaged and does not come to the pool: %s", key.hex(), str(error))
            self.home.damaged(key)
            return None
        finally:
            source.release()

    def _warn(self, key: bytes, why: str) -> None:
        """Says why a chunk does not come to the pool, aloud once: all others may not for the same reason."""
        level = logging.DEBUG if why in self._warned else logging.WARNING
        self._warned.add(why)
        logger.log(level, "%s does not come to %s: %s", key.hex(), self.records.pool.name, why)

    def _there(self, keys: Sequence[bytes], lifetime_s: float) -> set[bytes]:
        """Which objects the pool has for long enough, or in whose place it has some that are not ours to replace."""
        there, heads = set[bytes](), dict[bytes, memoryview]()
        with suppress(GoneError):  # what it does not give is replaced
            heads = self.records.heads(keys)
        for key, head in heads.items():
            try:
                left_s = self.records.open(key, head).row.terms(time.time()).lifetime_s
            except ForeignError as error:
                self._warn(key, f"what is there stays as it is: {error}")
                left_s = math.inf
            except RecordError:
                continue
            if left_s == math.inf or left_s >= lifetime_s / 2:
                there.add(key)
        return there
