"""What was read from a pool comes to the folder, too, in the background: next time it need not travel."""

from __future__ import annotations

import logging
import threading
from collections import deque

from ragkv.store.disk import DiskTier
from ragkv.store.notes import Notes
from ragkv.store.remote.source import Reading
from ragkv.store.tier import Offer

logger: logging.Logger = logging.getLogger("ragkv.store")

_MOST_BYTES = 256 << 20
_AT_ONCE = 16  # in one transaction
_JOIN_S = 1.0


class Arrivals:
    """Chunks on their way to a folder; when too many wait, some do not come.

    Args:
        home: the folder.
        notes: what is to be deleted in the pool does not come.

    Attributes:
        lock: held while one is written: who removes a chunk notes it under this lock.
        busy: keys that are being written.
    """

    def __init__(self, home: DiskTier, notes: Notes) -> None:
        self._home, self._notes = home, notes
        self._reset()

    def _reset(self) -> None:
        self.lock: threading.RLock = threading.RLock()
        self.busy: set[bytes] = set()
        self._changed = threading.Condition()
        self._waiting: deque[Reading] = deque()
        self._bytes = 0
        self._thread: threading.Thread | None = None
        self._closed = False

    def offer(self, reading: Reading) -> None:
        """One that was read to its end."""
        with self._changed:
            if self._closed or self._bytes + reading.record.payload_bytes > _MOST_BYTES:
                return
            self._bytes += reading.record.payload_bytes
            self._waiting.append(reading)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="ragkv-pool-keep", daemon=True)
                self._thread.start()
            self._changed.notify()

    def after_fork(self) -> None:
        """In a child: nothing is on its way."""
        self._reset()

    def close(self) -> None:
        """What waits does not come."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            thread = self._thread
        if thread is not None:
            thread.join(_JOIN_S)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                readings = [self._waiting.popleft() for _ in range(min(len(self._waiting), _AT_ONCE))]
            try:
                self._keep({reading.key: reading for reading in readings})
            except Exception as error:
                logger.debug("chunks of the pool are not kept on disk: %s", repr(error))
            finally:
                with self._changed:
                    self._bytes -= sum(reading.record.payload_bytes for reading in readings)

    def _keep(self, readings: dict[bytes, Reading]) -> None:
        now = self._home.now()
        with self.lock:
            wanted = self._home.missing([*(readings.keys() - self._notes.deleting(readings))])
            whole = {key: whole for key in wanted if (whole := readings[key].whole) is not None}
            self.busy.update(whole)
            try:
                self._home.admit([Offer(key, *pair, readings[key].row.terms(now)) for key, pair in whole.items()])
            finally:
                self.busy.difference_update(whole)
