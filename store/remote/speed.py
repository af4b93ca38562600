"""How fast chunks come from a pool: by what came last (CacheGen, arXiv:2310.07240)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from ragkv.store.rates import LevelRate, Loading
from ragkv.store.remote.levels import LEVELS

# For how long what was seen counts: then the pool is tried again, also where it was too slow.
_KNOWN_S = 60.0


@dataclass
class Watched:
    """How far requests are on their way that were made together.

    Attributes:
        begin_s: when, by the clock of :class:`Speed`.
        left: bytes that are not answered yet.
        came: bytes that are.
    """

    begin_s: float
    left: int
    came: int = 0


class Speed:
    """What a pool was seen to do. Safe for several threads.

    Args:
        now: a clock that never jumps, in seconds.
        levels: lossy ones at which it holds chunks besides, best first.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic, levels: Sequence[str] = ()) -> None:
        self.now = now
        self._levels = levels
        self._last: tuple[float, float] | None = None
        self._start: tuple[float, float] | None = None
        self._token_bytes: dict[str, float] = {}
        self._token_s: dict[str, float] = {}

    @property
    def loading(self) -> Loading | None:
        """As the last chunks came, with levels that take less; None where none did lately, or nobody knows what one takes."""
        if self._last is None or self.now() - self._last[0] > _KNOWN_S:
            return None
        whole = self._token_bytes.get("")
        if whole is None:
            return None
        levels = (
            LevelRate(name, self._token_bytes.get(name, LEVELS[name].share * whole), self._token_s.get(name, 0.0))
            for name in self._levels
        )
        smaller = tuple(level for level in levels if level.token_bytes < whole)
        return Loading(self._last[1], whole, self.start_s, beside=True, levels=smaller)

    @property
    def start_s(self) -> float:
        """Seconds until it was last known what is there; 0 where nobody asked lately."""
        return self._start[1] if self._start is not None and self.now() - self._start[0] <= _KNOWN_S else 0.0

    def started(self, seconds: float) -> None:
        """It took so long until it was known what is there."""
        self._start = self.now(), seconds

    def sized(self, level: str, token_bytes: float) -> None:
        """A token's KV take so many bytes there, at a level; without a name as they were stored."""
        self._token_bytes[level] = token_bytes

    def decoded(self, level: str, token_s: float) -> None:
        """Decoding a token's KV of a level took so long."""
        self._token_s[level] = token_s

    def saw(self, size: int, seconds: float) -> None:
        """So many bytes came in so many seconds, or no more."""
        self._last = self.now(), size / max(seconds, 1e-6)

    def watch(self, asked: Sequence[tuple[Future[Any], int]]) -> Watched:
        """Takes the time of requests that were made just now, as soon as all are answered; not where one is not.

        Args:
            asked: each, and its bytes.
        """
        watched = Watched(self.now(), sum(size for _, size in asked))
        total, open_ones, whole, lock = watched.left, len(asked), True, threading.Lock()

        # It holds no request: that would keep all that came until somebody collects circles.
        def done(size: int, future: Future[Any]) -> None:
            nonlocal open_ones, whole
            with lock:
                cancelled = future.cancelled()
                whole &= not cancelled and future.exception() is None
                watched.left -= size
                watched.came += 0 if cancelled else size
                open_ones -= 1
                last = not open_ones
            if last and whole:
                self.saw(total, self.now() - watched.begin_s)

        for future, size in asked:
            future.add_done_callback(partial(done, size))
        return watched
