# ruff: noqa: D102 - methods without a docstring keep the contract of source.Source
"""Chunks of a shared pool, opened: whoever wants one that is on its way joins those who read it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from weakref import WeakValueDictionary

from torch import Tensor

from ragkv.errors import StoreError
from ragkv.store.payload import Payload
from ragkv.store.record import Record
from ragkv.store.remote.heads import Heads
from ragkv.store.remote.reading import FINISHED, Fetch, Reading
from ragkv.store.source import Asking, Progress, Recorded, Source


class Sources:
    """Opens chunks; ``arrived`` is told what was read to its end."""

    def __init__(self, tier: str, heads: Heads, range_bytes: int, arrived: Callable[[Reading], None]) -> None:
        self._tier, self._heads, self._range_bytes, self._arrived = tier, heads, range_bytes, arrived
        self._readings: WeakValueDictionary[bytes, Reading] = WeakValueDictionary()

    def open(
        self, fetch: Fetch, keys: Sequence[bytes], asking: Asking, levels: Mapping[bytes, bytes]
    ) -> dict[bytes, Source]:
        """Objects that are there, to be read together; of those that hold levels, which chunks these are of."""
        found: dict[bytes, Source] = {}
        for key in keys:
            reading = self._readings.get(key)
            if reading is not None and reading.join():
                found[key] = RemoteSource(self._tier, reading)
        opened, late = self._heads.open([key for key in keys if key not in found], asking.limit_s)
        for key, (one, head) in opened.items():
            level = asking.levels[levels[key]] if key in levels else ""
            reading = Reading(fetch, key, one, head, self._range_bytes, self._arrived, level)
            self._readings[key] = reading
            reading.join()
            found[key] = RemoteSource(self._tier, reading)
        asking.late.update(levels.get(key, key) for key in late)
        return found

    def removals(self, key: bytes) -> int | None:
        """How many the store's home had seen before it was looked for what is on its way; None where it is not."""
        reading = self._readings.get(key)
        return None if reading is None else reading.fetch.removals

    def after_fork(self) -> None:
        """In a child: nothing is on its way."""
        self._readings = WeakValueDictionary()


class RemoteSource(Recorded):
    """What one user reads of a chunk in a pool, who has joined its reading."""

    away: bool = True

    def __init__(self, tier: str, reading: Reading) -> None:
        super().__init__(tier, reading.record)
        self.reading: Reading = reading
        self.level: str = reading.level
        self.key: bytes = reading.key
        self._lock = threading.Lock()
        self._released = False

    @property
    def whole(self) -> tuple[Record, Payload] | None:
        return self.reading.whole

    @property
    def payload(self) -> Payload:
        return self.reading.payload

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        begin = perf_counter()
        pair = super().layer(layer)
        self.reading.fetch.decoded(self.reading, perf_counter() - begin)
        return pair

    def load(self, layer: int | None = None) -> int:
        if self._released and self.reading.whole is None:
            raise StoreError(FINISHED)
        return self.reading.load(layer)

    def begin(self) -> None:
        self.reading.fetch.start(backwards=True)

    def here(self, limit_s: float) -> bool:
        return self.reading.whole is not None or self.reading.here(limit_s)

    def progress(self) -> Progress:
        return self.reading.fetch.progress()

    def give_up(self) -> None:
        self.reading.fetch.late()
        self.release()

    def release(self) -> None:
        with self._lock:
            released, self._released = self._released, True
        if not released:
            self.reading.leave()
