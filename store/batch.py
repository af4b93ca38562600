"""A lease on chunks, and their layers one after the other."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from time import perf_counter
from typing import Any, Protocol

from torch import Tensor

from ragkv.chunk import Attended, ChunkKV
from ragkv.errors import RecordError, StoreError
from ragkv.store.source import Parts, Progress, Source
from ragkv.store.target import Target


class Owner(Protocol):
    """What a batch asks of its store."""

    def finish(self, key: bytes, source: Source) -> None:
        """The batch is done with a chunk: the tiers above may keep it."""

    def drop_damaged(self, key: bytes, source: Source, error: RecordError) -> None:
        """A record of a tier proved damaged."""

    def release(self, keys: Sequence[bytes]) -> None:
        """The lease is over."""

    def count_load(self, count: int, seconds: float) -> None:
        """So many bytes were read from disk, in so many seconds."""


class Batch:
    """Chunks opened by :meth:`TieredStore.read`. Use it as a context manager, and close it soon.

    Until it is closed nothing of it is evicted from memory, and no eviction or removal, by whatever process, changes
    what it reads.

    Attributes:
        keys: the keys that were asked for.
        tiers: per key ``"gpu"``, ``"cpu"``, ``"disk"`` or None for a miss.
        bases: per key the position at which the chunk's first token stood, or None.
        lengths: per key T, the chunk's tokens, or None.
        layers: per key L, or None.
        sensitivities: per key ``[T]``, see :class:`~ragkv.chunk.ChunkKV`; None where it was not measured.
        foreigns: per key what that was measured with, see there; empty where it was not.
        rows: per key which of a chunk's tokens are held, see there; None for all, and for a miss.
        attended: per key what its tokens attended to, see there; None where it was not measured.
        codecs: per key how :meth:`parts` are encoded; None for a miss.
        unrotated: per key whether the keys among :meth:`parts` are as they were before rotary embedding.
        held_at: per key the lossy level of a pool at which it is held; empty for what was stored, None for a miss.
        slots: per key where in a pool on the GPU each token lies ``[T]``, see :class:`~ragkv.store.source.Source`, or None.
        bytes_read: bytes read from disk so far.
    """

    def __init__(self, owner: Owner, keys: Sequence[bytes], sources: Mapping[bytes, Source]) -> None:
        self.keys: list[bytes] = list(keys)
        self._found = [sources.get(key) for key in keys]

        def each(fact: str, missing: Any = None) -> list[Any]:
            return [missing if source is None else getattr(source, fact) for source in self._found]

        self.tiers: list[str | None] = each("tier")
        self.bases: list[int | None] = each("base")
        self.lengths: list[int | None] = each("tokens")
        self.layers: list[int | None] = each("layers")
        self.sensitivities: list[Tensor | None] = each("sensitivity")
        self.foreigns: list[str] = each("foreign", "")
        self.rows: list[Tensor | None] = each("rows")
        self.attended: list[Attended | None] = each("attended")
        self.codecs: list[str | None] = each("codec")
        self.unrotated: list[bool] = each("unrotated", False)
        self.held_at: list[str | None] = each("level")
        self.slots: list[Tensor | None] = each("slots")
        self.bytes_read: int = 0
        self._seconds = 0.0
        self._owner = owner
        self._sources = dict(sources)
        self._open = Counter(keys)
        self._lock = threading.Lock()
        self._ahead: threading.Thread | None = None
        self._closed = False
        self._done: set[int] = set()

    def layer(self, index: int, layer: int) -> tuple[Tensor, Tensor]:
        """K and V ``[H, T, D]`` of one layer of the chunk at ``index``.

        They may be the store's own: do not write to them. They stay valid after the batch is closed.

        Raises:
            StoreError: the chunk is a miss, or the batch is closed.
            RecordError: the record proved damaged; it was dropped, and the next read of its key is a miss.
        """
        with self._reading(index) as source:
            self._load(source, layer)
            return source.layer(layer)

    def kv(self, index: int) -> ChunkKV:
        """The chunk at ``index``, as tensors of your own.

        Raises:
            StoreError, RecordError: as :meth:`layer`.
        """
        with self._reading(index) as source:
            layers = range(source.layers)
            held = source.codec == "raw"  # what is decoded is nobody else's
        pairs = [self.layer(index, layer) for layer in layers]
        keys, values = ([side.clone() if held else side for side in sides] for sides in zip(*pairs, strict=True))
        return ChunkKV(keys, values, source.base, source.sensitivity, source.foreign, source.rows, source.attended)

    def parts(self, index: int, layer: int) -> Parts:
        """K and V of one layer of the chunk at ``index`` as they are held, for kernels that decode on their way.

        Where it has :attr:`slots`, ``""`` is the layer's whole pool ``[N, H, P, D]``. Else they are what
        :meth:`Codec.encode` made for K and V: see :attr:`codecs`.

        Raises:
            StoreError, RecordError: as :meth:`layer`.
        """
        with self._reading(index) as source:
            self._load(source, layer)
            return source.parts(layer)

    def payload(self, index: int) -> tuple[Tensor, list[tuple[int, int]]] | None:
        """The bytes of the chunk at ``index`` as they are held, uint8, and between which of them each layer of :meth:`parts` lies;
        ``None`` where they do not lie in CPU memory, all of them.

        Raises:
            StoreError: as :meth:`layer`.
        """
        with self._reading(index) as source:
            whole = source.whole if source.tier == "cpu" else None
            if whole is None:
                return None
            record, payload = whole
            return payload.data, [(layer.start, layer.stop) for layer in record.contents.layers]

    def kept(self, index: int) -> dict[str, Any]:
        """What readers keep with the :meth:`parts` of the chunk at ``index``: as long as these are held, whatever batch is open.

        Raises:
            StoreError: as :meth:`layer`.
        """
        with self._reading(index) as source:
            return source.kept

    def away(self, index: int) -> bool:
        """Whether the chunk at ``index`` comes over a network: once :meth:`begin` was called, beside the caller's work."""
        source = self._found[index]
        return source is not None and source.away

    def begin(self) -> None:
        """Asks for all that is away and not done, one chunk after the other, the last one first."""
        for source in list(self._sources.values()):
            if source.away:
                source.begin()

    def here(self, index: int, limit_s: float) -> bool:
        """Waits at most so long; whether the chunk at ``index`` can be read without waiting, or reading it says why not."""
        source = self._found[index]
        return source is None or source.here(limit_s)

    def progress(self, index: int) -> Progress:
        """How far the chunk at ``index`` is on its way, with those that were asked for with it."""
        source = self._found[index]
        return Progress() if source is None else source.progress()

    def give_up(self, index: int) -> None:
        """The chunk at ``index`` comes too slowly: it is counted, what is left of it is not waited for, and it is :meth:`done`."""
        source = self._found[index]
        if source is not None:
            source.give_up()
        self.done(index)

    def direct(self, index: int) -> bool:
        """Whether :meth:`place` copies the chunk straight from the file: then it is the fastest way to read it."""
        source = self._found[index]
        return source is not None and source.direct

    def place(self, index: int, layers: range, targets: Sequence[Target], start: int) -> None:
        """Copies layers of the chunk at ``index`` into a prompt's K and V.

        Args:
            index: which chunk.
            layers: which layers.
            targets: the prompt's K and V of each of them; made once for all chunks of a prompt.
            start: the token at which the chunk begins.

        Raises:
            StoreError, RecordError: as :meth:`layer`, and where it does not fit; what stands at its place then is worthless.
        """
        started = perf_counter()
        with self._reading(index) as source:
            self._count(source.place(layers, targets, start), started)

    def done(self, index: int) -> None:
        """The batch is finished with the chunk at ``index``: its memory is given back, and a tier above may keep it.

        A chunk that stands at several indices is done when all are. It can no longer be read then; being done twice, or with a
        miss, is fine.
        """
        key = self.keys[index]
        with self._lock:
            if self._closed or index in self._done:
                return
            self._done.add(index)
            self._found[index] = None
            self._open[key] -= 1
            source = None if self._open[key] else self._sources.pop(key, None)
        try:
            if source is not None:
                self._finish(key, source)
        finally:
            self._owner.release([key])

    def read_ahead(self) -> Batch:
        """Starts loading what lies on disk, layer by layer in the order of the chunks, beside the caller's work.

        What proves damaged is left to :meth:`layer`, which raises.
        """
        if self._unread() and self._ahead is None and not self._closed:
            self._ahead = threading.Thread(target=self._load_layers, name="ragkv-read-ahead", daemon=True)
            self._ahead.start()
        return self

    def close(self) -> None:
        """Ends the lease. Closing twice is fine."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        with ExitStack() as last_first:  # each is done, whatever the others raise
            last_first.callback(lambda: self._owner.count_load(self.bytes_read, self._seconds))
            last_first.callback(self._owner.release, list(self._open.elements()))
            for key, source in reversed(self._sources.items()):
                last_first.callback(self._finish, key, source)
            if self._ahead is not None:
                last_first.callback(self._ahead.join)

    def disown(self) -> None:
        """In a forked child: it is the parent's, as are threads that hold its locks."""
        self._lock, self._closed = threading.Lock(), True

    @contextmanager
    def _reading(self, index: int) -> Iterator[Source]:
        if self._closed:
            raise StoreError("the batch is closed, or belongs to the process that this one was forked from")
        source = self._found[index]
        if source is None:
            why = "is a miss: see Batch.tiers" if index not in self._done else "was read, and Batch.done was told so"
            raise StoreError(f"chunk {index} {why}")
        try:
            yield source
        except RecordError as error:
            self._owner.drop_damaged(self.keys[index], source, error)
            raise RecordError(
                f"{self.keys[index].hex()} cannot be read from {source.tier}, and was dropped there: {error}"
            ) from error

    def _finish(self, key: bytes, source: Source) -> None:
        try:
            self._owner.finish(key, source)
        finally:
            source.release()

    def _unread(self) -> list[Source]:
        with self._lock:
            return [source for source in self._sources.values() if source.whole is None and source.slots is None]

    def _load_layers(self) -> None:
        for layer in range(max((source.layers for source in self._unread()), default=0)):
            for source in self._unread():
                if self._closed:
                    return
                if layer < source.layers:
                    with suppress(StoreError):  # it is damaged, which :meth:`layer` says, or done
                        self._load(source, layer)

    def _load(self, source: Source, layer: int) -> None:
        started = perf_counter()
        self._count(source.load(layer), started)

    def _count(self, count: int, started: float) -> None:
        if count:
            with self._lock:
                self.bytes_read += count
                self._seconds += perf_counter() - started

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.keys)
