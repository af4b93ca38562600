"""How fast chunks come from a pool: by what came last (CacheGen, arXiv:2310.07240)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from ragkv.store.rates import Loading

# For how long what was seen counts: then the pool is tried again, also where it was too slow.
_KNOWN_S = 60.0


class Speed:
    """What a pool was seen to do. Safe for several threads.

    Args:
        now: a clock that never jumps, in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.now = now
        self._last: tuple[float, Loading] | None = None
        self._start: tuple[float, float] | None = None

    @property
    def loading(self) -> Loading | None:
        """As the last chunks came; None where none did lately."""
        if self._last is None or self.now() - self._last[0] > _KNOWN_S:
            return None
        return self._last[1]._replace(start_s=self.start_s)

    @property
    def start_s(self) -> float:
        """Seconds until it was last known what is there; 0 where nobody asked lately."""
        return self._start[1] if self._start is not None and self.now() - self._start[0] <= _KNOWN_S else 0.0

    def started(self, seconds: float) -> None:
        """It took so long until it was known what is there."""
        self._start = self.now(), seconds

    def saw(self, size: int, seconds: float, token_bytes: float) -> None:
        """So many bytes came in so many seconds, or no more."""
        self._last = self.now(), Loading(size / max(seconds, 1e-6), token_bytes, beside=True)

    def watch(self, asked: Sequence[tuple[Future[Any], int]], token_bytes: float) -> None:
        """Takes the time of requests that were made just now, as soon as all are answered; not where one is not.

        Args:
            asked: each, and its bytes.
            token_bytes: that a token's KV take there.
        """
        begin, left, lock = self.now(), [future for future, _ in asked], threading.Lock()
        size = sum(count for _, count in asked)

        def done(future: Future[Any]) -> None:
            with lock:
                left.remove(future)
                last = not left
            if last and all(not one.cancelled() and one.exception() is None for one, _ in asked):
                now = self.now()
                self.saw(size, now - begin, token_bytes)

        for future, _ in asked:
            future.add_done_callback(done)
