"""A store without a folder: what is put waits in memory for a pool to have it, and only for that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ragkv.chunk import ChunkKV
from ragkv.errors import UploadError
from ragkv.store import Item, TieredStore
from ragkv.store.codecs import Codec
from ragkv.store.remote import RemoteTier

_ASKED = 1024  # for more together the whole pool would be listed


class Outbox(TieredStore):
    """Computing goes on while chunks are sent; where half of the memory waits, it waits for the pool.

    Args:
        pool: where chunks go.
        cpu_bytes: memory for them.
        codec: how they are encoded.
        limit_s: how long is waited for the pool.
    """

    def __init__(self, pool: RemoteTier, cpu_bytes: int, codec: str | Codec, limit_s: float) -> None:
        # What was put last goes last: it was not sent yet.
        super().__init__(cpu_bytes=cpu_bytes, codec=codec, policy="lru", remote=pool)
        self._pool, self._room, self._limit_s = pool, cpu_bytes // 2, limit_s
        self._unsent = 0

    def put_many(self, items: Sequence[Item | tuple[bytes, ChunkKV, float]], **common: Any) -> list[bool]:
        """See :meth:`TieredStore.put_many`.

        Raises:
            UploadError: the pool does not take what was put before.
        """
        size = sum(Item(*item).kv.nbytes for item in items)
        if self._unsent + size > self._room:
            self.sent()
        self._unsent += size
        return super().put_many(items, **common)

    def sent(self) -> None:
        """Wait until the pool has what was put.

        Raises:
            UploadError: it did not within the limit.
        """
        try:
            self.flush(self._limit_s)
        except UploadError as error:
            stats = self._pool.pool()
            raise UploadError(
                f"the pool {stats.pool} did not take {stats.pending} chunks within {self._limit_s:.3g} s: reading ends. What is "
                "there stays, and running it again goes on from there"
            ) from error
        self._unsent = 0

    def lost(self, keys: Sequence[bytes]) -> set[bytes]:
        """Those that the pool does not have; it is asked, whatever is in memory or was listed.

        Raises:
            PoolError: it does not answer.
        """
        parts = (keys[start : start + _ASKED] for start in range(0, len(keys), _ASKED))
        return {key for part in parts for key in self._pool.lacking(part)}
