"""The library: documents that a model has read, as chunks whose KV are in a store."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from itertools import pairwise
from time import perf_counter
from typing import TYPE_CHECKING, Self

import torch
from transformers import PreTrainedModel

from ragkv.chunk import Chunk, ChunkKV, digest
from ragkv.errors import PromptError, PromptTooLongError, StoreError
from ragkv.fingerprint import model_fingerprint
from ragkv.fusion import recompute
from ragkv.layout import Layout, Placed
from ragkv.model import Decoder
from ragkv.placement import Placement
from ragkv.prompt import Encoder, PromptTemplate, Text
from ragkv.reading import Reader, cut, with_window
from ragkv.repair import Repair, plan_repair
from ragkv.store import TieredStore, chunk_key

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class Library:
    """Reads documents, once, and keeps their KV.

    Args:
        model: any transformers decoder with rotary positions, in eval mode.
        tokenizer: ``None`` where everything is given as token ids.
        store: where KV are kept; CPU memory by default.
        template: the prompt's parts; by default from the tokenizer's chat template, or a plain question-answer form.
        context: ``"document"``: chunks of a document are read behind its earlier text; ``"chunk"``: each one alone.
        document_tokens: a longer document is read in windows of at most this many tokens, each behind the last quarter of the
            one before. It bounds the memory of reading. Default: 8192, or the model's positions if fewer.
        piece_tokens: tokens of a document that one forward pass reads.
        namespace: chunks stored under another namespace are never found.

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
    ):
        if context not in ("document", "chunk"):
            raise ValueError(f"context must be 'document' or 'chunk', got {context!r}")
        self.model, self.tokenizer, self.context, self.namespace = model, tokenizer, context, namespace
        self.template = template or PromptTemplate.default(tokenizer)
        self.decoder = Decoder(model)
        self.encoder = Encoder(self.template, tokenizer, self.decoder.vocab_size)
        self.store = TieredStore() if store is None else store
        self.model_fingerprint = model_fingerprint(
            model, self.decoder.config, self.decoder.dtype, self.decoder.attention
        )
        self.space = digest(self.model_fingerprint, self.encoder.anchor).hex()
        room = (self.decoder.max_positions or 1 << 30) - len(self.encoder.anchor)
        self.document_tokens = min(document_tokens or 8192, room)
        self._reader = Reader(self.decoder, self.encoder.anchor, piece_tokens)
        self._lock = threading.RLock()
        self.tokens_read = 0

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
        for chunk, kv, seconds in self._read(self.missing(chunks)):
            self.store.put(self.chunk_key(chunk), kv, space=self.space, cost_s=seconds, namespace=self.namespace)

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
        if behind_tokens < 0:
            raise ValueError(f"behind_tokens must be >= 0, got {behind_tokens}")
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

    def _read(self, missing: Sequence[Chunk]) -> Iterator[tuple[Chunk, ChunkKV, float]]:
        """Prefill chunks, each in its context, as the stored beginning of its document allows."""
        if missing:
            with self._lock:
                for chunk, kv, seconds in self._reader.read(
                    missing, lambda chunk: self.store.get(self.chunk_key(chunk))
                ):
                    self.tokens_read += len(chunk)
                    yield chunk, kv, seconds

    def _one_window(self, chunks: Sequence[Chunk]) -> bool:
        return self.context == "document" and all(b.offset == a.offset + len(a) for a, b in pairwise(chunks))

    def _repair(self, repair: Repair) -> bool:
        """Make and store the KV of a repaired document; ``False`` where old KV are lost."""
        anchor = len(self.encoder.anchor)
        placed = [
            Placed(chunk, anchor + chunk.offset, anchor + (source or chunk).offset, exact=False, continues=False)
            for chunk, source in zip(repair.chunks, repair.sources, strict=True)
        ]
        ids = [*self.encoder.anchor, *(i for chunk in repair.chunks for i in chunk.ids)]
        layout = Layout(torch.tensor(ids, device=self.decoder.device), tuple(placed), anchor, len(ids))
        sources = {chunk: source for chunk, source in zip(repair.chunks, repair.sources, strict=True) if source}
        keys = {chunk: self.chunk_key(source) for chunk, source in sources.items()}
        begin = perf_counter()
        with self._lock, torch.no_grad(), self.store.read(list(keys.values())) as batch:
            if None in batch.tiers:
                return False
            cache = self.decoder.cache(len(ids))
            placement = Placement(self.decoder, cache, layout, self._reader.anchor, self.store, batch, keys, {})
            for layer in range(len(self.decoder.layers)):
                placement.layer(layer)
            recompute(self.decoder, cache, layout.ids, (anchor + repair.rows).to(self.decoder.device))
            cache.set_length(len(ids))
        self.tokens_read += len(repair.rows)
        cost = (perf_counter() - begin) / len(ids)
        for item in placed[repair.first :]:
            kv = cut(cache, item.start, item.stop)
            key, seconds = self.chunk_key(item.chunk), cost * len(item.chunk)
            self.store.put(key, kv, space=self.space, cost_s=seconds, namespace=self.namespace)
        return True

    def _keep(self, missing: Sequence[Chunk]) -> dict[bytes, ChunkKV]:
        """Read what the store does not hold, store it if it fits, and keep it in hand for this prompt."""
        held: dict[bytes, ChunkKV] = {}
        for chunk, kv, seconds in self._read(missing):
            key = self.chunk_key(chunk)
            held[key] = kv
            try:
                self.store.put(key, kv, space=self.space, cost_s=seconds, namespace=self.namespace)
            except StoreError as error:  # full, or open for reading only
                logger.warning("a chunk of %d tokens is used but not stored: %s", len(chunk), error)
        return held


def several(items: Sequence, what: str) -> Sequence:
    """A list, where one string would be taken for a list of characters."""
    if isinstance(items, str):
        raise PromptError(f"{what} must be a list, got one string: write [{items[:20]!r}]")
    return items
