"""Chunks are moved to memory in the background, before anybody reads them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from time import perf_counter

from ragkv.errors import RecordError, StoreError
from ragkv.forks import anew_in_forks
from ragkv.store.stats import Moved
from ragkv.store.tiers import Tiers


class Prefetch:
    """Moves chunks between the tiers of a store, in a thread that begins when it is first needed."""

    def __init__(self, tiers: Tiers) -> None:
        self._tiers = tiers
        self.anew()
        anew_in_forks(self)

    def anew(self) -> None:
        """As it was made."""
        self._thread = ThreadPoolExecutor(1, "ragkv-prefetch")

    def begin(self, keys: Sequence[bytes], moved: dict[bytes, Moved]) -> Future[int]:
        """Begins to move chunks, see :meth:`load`."""
        try:
            return self._thread.submit(self.load, keys, moved)
        except RuntimeError as error:
            raise StoreError("the store is closed") from error

    def load(self, keys: Sequence[bytes], moved: dict[bytes, Moved]) -> int:
        """Moves chunks to memory; the bytes that were read. What proves damaged is dropped.

        ``moved`` is told of each before it is in memory.
        """
        tiers, read, started = self._tiers, 0, perf_counter()
        # All at once: a pool is asked for them together.
        with ExitStack() as opened:
            sources = tiers.find(tiers.below(keys))
            for source in sources.values():
                opened.callback(source.release)
            for key, source in sources.items():
                try:
                    if source.whole is None and tiers.below([key]) and tiers.over(tiers.named[source.tier]):
                        moved[key] = Moved(source.tier, source.load())
                        read += moved[key].bytes_read
                    tiers.finish(key, source)
                except RecordError as error:
                    tiers.drop_damaged(key, source, error)
        tiers.count_load(read, perf_counter() - started)
        return read

    def close(self) -> None:
        """Waits for what is under way; what was not begun is dropped."""
        self._thread.shutdown(cancel_futures=True)
