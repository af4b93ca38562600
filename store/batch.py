"""A lease on chunks, and their layers one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol

from torch import Tensor

from ragkv.chunk import ChunkKV
from ragkv.errors import RecordError, StoreError
from ragkv.store.disk import Loading, Snapshot

Source = ChunkKV | Loading


class _Owner(Protocol):
    """What a batch asks of its store."""

    def _finish(self, loading: Loading) -> None: ...
    def _drop_damaged(self, key: bytes, error: RecordError) -> None: ...
    def _release(self, keys: Sequence[bytes]) -> None: ...
    def _count_bytes(self, count: int) -> None: ...


class Batch:
    """Chunks opened by :meth:`TieredStore.read`. Use it as a context manager, and close it soon.

    Until it is closed nothing of it is evicted, and no other process's removal changes it.

    Attributes:
        keys: the keys that were asked for.
        tiers: per key ``"cpu"``, ``"disk"`` or None for a miss.
        bases: per key the position at which the chunk's first token stood, or None.
        lengths: per key T, the chunk's tokens, or None.
        layers: per key L, or None.
        bytes_read: bytes read from disk so far.
    """

    def __init__(
        self, store: _Owner, keys: list[bytes], sources: dict[bytes, Source], snapshot: Snapshot | None
    ) -> None:
        found = [sources.get(key) for key in keys]
        self.keys = keys
        self.tiers = [None if it is None else "disk" if isinstance(it, Loading) else "cpu" for it in found]
        self.bases = [None if it is None else it.record.base if isinstance(it, Loading) else it.base for it in found]
        self.lengths = [
            None if it is None else it.record.tokens if isinstance(it, Loading) else len(it) for it in found
        ]
        self.layers = [
            None if it is None else len(it.record.shapes) if isinstance(it, Loading) else len(it.keys) for it in found
        ]
        self.bytes_read = 0
        self._store = store
        self._found = found
        self._sources = sources
        self._snapshot = snapshot
        self._closed = False

    def layer(self, index: int, layer: int) -> tuple[Tensor, Tensor]:
        """K and V ``[H, T, D]`` of one layer of the chunk at ``index``.

        They may be the store's own: do not write to them.

        Raises:
            StoreError: the chunk is a miss, or the batch is closed.
            RecordError: the record proved damaged; it was dropped, and the next read of its key is a miss.
        """
        source = self._found[index]
        if self._closed or source is None:
            what = "the batch is closed" if self._closed else f"chunk {index} is a miss: see Batch.tiers"
            raise StoreError(what)
        if isinstance(source, ChunkKV):
            return source.keys[layer], source.values[layer]
        try:
            pair, count = source.layer(layer)
        except RecordError as error:
            self._store._drop_damaged(source.key, error)
            raise RecordError(f"the record {source.key.hex()} is damaged and was dropped: {error}") from error
        self.bytes_read += count
        return pair

    def close(self) -> None:
        """Ends the lease. Tensors that were handed out stay valid. Closing twice is fine."""
        if self._closed:
            return
        self._closed = True
        if self._snapshot is not None:
            self._snapshot.close()
        for source in self._sources.values():
            if isinstance(source, Loading) and source.complete:
                self._store._finish(source)
        self._store._release(self.keys)
        self._store._count_bytes(self.bytes_read)

    def __enter__(self) -> Batch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.keys)
