"""What goes to a shared pool in the background: chunks, and deletions."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from enum import Enum
from itertools import islice

from ragkv.errors import StoreError, UploadError
from ragkv.store.notes import Notes
from ragkv.store.remote.pool import Breaker, ClosedError

logger: logging.Logger = logging.getLogger("ragkv.store")

_AT_ONCE = 32  # notes are taken, and struck out, so many together
_LOOK_S = 30.0  # other processes write notes too
_GLANCE_S = 0.1
_JOIN_S = 1.0


class Done(Enum):
    """What became of a note."""

    SENT = "sent"
    DELETED = "deleted"
    SKIPPED = "skipped"  # it is there already
    DROPPED = "dropped"  # it is not here any more, or is too large


class Uploads:
    """Works off the notes of a store, in a few threads that begin when there is something to do.

    Args:
        notes: what is to be done.
        work: does what is noted of a key; a StoreError is tried again later, all else is the same but for the log.
        threads: how many chunks are on their way at once, and in memory for that.
        counts: of what was done, by :class:`Done`, and of ``failed`` tries.
    """

    def __init__(self, notes: Notes, work: Callable[[bytes, bytes], Done], threads: int, counts: Counter[str]) -> None:
        self._notes, self._work, self._most, self._counts = notes, work, threads, counts
        self._reset()

    def _reset(self) -> None:
        self._changed, self._striking, self._breaker = threading.Condition(), threading.Lock(), Breaker()
        self._threads: list[threading.Thread] = []
        self._ready: deque[tuple[bytes, bytes]] = deque()
        self._busy: set[bytes] = set()
        self._done: dict[bytes, bytes] = {}
        self._slow: dict[bytes, Breaker] = {}  # what failed, and when it is tried again
        self._refilling = self._woken = False
        self._start = b""
        self._closed = False

    def note(self, notes: Mapping[bytes, bytes]) -> None:
        """Writes notes down, and has them worked off."""
        self._notes.add(notes)
        self.wake()

    def wake(self) -> None:
        """There may be something to do."""
        with self._changed:
            if self._closed:
                return
            self._woken = True
            while len(self._threads) < self._most:
                thread = threading.Thread(target=self._run, name="ragkv-pool-send", daemon=True)
                self._threads.append(thread)
                thread.start()
            self._changed.notify_all()

    def flush(self, limit_s: float) -> None:
        """Waits until nothing is left to do.

        Raises:
            UploadError: that was not so within the limit. What is left is done later.
        """
        until = time.monotonic() + limit_s
        self.wake()
        while True:
            self._strike()
            # What is under way is left to do also where another process has struck its note.
            left, rest_s = len(self._notes) or len(self._busy), until - time.monotonic()
            if not left:
                return
            if rest_s <= 0 or self._closed:
                raise UploadError(
                    f"after {limit_s:.3g} s {left} chunks are still to be sent to the pool, or deleted there: they are noted, and "
                    "it is done later. The log says what failed; else wait longer"
                )
            with self._changed:
                self._changed.wait(min(_GLANCE_S, rest_s))

    @property
    def failing(self) -> bool:
        """Whether the last try failed."""
        return self._breaker.broken

    def after_fork(self, threads: int) -> None:
        """In a child: what the parent does is the parent's; with 0 threads all is."""
        self._most = threads
        self._reset()

    def close(self) -> None:
        """Ends soon; what is on its way is noted still, and sent again another time, unless it arrives in a moment."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            threads = list(self._threads)
        until = time.monotonic() + _JOIN_S
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        try:
            self._strike()
        except StoreError as error:  # the folder is gone, or full
            logger.warning("what was sent to the pool, or deleted there, could not be struck out: %s", str(error))

    def _run(self) -> None:
        while (item := self._next()) is not None:
            key, what = item
            try:
                done = self._work(key, what)
            except ClosedError:
                return
            except Exception as error:
                self._failed(key, error)
                continue
            with self._changed:
                self._counts[done.value] += 1
                self._breaker.succeeded()
                self._slow.pop(key, None)
                self._busy.discard(key)
                self._done[key] = what
                self._changed.notify_all()

    def _failed(self, key: bytes, error: Exception) -> None:
        level = logging.WARNING if isinstance(error, StoreError) else logging.ERROR
        logger.log(level, "%s did not come to the pool and is tried again: %s", key.hex(), str(error) or repr(error))
        with self._changed:
            self._counts["failed"] += 1
            self._breaker.failed()
            self._slow.setdefault(key, Breaker()).failed()
            self._busy.discard(key)
            self._changed.notify_all()

    def _next(self) -> tuple[bytes, bytes] | None:
        """The next note, once there is one and it may be tried; None at the end."""
        while True:
            with self._changed:
                if self._closed:
                    return None
                if self._ready and self._breaker.allows():
                    key, what = self._ready.popleft()
                    if key in self._slow:
                        self._slow[key].allows()
                    self._busy.add(key)
                    return key, what
                if self._ready or self._refilling:
                    self._changed.wait(self._breaker.left_s or _LOOK_S)
                    continue
                self._refilling, self._woken = True, False
            found = False
            try:
                found = self._refill()
            except StoreError as error:  # the folder is closed, or cannot be read or written
                logger.warning("what is to be sent to the pool cannot be looked up: %s", str(error))
            with self._changed:
                self._refilling = False
                self._changed.notify_all()
                if not found:  # until there is, or what failed may be tried again, or it is time to look
                    pause_s = min([_LOOK_S, *(slow.left_s for slow in self._slow.values())]) + 1e-3
                    self._changed.wait_for(lambda: self._ready or self._woken or self._closed, pause_s)

    def _refill(self) -> bool:
        """Takes the next notes; whether to look on. All that were worked off are struck out before."""
        self._strike()
        with self._changed:
            start = self._start
            out = {*self._busy, *self._done, *(key for key, slow in self._slow.items() if slow.left_s)}
        found = list(islice((note for note in self._notes.each(start) if note[0] not in out), _AT_ONCE))
        self._notes.take(key for key, _ in found)
        with self._changed:
            if not (found or start):  # what failed is noted no more: another process did it, or it was evicted
                self._slow = {key: slow for key, slow in self._slow.items() if key in out}
            self._ready.extend(found)
            self._start = found[-1][0] if found else b""
        return bool(found or start)

    def _strike(self) -> None:
        """Strikes out what was worked off, once. It counts as such until that is done: nobody does it again."""
        with self._striking:
            with self._changed:
                done = dict(self._done)
            self._notes.strike(done)
            with self._changed:
                for key in done:
                    del self._done[key]
