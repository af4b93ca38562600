"""The engine: documents go in once, prompts over their stored keys and values come out."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from ragkv.chunk import Chunk, ChunkKV, digest
from ragkv.decoding import Settings, beam_search, decode
from ragkv.errors import PromptError, PromptTooLongError, RecordError, StoreFullError
from ragkv.fingerprint import model_fingerprint
from ragkv.fusion import fuse, plan
from ragkv.layout import Layout, Placed, lay_out
from ragkv.methods import Method, Reuse
from ragkv.model import Decoder
from ragkv.placement import Placement
from ragkv.prompt import Encoder, PromptTemplate, Text
from ragkv.reading import Reader, with_window
from ragkv.report import Answer, AnswerReport, FusedPrompt, FusionReport
from ragkv.store import Batch, TieredStore, chunk_key

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class Engine:
    """Answers over documents that the model has already read.

    An engine may be used from several threads; the model runs for one of them at a time. It never changes the model.

    Args:
        model: any transformers decoder with rotary positions, in eval mode.
        tokenizer: ``None`` where everything is given as token ids.
        store: where KV are kept; CPU memory by default.
        method: how prompts are put together, unless a call says otherwise; :class:`~ragkv.Reuse` by default.
        template: the prompt's parts; by default from the tokenizer's chat template, or a plain question-answer form.
        context: ``"document"``: chunks of a document are read behind its earlier text; ``"chunk"``: each one alone.
        document_tokens: a longer document is read in windows of at most this many tokens, each behind the last quarter of the
            one before. It bounds the memory of reading. Default: 8192, or the model's positions if fewer.
        piece_tokens: tokens of a document that one forward pass reads.
        namespace: chunks stored under another namespace are never found.

    Raises:
        UnsupportedModelError: the model cannot be driven exactly; the message says why.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        store: TieredStore | None = None,
        method: Method | None = None,
        template: PromptTemplate | None = None,
        context: str = "document",
        document_tokens: int | None = None,
        piece_tokens: int = 512,
        namespace: str = "",
    ):
        if context not in ("document", "chunk"):
            raise ValueError(f"context must be 'document' or 'chunk', got {context!r}")
        self.model, self.tokenizer, self.context, self.namespace = model, tokenizer, context, namespace
        self.method = _method(method or Reuse())
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
        self._prefix = self._reader.opening(self.encoder.prefix)
        self._lock = threading.RLock()

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
        chunks = [self._chunk(passage) for passage in _several(passages, "passages")]
        self._store_missing(chunks)
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
        self._store_missing(chunks)
        return chunks

    def cut_document(self, parts: Sequence[Text]) -> list[Chunk]:
        """The chunks of a document as :meth:`add_document` returns them, without reading anything.

        Args:
            parts: text or token ids each, in document order.

        Raises:
            PromptError, PromptTooLongError: as for :meth:`add`.
        """
        chunks = [self._chunk(part) for part in _several(parts, "parts")]
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

    def fuse(
        self, chunks: Sequence[Chunk | Text], question: Text, *, method: Method | None = None, room_tokens: int = 64
    ) -> FusedPrompt:
        """Put prefix, chunks and question together as one prompt, computing only what the method asks for.

        Chunks that the store has lost are read again, in the context that they had.

        Args:
            chunks: from :meth:`add` or :meth:`add_document`, in the order of the prompt; text or ids are added on the way. May be
                empty, and may hold a chunk twice.
            question: text or token ids; not empty.
            method: instead of the engine's.
            room_tokens: room that the cache keeps for an answer.

        Raises:
            PromptError: an empty question or chunk, or ids out of the vocabulary.
            PromptTooLongError: the prompt exceeds the model's positions.
        """
        begin = perf_counter()
        chosen = self.method if method is None else _method(method)
        suffix = self.encoder.suffix(question)
        known = [chunk if isinstance(chunk, Chunk) else self.add([chunk])[0] for chunk in _several(chunks, "chunks")]
        layout = lay_out(self.encoder.prefix, self.encoder.anchor, known, suffix, self.decoder.device)
        self._check_length(layout.tokens)
        with self._lock, torch.no_grad():
            try:
                return self._fuse(layout, chosen, room_tokens, begin)
            except RecordError as error:  # the store has dropped the damaged record: it is a miss now
                logger.warning("reading chunks again: %s", error)
                return self._fuse(layout, chosen, room_tokens, begin)

    def generate(
        self, chunks: Sequence[Chunk | Text], question: Text, *, method: Method | None = None, **generation: Any
    ) -> Answer:
        """Answer a question over chunks.

        Args:
            chunks: as for :meth:`fuse`.
            question: as for :meth:`fuse`.
            method: instead of the engine's.
            **generation: what ``model.generate`` takes: ``max_new_tokens``, ``do_sample``, ``stop_strings``, ``num_beams``, ...

        Raises:
            As :meth:`fuse`; ``ValueError`` for generation arguments that transformers refuses.
        """
        begin = perf_counter()
        settings, prompt = self._begin(chunks, question, method, generation)
        if settings.beams > 1:
            with self._lock:
                ids = beam_search(settings, prompt)
            report = AnswerReport(prompt.report, decode_ms=_ms(begin), new_tokens=len(ids))
            return Answer(self.encoder.decode(ids), ids, report)
        report, ids = AnswerReport(prompt.report), []
        for token in self._tokens(settings, prompt, report, begin):
            ids.append(token)
        return Answer(self.encoder.decode(ids), ids, report)

    def stream(
        self, chunks: Sequence[Chunk | Text], question: Text, *, method: Method | None = None, **generation: Any
    ) -> Iterator[str]:
        """Answer a question over chunks, piece by piece as text; the pieces joined are the answer's text.

        The prompt is fused when the first piece is asked for.

        Args:
            chunks: as for :meth:`fuse`.
            question: as for :meth:`fuse`.
            method: instead of the engine's.
            **generation: as for :meth:`generate`; no beams.

        Raises:
            As :meth:`generate`; PromptError where the engine has no tokenizer.
        """
        if self.tokenizer is None:
            raise PromptError("streaming yields text and the engine has no tokenizer: use generate()")
        begin = perf_counter()
        settings, prompt = self._begin(chunks, question, method, generation)
        if settings.beams > 1:
            raise ValueError("beam search knows its text only at the end: use generate()")
        ids, shown = [], ""
        for token in self._tokens(settings, prompt, AnswerReport(prompt.report), begin):
            ids.append(token)
            text = self.encoder.decode(ids)
            if text.startswith(shown) and not text.endswith("\ufffd"):  # half a character waits for its other half
                if len(text) > len(shown):
                    yield text[len(shown) :]
                shown = text
        rest = self.encoder.decode(ids)
        if len(rest) > len(shown):
            yield rest[len(shown) :]

    def close(self) -> None:
        """Close the store."""
        self.store.close()

    def __enter__(self) -> Engine:
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

    def _store_missing(self, chunks: Sequence[Chunk]) -> None:
        for chunk, kv, seconds in self._read(self.missing(chunks)):
            self.store.put(self.chunk_key(chunk), kv, space=self.space, cost_s=seconds, namespace=self.namespace)

    def _read(self, missing: Sequence[Chunk]) -> Iterator[tuple[Chunk, ChunkKV, float]]:
        """Prefill chunks, each in its context, as the stored beginning of its document allows."""
        if missing:
            with self._lock:
                yield from self._reader.read(missing, lambda chunk: self.store.get(self.chunk_key(chunk)))

    def _check_length(self, tokens: int) -> None:
        limit = self.decoder.max_positions
        if limit is not None and tokens > limit:
            raise PromptTooLongError(
                f"the prompt has {tokens} tokens, {tokens - limit} more than the model's {limit} positions: give fewer or shorter "
                "chunks"
            )

    def _fuse(self, layout: Layout, method: Method, room_tokens: int, begin: float) -> FusedPrompt:
        work = plan(method, layout, len(self.decoder.layers))
        report = FusionReport(
            method=repr(method),
            attention=self.decoder.attention,
            prefix_tokens=layout.chunks_start,
            chunk_tokens=layout.suffix_start - layout.chunks_start,
            suffix_tokens=layout.tokens - layout.suffix_start,
        )
        cache = self.decoder.cache(layout.tokens + room_tokens)
        placed = layout.chunks if work.uses_stored else ()
        keys = {self.chunk_key(item.chunk): item for item in placed}
        with self.store.read(list(keys)) as batch:
            start = perf_counter()
            fresh = self._keep(self._lost(keys, batch))
            read_ms = _ms(start) if fresh else 0.0
            placement = Placement(self.decoder, cache, layout, self._prefix, batch, list(keys), fresh, self.chunk_key)
            logits, trace = fuse(self.decoder, cache, layout, work, placement.layer)
            report.sources = placement.sources() if placed else ["unused"] * len(layout.chunks)
            report.bytes_read = batch.bytes_read
        report.hits = {source: report.sources.count(source) for source in sorted(set(report.sources))}
        report.attention, report.fresh_by_layer, report.budget = trace.attention, trace.fresh, trace.budget(layout)
        stages = {name: seconds * 1e3 for name, seconds in trace.seconds.items()}
        report.milliseconds = {"read": read_ms, **stages, "total": _ms(begin)}
        return FusedPrompt(layout.ids[None], logits, cache, trace.rows, report)

    def _lost(self, keys: dict[bytes, Placed], batch: Batch) -> list[Chunk]:
        """The chunks that the store does not hold; a record that is not what its key promises is dropped, and missing."""
        missing = []
        for (key, item), tier, base, tokens in zip(keys.items(), batch.tiers, batch.bases, batch.lengths, strict=True):
            if tier is not None and (base, tokens) == (item.base, len(item.chunk)):
                continue
            if tier is not None:
                self.store.remove(key)
            missing.append(item.chunk)
        return missing

    def _keep(self, missing: Sequence[Chunk]) -> dict[bytes, ChunkKV]:
        """Read what the store does not hold, store it if it fits, and keep it in hand for this prompt."""
        held: dict[bytes, ChunkKV] = {}
        for chunk, kv, seconds in self._read(missing):
            key = self.chunk_key(chunk)
            held[key] = kv
            try:
                self.store.put(key, kv, space=self.space, cost_s=seconds, namespace=self.namespace)
            except StoreFullError as error:
                logger.warning("a chunk of %d tokens is used but not stored: %s", len(chunk), error)
        return held

    def _begin(
        self, chunks: Sequence[Chunk | Text], question: Text, method: Method | None, generation: dict[str, Any]
    ) -> tuple[Settings, FusedPrompt]:
        settings = Settings(self.decoder, self.tokenizer, generation)
        return settings, self.fuse(chunks, question, method=method, room_tokens=settings.new_tokens)

    def _tokens(self, settings: Settings, prompt: FusedPrompt, report: AnswerReport, begin: float) -> Iterator[int]:
        tokens = decode(settings, prompt)
        while True:
            with self._lock:
                token = next(tokens, None)
            if token is None:
                return
            report.new_tokens += 1
            if report.new_tokens == 1:
                report.first_token_ms = _ms(begin)
            report.decode_ms = _ms(begin) - report.first_token_ms
            yield token


def _ms(begin: float) -> float:
    return (perf_counter() - begin) * 1e3


def _several(items: Sequence, what: str) -> Sequence:
    if isinstance(items, str):
        raise PromptError(f"{what} must be a list, got one string: write [{items[:20]!r}]")
    return items


def _method(method: Method) -> Method:
    if not isinstance(method, Method):
        raise TypeError(f"method must be a ragkv.Method, as ragkv.Reuse() or ragkv.LegoLink(k=16); got {method!r}")
    return method
