"""How a note is worked off: a chunk goes from where it is stored to a pool, or is deleted there."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from ragkv.errors import RecordError
from ragkv.store.codecs import Codec
from ragkv.store.encode import encode
from ragkv.store.notes import DELETE, SEND
from ragkv.store.payload import Payload
from ragkv.store.record import Record
from ragkv.store.remote.envelope import ForeignError
from ragkv.store.remote.levels import LEVELS, level_key
from ragkv.store.remote.records import Records
from ragkv.store.remote.uploads import Done
from ragkv.store.tier import Tier

logger: logging.Logger = logging.getLogger("ragkv.store")


class Sender:
    """Works off one note at a time; several threads may.

    Args:
        home: where chunks are stored.
        records: the pool's.
        told: of each key whether the pool has it now.
        levels: lossy ones at which chunks are sent besides.

    Attributes:
        sent_bytes: of all objects that were sent.
    """

    def __init__(
        self, home: Tier, records: Records, told: Callable[[bytes, bool], object], levels: Sequence[str] = ()
    ) -> None:
        self.sent_bytes: int = 0
        self._home, self._records, self._told, self._levels = home, records, told, levels

    def work(self, key: bytes, what: bytes) -> Done:
        """Does what is noted of a key.

        Raises:
            StoreError: not now.
        """
        if what == SEND:
            return self._send(key)
        number = what[len(DELETE) :]
        gone = self._records.delete(key, number)
        self._told(key, not gone)
        for level in () if number else map(partial(level_key, key), LEVELS):
            self._records.delete(level)
            self._told(level, False)
        return Done.DELETED if gone else Done.SKIPPED

    def _send(self, key: bytes) -> Done:
        row, now = self._home.row(key), self._home.now()
        if row is None or not row.alive(now):
            return Done.DROPPED
        if not self._records.seals(row):
            logger.warning(
                "%s does not come to %s: there is no key for its namespace", key.hex(), self._records.pool.name
            )
            return Done.DROPPED
        lifetime_s = row.terms(now).lifetime_s
        codecs = {key: None, **{level_key(key, level): LEVELS[level].codec for level in self._levels}}
        there = self._there(list(codecs), lifetime_s)
        whole = None if len(there) == len(codecs) else self._read(key)
        if len(there) < len(codecs) and whole is None:
            return Done.DROPPED
        sent = Done.SKIPPED
        for held, codec in codecs.items():
            if held not in there:
                assert whole is not None
                now = time.time()  # the clock of a tier in memory is its own
                here = replace(row, created_s=now, expires_s=now + lifetime_s)
                size = self._records.write(held, *_at(codec, *whole), here, lifetime_s)
                if not size:
                    logger.warning("%s does not come to %s: it is too large for it", key.hex(), self._records.pool.name)
                    return Done.DROPPED
                self.sent_bytes += size
                sent = Done.SENT
            self._told(held, True)
        return sent

    def _read(self, key: bytes) -> tuple[Record, Payload] | None:
        """What is stored under a key; None where that is nothing any more, or damaged."""
        source = self._home.find([key]).get(key)
        if source is None:
            return None
        try:
            source.load()
            return source.whole
        except RecordError as error:
            logger.warning("%s is damaged and does not come to the pool: %s", key.hex(), str(error))
            self._home.damaged(key)
            return None
        finally:
            source.release()

    def _there(self, keys: Sequence[bytes], lifetime_s: float) -> set[bytes]:
        """Which objects the pool has for long enough, or in whose place it has some that are not ours to replace."""
        there = set[bytes]()
        for key, head in self._records.heads(keys).items():
            try:
                left_s = self._records.open(key, head).row.terms(time.time()).lifetime_s
            except ForeignError as error:
                logger.warning("%s in the pool is left as it is: %s", key.hex(), str(error))
                left_s = math.inf
            except RecordError:
                continue
            if left_s == math.inf or left_s >= lifetime_s / 2:
                there.add(key)
        return there


def _at(codec: Codec | None, record: Record, payload: Payload) -> tuple[Record, Payload]:
    """A record in another codec; itself without one."""
    if codec is None:
        return record, payload
    kv = record.decode(payload)
    return encode(kv, codec=codec, space=record.space, label=record.label, ropes=record.ropes)
