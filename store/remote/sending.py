"""How a note is worked off: a chunk goes from where it is stored to a pool, or is deleted there."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace

from ragkv.errors import RecordError
from ragkv.store.notes import DELETE, SEND
from ragkv.store.payload import Payload
from ragkv.store.record import Record
from ragkv.store.remote.envelope import ForeignError
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

    Attributes:
        sent_bytes: of all objects that were sent.
    """

    def __init__(self, home: Tier, records: Records, told: Callable[[bytes, bool], object]) -> None:
        self.sent_bytes: int = 0
        self._home, self._records, self._told = home, records, told

    def work(self, key: bytes, what: bytes) -> Done:
        """Does what is noted of a key.

        Raises:
            StoreError: not now.
        """
        if what == SEND:
            done = self._send(key)
            if done in (Done.SENT, Done.SKIPPED):
                self._told(key, True)
            return done
        gone = self._records.delete(key, what[len(DELETE) :])
        self._told(key, not gone)
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
        if self._there(key, lifetime_s):
            return Done.SKIPPED
        whole = self._read(key)
        if whole is None:
            return Done.DROPPED
        now = time.time()  # the clock of a tier in memory is its own
        size = self._records.write(key, *whole, replace(row, created_s=now, expires_s=now + lifetime_s), lifetime_s)
        if not size:
            logger.warning("%s does not come to %s: it is too large for it", key.hex(), self._records.pool.name)
            return Done.DROPPED
        self.sent_bytes += size
        return Done.SENT

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

    def _there(self, key: bytes, lifetime_s: float) -> bool:
        """Whether the pool has a chunk for long enough, or in its place an object that is not ours to replace."""
        heads = self._records.heads([key])
        try:
            if not heads:
                return False
            left_s = self._records.open(key, heads[key])[0].row.terms(time.time()).lifetime_s
        except ForeignError as error:
            logger.warning("%s in the pool is left as it is: %s", key.hex(), str(error))
            return True
        except RecordError:
            return False
        return left_s == math.inf or left_s >= lifetime_s / 2
