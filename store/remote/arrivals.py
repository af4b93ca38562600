"""What was read from a pool comes to the folder, too, in the background: next time it need not travel."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from threading import Event

from ragkv.background import Background
from ragkv.store.disk import DiskTier
from ragkv.store.remote.reading import Reading
from ragkv.store.tier import Offer

_MOST_BYTES = 256 << 20
_AT_ONCE = 16  # in one transaction


class Arrivals:
    """Chunks on their way to a folder; when too many wait, some do not come.

    Args:
        home: the folder.
        still: whether nobody removed a chunk since it was looked for: what is removed meanwhile does not come.
    """

    def __init__(self, home: DiskTier, still: Callable[[bytes], bool]) -> None:
        self._home, self._still = home, still
        self._waiting: deque[Reading] = deque()
        self._background = Background("keeping what came from a pool", 1)

    def offer(self, reading: Reading) -> None:
        """One that was read to its end."""
        with self._background.guard:
            if sum(one.record.payload_bytes for one in (reading, *self._waiting)) <= _MOST_BYTES:
                self._waiting.append(reading)
        self._background.add(self._keep)

    def after_fork(self) -> None:
        """In a child: nothing is on its way."""
        self._waiting.clear()

    def close(self) -> None:
        """What waits does not come."""
        self._background.close()

    def _keep(self, closing: Event) -> None:
        while not closing.is_set():
            with self._background.guard:
                readings = [self._waiting.popleft() for _ in range(min(len(self._waiting), _AT_ONCE))]
            if not readings:
                return
            now = self._home.now()
            self._home.admit(
                [Offer(one.key, *one.whole, one.opened.row.terms(now)) for one in readings if one.whole is not None],
                still=self._still,
            )
