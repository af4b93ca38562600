"""The engine: documents go in once, prompts over their stored keys and values come out."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ragkv.chunk import Chunk, ChunkKV
from ragkv.errors import PromptError, PromptTooLongError, RecordError
from ragkv.fusion.fuse import fuse, plan
from ragkv.fusion.layout import Layout, Placed, lay_out
from ragkv.fusion.placement import Placement
from ragkv.fusion.scene import Once, Scene
from ragkv.kernels import Impl, implementation
from ragkv.library.depth import Depth
from ragkv.library.documents import Documents, several
from ragkv.methods import Auto, Method, SensitiveTokens
from ragkv.model.decoder import Decoder
from ragkv.model.decoding import Settings, beam_search, decode
from ragkv.model.runner import Runner
from ragkv.prompt import Encoder, PromptTemplate, Text
from ragkv.report import Answer, AnswerReport, AnswerStream, FusedPrompt, FusionReport
from ragkv.store import Batch, Item, TieredStore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class Engine:
    """Answers over documents that the model has already read.

    An engine may be used from several threads; the model runs for one of them at a time, a piece of reading or a question each.
    It never changes the model.

    Args:
        model: any transformers decoder with rotary positions, in eval mode.
        tokenizer: ``None`` where everything is given as token ids.
        store: where KV are kept; CPU memory by default.
        method: how prompts are put together, unless a call says otherwise; :class:`~ragkv.SensitiveTokens` by default.
        template: the prompt's parts; by default from the tokenizer's chat template, or a plain question-answer form.
        context: ``"document"``: chunks of a document are read behind its earlier text; ``"chunk"``: each one alone.
        document_tokens: a longer document is read in windows of at most this many tokens, each behind the last quarter of the
            one before. It bounds the memory of reading. Default: 8192, or the model's positions if fewer.
        piece_tokens: tokens that one forward pass computes; it bounds the memory that the model takes.
        namespace: chunks stored under another namespace are never found.
        sensitivity: measure how sensitive each token is to the text in front of its document, for methods that need it; every
            document is read twice for that. By default if ``method`` does. Where a single call's method does, what was not
            measured is read again.
        foreign: text or ids of what documents are read behind the second time; by default five short English paragraphs
            (:mod:`ragkv.library.sensitivity`). With another text they are measured anew.
        kernels: which implementation of ``ragkv.kernels`` runs: ``"triton"``, ``"reference"``, or ``"auto"``: Triton on a GPU.

    Attributes:
        documents: what the model has read, see :class:`~ragkv.library.documents.Documents`.
        encoder: turns text into ids.

    Raises:
        UnsupportedModelError: the model cannot be driven exactly; the message says why.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        store: TieredStore | None = None,
        method: Method | str | None = None,
        template: PromptTemplate | None = None,
        context: str = "document",
        document_tokens: int | None = None,
        piece_tokens: int = 512,
        namespace: str = "",
        sensitivity: bool | None = None,
        foreign: Text | None = None,
        kernels: Impl = "auto",
    ):
        self.method = _method(SensitiveTokens() if method is None else method)
        self.model, self.tokenizer = model, tokenizer
        self.template = template or PromptTemplate.default(tokenizer)
        self.store = TieredStore() if store is None else store
        self.runner = Runner.of(model)
        vocab_size = self.runner.decoder(kernels).vocab_size
        self.encoder = Encoder(self.template, tokenizer, vocab_size)
        self.documents = Documents(
            self.runner,
            self.encoder,
            self.store,
            context=context,
            document_tokens=document_tokens,
            piece_tokens=piece_tokens,
            namespace=namespace,
            sensitivity=self.method.measured if sensitivity is None else sensitivity,
            foreign=foreign,
            kernels=kernels,
        )
        self.documents.reader.opening(self.encoder.prefix)

    @property
    def decoder(self) -> Decoder:
        """The model as fusion sees it."""
        return self.documents.reader.decoder

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
        chunks = [self.documents.passage(passage) for passage in several(passages, "passages")]
        self.documents.add(chunks)
        return chunks

    def add_document(self, parts: Sequence[Text], *, document_id: str = "") -> list[Chunk]:
        """Read one document, given as its consecutive parts; each part becomes a chunk that knows the text before it.

        The document is prefilled as a whole, once, in pieces. Parts in front that are stored already are not read again.

        Args:
            parts: text or token ids each, in document order.
            document_id: what it is known by, so that it may change and stay the same document; by default a digest of its ids.

        Returns:
            One chunk a part, in order.

        Raises:
            PromptError, PromptTooLongError, StoreFullError: as for :meth:`add`.
        """
        document = self.documents.cut(parts, document_id)
        self.documents.record(document)
        chunks = list(document)
        self.documents.add(chunks)
        return chunks

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
        document = self.documents.cut(parts, old[0].document if old else "")
        repair = self.documents.plan_repair(old, document, behind_tokens)
        if repair is not None and self.documents.repair(repair) is not None:
            document = repair.document
        self.documents.record(document)
        self.documents.add(list(document))
        return list(document)

    def forget(self, chunks: Sequence[Chunk]) -> int:
        """Remove chunks' KV from the store, and the records of their documents; returns how many KV were there.

        A prompt that needs one of them computes it, and does not store it, until its document is added again.
        """
        return self.documents.forget(chunks)

    def close(self) -> None:
        """Close the store."""
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def fuse(
        self,
        chunks: Sequence[Chunk | Text],
        question: Text,
        *,
        method: Method | str | None = None,
        room_tokens: int = 64,
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
        known = self._chunks(chunks)
        layout = lay_out(self.encoder.prefix, self.encoder.anchor, known, suffix, self.decoder.device)
        self._check_length(layout.tokens)
        with self.runner.turn(), torch.no_grad():
            try:
                return self._fuse(layout, chosen, room_tokens, begin)
            except RecordError as error:  # the store has dropped the damaged record: it is a miss now
                logger.warning("reading chunks again: %s", error)
                return self._fuse(layout, chosen, room_tokens, begin)

    def generate(
        self, chunks: Sequence[Chunk | Text], question: Text, *, method: Method | str | None = None, **generation: Any
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
            with self.runner.turn():
                ids = beam_search(settings, prompt)
            report = AnswerReport(prompt.report, decode_ms=_ms(begin), new_tokens=len(ids))
            return Answer(self.encoder.decode(ids), ids, report)
        report, ids = AnswerReport(prompt.report), []
        for token in self._tokens(settings, prompt, report, begin):
            ids.append(token)
        return Answer(self.encoder.decode(ids), ids, report)

    def stream(
        self, chunks: Sequence[Chunk | Text], question: Text, *, method: Method | str | None = None, **generation: Any
    ) -> AnswerStream:
        """Answer a question over chunks, piece by piece as text.

        The prompt is fused when the first piece is asked for.

        Args:
            chunks: as for :meth:`fuse`.
            question: as for :meth:`fuse`.
            method: instead of the engine's.
            **generation: as for :meth:`generate`; no beams.

        Returns:
            The pieces; joined they are the answer's text. Its ``report`` and ``token_ids`` grow with them.

        Raises:
            As :meth:`generate`, when the first piece is asked for; PromptError where the engine has no tokenizer.
        """
        if self.tokenizer is None:
            raise PromptError("streaming yields text and the engine has no tokenizer: use generate()")

        def start() -> tuple[AnswerReport, Iterator[int]]:
            begin = perf_counter()
            settings, prompt = self._begin(chunks, question, method, generation)
            if settings.beams > 1:
                raise ValueError("beam search knows its text only at the end: use generate()")
            report = AnswerReport(prompt.report)
            return report, self._tokens(settings, prompt, report, begin)

        return AnswerStream(start, self.encoder.decode)

    def _chunks(self, chunks: Sequence[Chunk | Text]) -> list[Chunk]:
        """Chunks as they are; text and ids as passages that stand alone, all of which are added together."""
        given = several(chunks, "chunks")
        fresh = iter(self.add([chunk for chunk in given if not isinstance(chunk, Chunk)]))
        return [chunk if isinstance(chunk, Chunk) else next(fresh) for chunk in given]

    def _check_length(self, tokens: int) -> None:
        limit = self.decoder.max_positions
        if limit is not None and tokens > limit:
            raise PromptTooLongError(
                f"the prompt has {tokens} tokens, {tokens - limit} more than the model's {limit} positions: give fewer or shorter "
                "chunks"
            )

    def _fuse(self, layout: Layout, method: Method, room_tokens: int, begin: float) -> FusedPrompt:
        method, layers = method.pick(layout, Depth(self.documents.reader)), len(self.decoder.layers)
        work = None if method.looks else plan(method, layout, layers)
        report = FusionReport(
            method=repr(method),
            attention=self.decoder.attention,
            kernels=implementation(self.decoder.kernels, self.decoder.device, self.decoder.dtype),
            prefix_tokens=layout.chunks_start,
            chunk_tokens=layout.suffix_start - layout.chunks_start,
            suffix_tokens=layout.tokens - layout.suffix_start,
        )
        cache = self.decoder.cache(layout.tokens + room_tokens)
        placed = layout.chunks if work is None or work.uses_stored else ()
        keys = {self.documents.key(item.chunk): item for item in placed}
        with self.store.read(list(keys)) as batch:
            start = perf_counter()
            fresh, items = self._read(self._lost(keys, batch, method.measured), method.measured)
            read_ms = _ms(start) if fresh else 0.0
            held = {item.chunk: self.documents.key(item.chunk) for item in placed}
            placement = Placement(
                self.decoder,
                cache,
                layout,
                self.documents.reader.opening(self.encoder.prefix),
                self.store,
                batch,
                held,
                fresh,
            )
            pieces, place, look_s = self.documents.reader.piece_tokens, Once(placement.layer), 0.0
            if work is None:
                start = perf_counter()
                scene = Scene(self.decoder, cache, layout, pieces, place, self._sensitivities(layout, batch, fresh))
                work = plan(method, layout, layers, scene)
                report.looked = scene.looked
                look_s = perf_counter() - start - place.seconds
            looked_place_s = place.seconds
            logits, trace = fuse(self.decoder, cache, layout, work, pieces, place)
            trace.seconds["select"] += look_s
            trace.seconds["place"] += looked_place_s
            report.sources = placement.sources() if placed else ["unused"] * len(layout.chunks)
            report.bytes_read = placement.bytes_read
        if items:
            self.documents.keep(items, {key: item.chunk for key, item in keys.items()})
        report.hits = {source: report.sources.count(source) for source in sorted(set(report.sources))}
        report.attention, report.fresh_by_layer, report.budget = trace.attention, trace.fresh, trace.budget(layout)
        stages = {name: seconds * 1e3 for name, seconds in trace.seconds.items()}
        report.milliseconds = {"read": read_ms, **stages, "total": _ms(begin)}
        return FusedPrompt(layout.ids[None], logits, cache, trace.rows, report)

    def _sensitivities(self, layout: Layout, batch: Batch, fresh: dict[bytes, ChunkKV]) -> list[Tensor | None]:
        known = dict(zip(batch.keys, batch.sensitivities, strict=True))
        keys = [self.documents.key(item.chunk) for item in layout.chunks]
        return [fresh[key].sensitivity if key in fresh else known[key] for key in keys]

    def _lost(self, keys: dict[bytes, Placed], batch: Batch, measured: bool) -> list[Chunk]:
        """The chunks that the store does not hold, or not with the sensitivity that is needed.

        A record that is not what its key promises is dropped, and missing.
        """
        missing, broken, foreign = [], [], self.documents.reader.foreign
        found = zip(batch.tiers, batch.bases, batch.lengths, batch.foreigns, strict=True)
        for (key, item), (tier, base, tokens, measured_with) in zip(keys.items(), found, strict=True):
            intact = tier is not None and (base, tokens) == (item.base, len(item.chunk))
            if intact and (measured_with == foreign or not measured):
                continue
            if tier is not None and not intact:
                broken.append(key)
            missing.append(item.chunk)
        if broken:
            self.store.remove_many(broken)
        return missing

    def _read(self, missing: Sequence[Chunk], measured: bool) -> tuple[dict[bytes, ChunkKV], list[Item]]:
        """The KV of chunks that the store does not hold, by key; and what may be stored once the prompt is ready."""
        items = list(self.documents.read(missing, measured=measured))
        return {item.key: item.kv for item in items}, items

    def _begin(
        self, chunks: Sequence[Chunk | Text], question: Text, method: Method | str | None, generation: dict[str, Any]
    ) -> tuple[Settings, FusedPrompt]:
        settings = Settings(self.decoder, self.tokenizer, generation)
        return settings, self.fuse(chunks, question, method=method, room_tokens=settings.new_tokens)

    def _tokens(self, settings: Settings, prompt: FusedPrompt, report: AnswerReport, begin: float) -> Iterator[int]:
        tokens = decode(settings, prompt)
        while True:
            with self.runner.turn():
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


def _method(method: Method | str) -> Method:
    if method == "auto":
        return Auto()
    if not isinstance(method, Method):
        raise TypeError(
            f"method must be a ragkv.Method, as ragkv.Reuse() or ragkv.LegoLink(k=16), or 'auto'; got {method!r}"
        )
    return method
