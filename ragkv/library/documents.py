"""Documents that a model has read, as chunks whose KV are in a store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from copy import copy
from functools import partial

from ragkv.chunk import Chunk, ChunkKV, digest
from ragkv.errors import ModelChangedError, checked_namespace, whole_number
from ragkv.kernels import Impl
from ragkv.lazy import keep_last
from ragkv.library.costs import cost_profile
from ragkv.library.cutting import Cutting
from ragkv.library.document import ChunkedDocument
from ragkv.library.keeping import Keeping
from ragkv.library.measured import Measured
from ragkv.library.paths import Paths
from ragkv.library.reading import Reader, chains, identity
from ragkv.library.records import lineage_of
from ragkv.library.sensitivity import FOREIGN, foreign_ids
from ragkv.library.watching import counting
from ragkv.model.activations import piece_tokens as affordable
from ragkv.model.runner import Runner
from ragkv.model.steps import Steps
from ragkv.prompt import Encoder, Text
from ragkv.scheduling.memory import free_bytes
from ragkv.store import Item, TieredStore

# KV that wait to be written together: one transaction and one sync for all of them.
_WRITTEN_TOGETHER_BYTES = 64 << 20
# What records hold for changes with this number: their format, and how texts become ids.
_RULES = "1"
# Anchors, and namespaces with an anchor, of which something is kept: see Documents.within.
_READERS, _OTHERS = 8, 256
# How often reading begins anew because the model was changed meanwhile.
_TRIES = 3


class Documents(Cutting, Keeping):
    """Reads documents, once, and keeps their KV. Safe for several threads: reading takes the model for one piece at a time.

    Args:
        runner: of the model.
        encoder: turns passages into ids.
        store: where KV are kept.
        measured: what is measured of every document that is read.
        context, document_tokens, piece_tokens, namespace, foreign, kernels, graphs, lifetime_s: see :class:`~ragkv.Engine`.
        paths: what prompts computed of chunks; ``None`` where that is not kept.

    Attributes:
        document_tokens, piece_tokens: as given, or as model and device allow.
        steps: the model's forwards.
        sample: the ids of a fixed text, by which tokenizers are told apart.
    """

    def __init__(
        self,
        runner: Runner,
        encoder: Encoder,
        store: TieredStore,
        *,
        measured: Measured,
        context: str,
        document_tokens: int | None,
        piece_tokens: int | None,
        namespace: str,
        foreign: Text | None,
        kernels: Impl,
        graphs: bool | None,
        lifetime_s: float,
        paths: Paths | None,
    ):
        decoder = runner.decoder(kernels, store)
        Cutting.__init__(self, encoder, context, document_tokens, decoder.max_positions)
        Keeping.__init__(self, runner, store, encoder.anchor, lifetime_s)
        if piece_tokens is None:
            # A model in parts runs on the fullest device, too.
            devices = {decoder.device, *(spec.device for spec in decoder.specs)}
            free = min(free_bytes(device) or 0 for device in devices)
            piece_tokens = affordable(decoder, free - store.unclaimed_bytes)
        self.piece_tokens: int = whole_number("piece_tokens", piece_tokens, 1)
        self.kernels: Impl = kernels
        self.steps: Steps = runner.steps(kernels, graphs)
        self.measured: Measured = measured
        self._foreign_ids = foreign_ids(encoder, foreign)
        self._readers = dict[tuple[int, ...], Reader]()
        self.sample: tuple[int, ...] = encoder.chunk(FOREIGN) if encoder.tokenizer is not None else ()
        self._others = dict[tuple[str, tuple[int, ...]], Documents]()
        self.paths: Paths | None = paths
        self._cut_as(checked_namespace(namespace))

    def _cut_as(self, namespace: str) -> None:
        cutting = digest(_RULES, namespace, self.context, str(self.document_tokens), self.sample).hex()
        self._keep_as(namespace, cutting)

    @property
    def stores(self) -> set[TieredStore]:
        """That of chunks, and that of what prompts computed."""
        return {self.store} if self.paths is None else {self.store, self.paths.store}

    def within(self, namespace: str | None = None, anchor: Sequence[int] | None = None) -> Documents:
        """Documents of another namespace, or behind another anchor, for the same model and store; these by default.

        It costs next to nothing: what is kept for each anchor are its KV, for the last few.
        """
        key = (
            self.namespace if namespace is None else checked_namespace(namespace),
            self.anchor if anchor is None else tuple(anchor),
        )
        if key == (self.namespace, self.anchor):
            return self
        other = self._others.get(key)
        if other is None:
            other = copy(self)
            other.anchor = key[1]
            other._cut_as(key[0])
            # Of several threads all get the same: what one of them appends to its records, the others need.
            other = self._others.setdefault(key, other)
            keep_last(self._others, key, other, _OTHERS)
        return other

    def over(self, store: TieredStore, measured: Measured) -> Documents:
        """Documents read in the same way and kept in another store: nothing of them comes into this one."""
        other = copy(self)
        other.store, other.measured = store, measured
        other._readers, other._costs, other._others, other.paths = {}, {}, {}, None
        other._cut_as(self.namespace)
        return other

    def everywhere(self) -> list[Documents]:
        """These, and those of other namespaces and anchors that something is kept of."""
        return [self, *list(self._others.values())]

    @property
    def reader(self) -> Reader:
        """Reads with the model as it is now: weights and adapters may have changed since the last call."""
        fingerprint, reader = self.runner.fingerprint, self._readers.get(self.anchor)
        if reader is None or reader.fingerprint != fingerprint:
            reader = Reader(
                self.runner.decoder(self.kernels),
                self.anchor,
                self.piece_tokens,
                self._foreign_ids,
                self.steps,
                fingerprint,
                self.store if self.anchor == self.encoder.anchor else None,  # what every process needs
            )
            keep_last(self._readers, self.anchor, reader, _READERS)
        return reader

    def work(self, missing: Sequence[Chunk]) -> int:
        """Tokens that the model runs to read chunks: of each document from the first one on that is not stored."""
        wanted, tokens = {identity(chunk) for chunk in missing}, 0
        for chain in chains(missing, partial(lineage_of, records=self.records)):
            absent = set(map(identity, self.missing(chain))) | wanted
            first = next((number for number, chunk in enumerate(chain) if identity(chunk) in absent), len(chain))
            tokens += sum(map(len, chain[first:]))
        return tokens

    def add(self, chunks: Sequence[Chunk]) -> int:
        """Read those of the chunks that the store does not hold, each in its context, and store them.

        Returns:
            Tokens that were read.

        Raises:
            StoreFullError: a chunk does not fit into the store; those before it are stored.
        """
        for _ in range(_TRIES):
            with suppress(ModelChangedError):  # what was read of the former model is stored; now for the present one
                return self._add(chunks)
        return self._add(chunks)

    def _add(self, chunks: Sequence[Chunk]) -> int:
        self.look()
        reader, waiting = self.reader, dict[bytes, Item]()
        keys = {self.key(chunk, reader.space): chunk for chunk in chunks}
        missing = {key: keys[key] for key in self.store.missing(list(keys))}
        if missing and reader.fingerprint not in self._costs:
            self._costs[reader.fingerprint] = cost_profile(reader, self.store, self.document_tokens)
        size = tokens = 0
        try:
            for item in self.read(reader, list(missing.values()), waiting):
                waiting[item.key] = item
                tokens += len(item.kv)
                size += item.kv.nbytes
                if size >= _WRITTEN_TOGETHER_BYTES:
                    size = 0
                    self._put(reader, waiting)
        finally:
            try:
                self._put(reader, waiting)
            finally:
                self._settle(missing)
        return tokens

    def add_once(self, document: ChunkedDocument) -> int:
        """:meth:`add` for a whole document of which nothing is kept here but what it leaves in the store."""
        self.record(document)
        try:
            return self.add(list(document))
        finally:
            self.store.remove_many((), facts=[self._own_records.name(document.id)])

    @property
    def passes(self) -> int:
        """How often a document is read when it is added: twice where its tokens' sensitivity is measured."""
        return 2 if Measured.SENSITIVITY in self.measured else 1

    def look(self) -> None:
        """See whether the model is what it was; else there is another :attr:`reader`. Waits for the model."""
        with self.runner.turn():
            pass

    def read(
        self,
        reader: Reader,
        missing: Sequence[Chunk],
        waiting: Mapping[bytes, Item] | None = None,
        measured: Measured = Measured.NOTHING,
    ) -> Iterator[Item]:
        """Prefill chunks, each in its context, behind as much of its document's beginning as is stored, or waits to be.

        Args:
            reader: :attr:`reader`, the same for all of one undertaking.
            missing: which.
            waiting: what is about to be stored.
            measured: what is measured besides what is of every document.

        Raises:
            DocumentError: nothing says what a chunk was read behind.
            ModelChangedError: the model is not what it was when the reader was made.
        """
        waiting = {} if waiting is None else waiting
        ran = counting(lambda: self.work(missing))

        def known(chunk: Chunk) -> ChunkKV | None:
            key = self.key(chunk, reader.space)
            return waiting[key].kv if key in waiting else self.store.get(key)

        if missing:
            ran(missing[0].document, 0)
        lineage = partial(lineage_of, records=self.records)
        for chunk, kv, seconds in reader.read(missing, lineage, known, measured | self.measured, ran):
            yield self.item(reader, chunk, kv, seconds)

    def _put(self, reader: Reader, waiting: dict[bytes, Item]) -> None:
        """Store what waits."""
        items = list(waiting.values())
        waiting.clear()
        self.put(reader, items, self.store)
