"""What is in a pool, as far as it is known here: from a listing now and then, and from what this process did."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable

import numpy as np

from ragkv.lazy import keep_last
from ragkv.store.remote.pool import Pool

logger: logging.Logger = logging.getLogger("ragkv.store")

_SHARE = 20  # a listing takes at most one part of the time in so many
_MOST = 100_000  # keys that are kept whole
MOST_KNOWN = 4096  # of which there is more to say
_FIRST = 8  # bytes of a key that are kept: the keys are hashes


class Manifest:
    """Answers whether a key may be in a pool, and be asked for, without asking it. Safe for several threads.

    It keeps 8 bytes a key. The listing is made in the background and again every ``refresh_s``, or 20 times as long as it takes;
    it is trusted for two such times.

    Args:
        pool: that is listed.
        refresh_s: seconds from one listing to the next.
        key_of: the key that a name in the pool has; None where it is none.
    """

    def __init__(
        self,
        pool: Pool,
        refresh_s: float,
        key_of: Callable[[str], bytes | None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool, self._refresh_s, self._key_of, self._now = pool, refresh_s, key_of, now
        self._lock = threading.Lock()
        self._listed = np.empty(0, np.uint64)
        self._bytes = 0
        # What this process did, and when: it holds beside a listing that was begun before.
        self._done: dict[bytes, tuple[float, bool]] = {}
        # What proved damaged, or was not given, and until when it is left alone.
        self._avoided: dict[bytes, float] = {}
        self._due_s = self._good_until_s = 0.0
        self._thread: threading.Thread | None = None

    @property
    def fresh(self) -> bool:
        """Whether what it lacks is surely not there, but for what others put since the last listing. Lists anew when it is time."""
        now = self._now()
        with self._lock:
            if now >= self._due_s and self._thread is None:
                self._thread = threading.Thread(target=self._list, name="ragkv-pool-list", daemon=True)
                self._thread.start()
        return now < self._good_until_s

    def holds(self, keys: Iterable[bytes]) -> set[bytes]:
        """Those of the keys that it knows of."""
        with self._lock:
            listed, done = self._listed, {key: self._done.get(key) for key in keys}
        found = {key for key, what in done.items() if what is not None and what[1]}
        asked = [key for key, what in done.items() if what is None]
        if asked and len(listed):
            firsts = np.array([_first(key) for key in asked], np.uint64)
            places = np.searchsorted(listed, firsts).clip(max=len(listed) - 1)
            found.update(key for key, there in zip(asked, listed[places] == firsts, strict=True) if there)
        return found

    def note(self, keys: Iterable[bytes], there: bool) -> None:
        """Says that keys are there now, or not any more; there is no reason any more to avoid them."""
        with self._lock:
            done = dict.fromkeys(keys, (self._now(), there))
            self._done.update(done)
            while len(self._done) > _MOST:
                del self._done[next(iter(self._done))]
        for key in done:
            self._avoided.pop(key, None)

    def avoid(self, key: bytes, seconds: float = math.inf) -> None:
        """Leaves a key alone for so long, or until something is noted of it."""
        keep_last(self._avoided, key, self._now() + seconds, MOST_KNOWN)

    def avoids(self, key: bytes) -> bool:
        """Whether a key is to be left alone."""
        return self._avoided.get(key, 0.0) > self._now()

    def counts(self) -> tuple[int, int]:
        """How many objects the last listing named, and their bytes."""
        return len(self._listed), self._bytes

    def after_fork(self) -> None:
        """In a child: nobody lists."""
        self._lock, self._thread = threading.Lock(), None

    def _list(self) -> None:
        begun = self._now()
        firsts: list[int] = []
        total = 0
        try:
            for name, size in self._pool.names():
                key = self._key_of(name)
                if key is not None:
                    firsts.append(_first(key))
                    total += size
        except Exception as error:  # else nobody would list again
            logger.warning("%s could not be listed: %s", self._pool.name, str(error) or repr(error))
            with self._lock:
                self._due_s, self._thread = self._now() + self._refresh_s, None
            return
        listed = np.sort(np.array(firsts, np.uint64))
        with self._lock:
            now = self._now()
            every = max(self._refresh_s, _SHARE * (now - begun))
            self._listed, self._bytes = listed, total
            self._done = {key: what for key, what in self._done.items() if what[0] >= begun}
            self._due_s, self._good_until_s, self._thread = now + every, now + 2 * every, None


def _first(key: bytes) -> int:
    return int.from_bytes(key[:_FIRST], "big")
