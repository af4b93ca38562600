"""Chunks' KV in a store: under which keys, with what they cost, and only as long as their documents are there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from ragkv.chunk import Chunk, ChunkKV, digest
from ragkv.errors import ArgumentError, StoreError, StoreFullError, instance
from ragkv.lazy import keep_last
from ragkv.library.document import ChunkedDocument
from ragkv.library.given import several_chunks
from ragkv.library.reading import Reader
from ragkv.library.records import Records, StoreRecords, held
from ragkv.model.runner import Runner
from ragkv.store import CostProfile, Item, TieredStore, chunk_key

logger: logging.Logger = logging.getLogger(__name__)

# Keys that a chunk remembers.
_KEYS = 4
# What computing a token takes where nobody measured it.
_TOKEN_S = 1e-3


class Keeping:
    """Keeps the KV of a namespace's chunks, read behind one anchor, in a store.

    Args:
        runner: of the model.
        store: where KV are kept.
        anchor: ids that documents are read behind.
        lifetime_s: seconds after which stored KV are read again.

    Attributes:
        runner, store, anchor: as given.
        namespace: whose chunks they are.
        records: where documents are looked up whose chunks come without them; others may be appended.
    """

    def __init__(self, runner: Runner, store: TieredStore, anchor: tuple[int, ...], lifetime_s: float):
        instance("lifetime_s", lifetime_s, int | float, "a number of seconds")
        if not lifetime_s > 0:
            raise ArgumentError(f"lifetime_s must be more than 0, got {lifetime_s}")
        self.runner: Runner = runner
        self.store: TieredStore = store
        self.anchor: tuple[int, ...] = anchor
        self._lifetime_s = lifetime_s
        self._costs: dict[str, CostProfile | None] = {}

    def _keep_as(self, namespace: str, cutting: str) -> None:
        """Keep chunks of a namespace, of documents that are cut, and become ids, as a digest says."""
        self.namespace: str = namespace
        self._cutting = cutting
        self._own_records = StoreRecords(self.store, cutting)
        self.records: list[Records] = [self._own_records]

    @property
    def stores(self) -> set[TieredStore]:
        """All in which something is kept of these chunks."""
        return {self.store}

    @property
    def space(self) -> str:
        """Fingerprint of all that KV depend on besides their chunk: the model as it is now, and the anchor."""
        return digest(self.runner.fingerprint, self.anchor).hex()

    @property
    def setting(self) -> str:
        """What records of documents hold for: the space, and how documents are cut and their texts become ids."""
        return digest(self.space, self._cutting).hex()

    def key(self, chunk: Chunk, space: str = "") -> bytes:
        """The key of a chunk's KV in the store: space, namespace, ids and context."""
        name = space or self.space, self.namespace
        known = chunk.keys.get(name)
        if known is None:
            known = keep_last(chunk.keys, name, chunk_key(name[0], chunk.ids, chunk.context, name[1]), _KEYS)
        return known

    def keys(self, chunks: Sequence[Chunk]) -> dict[bytes, Chunk]:
        """Chunks by the keys of their KV, each key once."""
        space = self.space
        return {self.key(chunk, space): chunk for chunk in chunks}

    def keys_of(self, document: ChunkedDocument) -> list[bytes]:
        """The keys of a document's KV, in order."""
        space = self.space
        return [self.key(chunk, space) for chunk in document]

    def missing(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """Those of the chunks that the store does not hold."""
        keys = self.keys(chunks)
        return [keys[key] for key in self.store.missing(list(keys))]

    def costs(self, reader: Reader) -> Callable[[int, int], float]:
        """Seconds that computing so many tokens takes behind so many; about in proportion where it was not measured."""
        return self._costs.get(reader.fingerprint) or (lambda behind, tokens: _TOKEN_S * tokens)

    def item(self, reader: Reader, chunk: Chunk, kv: ChunkKV, seconds: float) -> Item:
        """What is stored of a chunk: what it costs to compute behind its context, and its document's name.

        A namespace's documents are not named: whoever has the text could tell that it is there.
        """
        costs = self._costs.get(reader.fingerprint)
        if costs is not None:
            seconds = costs(len(self.anchor) + chunk.offset, len(chunk))
        return Item(self.key(chunk, reader.space), kv, seconds, "" if self.namespace else chunk.document)

    def put(self, reader: Reader, items: Sequence[Item], store: TieredStore) -> None:
        """Store what a reader's model computed, together; one by one where it does not fit together."""
        put = partial(store.put_many, space=reader.space, namespace=self.namespace)
        put = partial(put, rotations=reader.decoder.rotations, lifetime_s=self._lifetime_s)
        try:
            if items:
                put(items)
        except StoreFullError:
            if len(items) == 1:
                raise
            for item in items:
                put([item])

    def keep(self, reader: Reader, items: Sequence[Item], chunks: Mapping[bytes, Chunk]) -> None:
        """Store what a prompt had to read, if it fits, and if its documents were not removed meanwhile.

        Args:
            reader: that read it.
            items: what was read.
            chunks: theirs and perhaps others, by key.
        """
        stored = held({item.key: chunks[item.key] for item in items}, self.records)
        try:
            self.put(reader, [item for item in items if item.key in stored], self.store)
        except StoreError as error:  # full, or open for reading only
            logger.warning("%d chunks are used but not all of them are stored: %s", len(stored), str(error))
        self._settle({key: chunks[key] for key in stored})

    def _settle(self, stored: Mapping[bytes, Chunk]) -> None:
        """Undo what was stored of documents that were removed meanwhile.

        Whoever removes a document strikes out its record before its KV: what is stored without one he may have missed.
        """
        gone = stored.keys() - held(stored, self.records)
        if gone:
            self.drop(gone)

    def record(self, document: ChunkedDocument) -> None:
        """Keep a document's record beside the KV; for documents that no other of :attr:`records` has."""
        self._own_records.put(document)

    def holds(self, chunks: Sequence[Chunk]) -> bool:
        """Whether none of the chunks is of a document that was removed."""
        keys = self.keys(chunks)
        return len(held(keys, self.records)) == len(keys)

    def forget(self, chunks: Sequence[Chunk]) -> int:
        """Remove chunks' KV, and the records of their documents, from the store; returns how many KV were there."""
        chunks = several_chunks(chunks, "chunks")
        names = {self._own_records.name(chunk.document) for chunk in chunks if chunk.document}
        return self.drop(self.keys(chunks), names)

    def drop(self, keys: Iterable[bytes], facts: Iterable[str] = ()) -> int:
        """Remove KV from the store, what was computed behind them, and small facts; returns how many KV were there.

        Facts go first, for by them whoever stores later sees that it must not; what was computed goes before what it is found by.
        So whatever is cut short is done when it is asked for again, and no sooner than then are the KV gone.
        """
        keys, facts = list(keys), list(facts)
        if facts:
            self.store.remove_many((), facts=facts)
        for store in self.stores:
            computed = store.computed_of(keys)
            if computed:
                store.remove_many(computed)
        return self.store.remove_many(keys)
