"""Documents that a model has read, as chunks whose KV are in a store."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from time import perf_counter
from typing import TYPE_CHECKING, Self

import torch
from transformers import PreTrainedModel

from ragkv.chunk import Chunk, ChunkKV, digest
from ragkv.errors import PromptError, PromptTooLongError, StoreError, StoreFullError, whole_number
from ragkv.kernels import Impl
from ragkv.library.costs import cost_profile
from ragkv.library.depth import Depth
from ragkv.library.reading import Reader, with_window
from ragkv.library.repair import Repair, plan_repair, repaired
from ragkv.library.sensitivity import FOREIGN
from ragkv.model.runner import Runner, per_fingerprint
from ragkv.prompt import Encoder, PromptTemplate, Text
from ragkv.retrieval.records import text_key
from ragkv.store import CostProfile, Item, TieredStore, chunk_key

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# KV that wait to be written together: one transaction and one sync for all of them.
_WRITTEN_TOGETHER_BYTES = 64 << 20


class Documents:
    """Reads documents, once, and keeps their KV.

    Args:
        model: any transformers decoder with rotary positions, in eval mode.
        tokenizer: ``None`` where everything is given as token ids.
        store: where KV are kept; CPU memory by default.
        template: the prompt's parts; by default from the tokenizer's chat template, or a plain question-answer form.
        context: ``"document"``: chunks of a document are read behind its earlier text; ``"chunk"``: each one alone.
        document_tokens: a longer document is read in windows of at most this many tokens, each behind the last quarter of the
            one before. It bounds the memory of reading. Default: 8192, or the model's positions if fewer.
        piece_tokens: tokens that one forward pass computes; it bounds the memory that the model takes.
        namespace: chunks stored under another namespace are never found.
        sensitivity: measure how sensitive each token is to the text in front of its document, for methods that need it; every
            document is read twice for that. An engine does so if its own method needs it. Where a single call's method does,
            what was not measured is read again.
        kernels: which implementation of ``ragkv.kernels`` runs: ``"triton"``, ``"reference"``, or ``"auto"``: Triton on a GPU.
        foreign: text or ids of what documents are read behind the second time; by default five
            short English paragraphs (:mod:`ragkv.library.sensitivity`).

    Attributes:
        tokens_read: tokens of documents that the model has read since this object was made.

    Raises:
        UnsupportedModelError: the model cannot be driven exactly; the message says why.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        store: TieredStore | None = None,
        template: PromptTemplate | None = None,
        context: str = "document",
        document_tokens: int | None = None,
        piece_tokens: int = 512,
        namespace: str = "",
        sensitivity: bool = False,
        foreign: Text | None = None,
        kernels: Impl = "auto",
    ):
        if context not in ("document", "chunk"):
            raise ValueError(f"context must be 'document' or 'chunk', got {context!r}")
        self.model, self.tokenizer, self.context, self.namespace = model, tokenizer, context, namespace
        self.template = template or PromptTemplate.default(tokenizer)
        self.runner = Runner.of(model)
        self.decoder = self.runner.decoder(kernels)
        self.encoder = Encoder(self.template, tokenizer, self.decoder.vocab_size)
        self.store = TieredStore() if store is None else store
        room = (self.decoder.max_positions or 1 << 30) - len(self.encoder.anchor)
        if room < 1:
            raise PromptTooLongError(
                f"the anchor has {len(self.encoder.anchor)} tokens and leaves no room in the model's "
                f"{self.decoder.max_positions} positions: give a shorter prefix or anchor"
            )
        wanted = 8192 if document_tokens is None else whole_number("document_tokens", document_tokens, 1)
        self.document_tokens = min(wanted, room)
        self._measured = sensitivity
        self._piece_tokens, self._foreign_text = piece_tokens, self._foreign(foreign)
        _ = self._reader  # read now, not with the first question
        self.tokens_read = 0

    @property
    def model_fingerprint(self) -> str:
        """Of the model as it ran last, see :attr:`ragkv.model.runner.Runner.fingerprint`."""
        return self.runner.fingerprint

    @per_fingerprint
    def space(self) -> str:
        """What all KV depend on besides ids and context: the model as it runs, and the anchor. A part of every key."""
        return digest(self.runner.fingerprint, self.encoder.anchor).hex()

    @per_fingerprint
    def depth(self) -> Depth:
        """What methods ask about the model's depth."""
        return Depth(self._reader)

    @per_fingerprint
    def _reader(self) -> Reader:
        return Reader(self.decoder, self.encoder.anchor, self._piece_tokens, self._foreign_text)

    def refresh(self) -> None:
        """Look at every weight of the model again.

        Weights that were replaced or written in place, and adapters that were switched, merged or loaded are noticed without it.
        Writes that PyTorch does not count are not: call this after ``parameter.data.copy_(...)`` and the like.
        """
        self.runner.refresh()

    def add(self, passages: Sequence[Text]) -> list[Chunk]:
        """Read unrelated passages, each behind the anchor alone; what is stored already is not read again.

        Args:
            passages: text or token ids each.

        Returns:
            One chunk a passage, in order.

        Raises:
            PromptError: a passage is empty, or ids are out of the vocabulary.
            PromptTooLongError: a passage is longer than the model reads at once.
            StoreFullError: a chunk does not fit into the store; those before it are stored.
        """
        chunks = [self._chunk(passage) for passage in several(passages, "passages")]
        self.add_chunks(chunks)
        return chunks

    def add_document(self, parts: Sequence[Text]) -> list[Chunk]:
        """Read one document, given as its consecutive parts; each part becomes a chunk that knows the text before it.

        The document is prefilled as a whole, once, in pieces. Parts in front that are stored already are not read again.

        Args:
            parts: text or token ids each, in document order.

        Returns:
            One chunk a part, in order.

        Raises:
            PromptError, PromptTooLongError, StoreFullError: as for :meth:`add`.
        """
        chunks = self.cut_document(parts)
        self.add_chunks(chunks)
        return chunks

    def add_chunks(self, chunks: Sequence[Chunk]) -> None:
        """Read those of the chunks that the store does not hold, each in its context.

        Args:
            chunks: from :meth:`cut_document`, say.

        Raises:
            StoreFullError: a chunk does not fit into the store; those before it are stored.
        """
        waiting: dict[bytes, Item] = {}
        size = 0
        try:
            with self.runner.turn():  # by the model as it is now
                missing = self.missing(chunks)
            for item in self._read(missing, waiting):
                waiting[item.key] = item
                size += item.kv.nbytes
                if size >= _WRITTEN_TOGETHER_BYTES:
                    size = 0
                    self._put(waiting)
        finally:
            self._put(waiting)

    def repair_document(self, old: Sequence[Chunk], parts: Sequence[Text], behind_tokens: int = 32) -> list[Chunk]:
        """Read a changed document by computing only the changed parts and some tokens behind each (arXiv:2609.17983).

        An approximation: what stands further behind a change keeps what it knew of the text before. The chunks carry a mark, so
        that they are never taken for exact ones. A document of several windows, or one whose old KV are lost, is read as by
        :meth:`add_document`.

        Args:
            old: the chunks of the version before.
            parts: the version now, text or token ids each, in document order.
            behind_tokens: tokens to compute behind every change.

        Raises:
            PromptError, PromptTooLongError, StoreFullError: as for :meth:`add`.
        """
        whole_number("behind_tokens", behind_tokens)
        new = self.cut_document(parts)
        repair = plan_repair(old, new, behind_tokens) if self._one_window(old) and self._one_window(new) else None
        if repair is None or not self._repair(repair):
            self.add_chunks(new)
            return new
        return repair.chunks

    def cut_document(self, parts: Sequence[Text]) -> list[Chunk]:
        """The chunks of a document as :meth:`add_document` returns them, without reading anything.

        Args:
            parts: text or token ids each, in document order.

        Raises:
            PromptError, PromptTooLongError: as for :meth:`add`.
        """
        chunks = [self._chunk(part) for part in several(parts, "parts")]
        return with_window(chunks, self.document_tokens) if self.context == "document" else chunks

    def forget(self, chunks: Sequence[Chunk]) -> int:
        """Remove chunks' KV from the store; returns how many were there. A prompt that needs one reads it again."""
        return sum(self.store.remove(self.chunk_key(chunk)) for chunk in chunks)

    def missing(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """Those of the chunks that the store does not hold."""
        return [chunk for chunk in chunks if self.chunk_key(chunk) not in self.store]

    def chunk_key(self, chunk: Chunk) -> bytes:
        """The key of a chunk's KV in the store: space, namespace, ids and context."""
        return chunk_key(self.space, chunk.ids, chunk.context, self.namespace)

    def close(self) -> None:
        """Close the store."""
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _chunk(self, passage: Text) -> Chunk:
        chunk = Chunk(self.encoder.chunk(passage), passage if isinstance(passage, str) else None)
        if len(chunk) > self.document_tokens:
            raise PromptTooLongError(
                f"a passage of {len(chunk)} tokens is {len(chunk) - self.document_tokens} more than the "
                f"{self.document_tokens} that are read at once: split it into smaller parts"
            )
        return chunk

    def _foreign(self, given: Text | None) -> tuple[int, ...]:
        if given is not None:
            return self.encoder.chunk(given)
        if self.tokenizer is not None:
            return self.encoder.chunk(FOREIGN)
        draw = torch.randint(self.decoder.vocab_size, (64,), generator=torch.Generator().manual_seed(0))
        return self.encoder.chunk(draw.tolist())

    def _read(
        self, missing: Sequence[Chunk], waiting: Mapping[bytes, Item] | None = None, measured: bool = False
    ) -> Iterator[Item]:
        """Prefill chunks, each in its context, as the beginning of its document that is stored, or waits to be, allows."""
        waiting = {} if waiting is None else waiting

        def known(chunk: Chunk) -> ChunkKV | None:
            key = self.chunk_key(chunk)
            return waiting[key].kv if key in waiting else self.store.get(key)

        if missing:
            with self.runner.turn():
                for chunk, kv, seconds in self._reader.read(missing, known, measured or self._measured):
                    self.tokens_read += len(chunk)
                    yield self._item(chunk, kv, seconds)

    @cached_property
    def _costs(self) -> CostProfile | None:
        return cost_profile(self.decoder, self.store, self.model_fingerprint, self.document_tokens)

    def _item(self, chunk: Chunk, kv: ChunkKV, seconds: float) -> Item:
        """What is stored of a chunk: what it costs to compute behind its context, and the name of its passage.

        A namespace's passages are not named: whoever has the text could tell that it is there.
        """
        if self._costs is not None:
            seconds = self._costs(len(self.encoder.anchor) + chunk.offset, len(chunk))
        label = text_key(chunk.text).hex() if chunk.text and not self.namespace else ""
        return Item(self.chunk_key(chunk), kv, seconds, label)

    def _put(self, waiting: dict[bytes, Item]) -> None:
        """Store what waits, together; one by one where it does not fit together."""
        items = list(waiting.values())
        waiting.clear()
        if not items:
            return
        turns = self.decoder.rotations
        try:
            self.store.put_many(items, space=self.space, namespace=self.namespace, rotations=turns)
        except StoreFullError:
            if len(items) == 1:
                raise
            for item in items:
                self.store.put_many([item], space=self.space, namespace=self.namespace, rotations=turns)

    def _one_window(self, chunks: Sequence[Chunk]) -> bool:
        return self.context == "document" and all(b.offset == a.offset + len(a) for a, b in pairwise(chunks))

    def _repair(self, repair: Repair) -> bool:
        """Make and store the KV of a repaired document; ``False`` where old KV are lost."""
        begin = perf_counter()
        with self.runner.turn():
            made = repaired(self._reader, self.encoder.anchor, self.store, repair, self.chunk_key)
        if made is None:
            return False
        self.tokens_read += len(repair.rows)
        seconds = (perf_counter() - begin) / (len(self.encoder.anchor) + sum(map(len, repair.chunks)))
        items = [self._item(chunk, kv, seconds * len(chunk)) for chunk, kv in made]
        self._put({item.key: item for item in items})
        return True

    def _keep(self, missing: Sequence[Chunk], measured: bool = False) -> dict[bytes, ChunkKV]:
        """Read what the store does not hold, store it if it fits, and keep it in hand for this prompt."""
        held: dict[bytes, ChunkKV] = {}
        for item in self._read(missing, measured=measured):
            held[item.key] = item.kv
            try:
                self._put({item.key: item})
            except StoreError as error:  # full, or open for reading only
                logger.warning("a chunk of %d tokens is used but not stored: %s", len(item.kv), error)
        return held


def several(items: Sequence, what: str) -> Sequence:
    """A list, where one string would be taken for a list of characters."""
    if isinstance(items, str):
        raise PromptError(f"{what} must be a list, got one string: write [{items[:20]!r}]")
    return items
