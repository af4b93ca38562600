"""The engine: documents go in once, prompts over their stored keys and values come out."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cached_property
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ragkv.chunk import Chunk, ChunkKV
from ragkv.errors import PromptError, PromptTooLongError, RecordError
from ragkv.fusion.fuse import fuse, plan
from ragkv.fusion.layout import Layout, Placed, lay_out
from ragkv.fusion.looking import Looking
from ragkv.fusion.placement import Placement
from ragkv.fusion.timing import Timer, clock
from ragkv.fusion.view import Selection, View
from ragkv.kernels import implementation
from ragkv.library.depth import check_layer
from ragkv.library.documents import Documents, several
from ragkv.methods import Auto, Method, SensitiveTokens
from ragkv.model.cache import FusedCache
from ragkv.model.decoding import Settings, beam_search, decode
from ragkv.prompt import PromptTemplate, Text
from ragkv.report import Answer, AnswerReport, AnswerStream, FusedPrompt, FusionReport
from ragkv.store import Batch, TieredStore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class Engine(Documents):
    """Answers over documents that the model has already read.

    An engine may be used from several threads; the model runs for one of them at a time. It never changes the model.

    Args:
        model: any transformers decoder with rotary positions, in eval mode.
        tokenizer: ``None`` where everything is given as token ids.
        store: where KV are kept; CPU memory by default.
        method: how prompts are put together, unless a call says otherwise; :class:`~ragkv.SensitiveTokens` by default.
        template: the prompt's parts; by default from the tokenizer's chat template, or a plain question-answer form.
        **reading: ``context``, ``document_tokens``, ``piece_tokens``, ``namespace``, ``sensitivity``, ``foreign``, ``kernels``:
            see :class:`~ragkv.documents.Documents`.

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
        **reading: Any,
    ):
        self.method = _method(SensitiveTokens() if method is None else method)
        reading.setdefault("sensitivity", self.method.needs_sensitivity)
        super().__init__(model, tokenizer, store=store, template=template, **reading)
        self._prefix = self._reader.opening(self.encoder.prefix)

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
        known = [chunk if isinstance(chunk, Chunk) else self.add([chunk])[0] for chunk in several(chunks, "chunks")]
        layout = lay_out(self.encoder.prefix, self.encoder.anchor, known, suffix, self.decoder.device)
        self._check_length(layout.tokens)
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
            with self._lock:
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

    def _check_length(self, tokens: int) -> None:
        limit = self.decoder.max_positions
        if limit is not None and tokens > limit:
            raise PromptTooLongError(
                f"the prompt has {tokens} tokens, {tokens - limit} more than the model's {limit} positions: give fewer or shorter "
                "chunks"
            )

    @torch.no_grad()
    def _fuse(self, layout: Layout, method: Method, room_tokens: int, begin: float) -> FusedPrompt:
        """One prompt. The store drops records that prove damaged: those are read again, and as often as there are such."""
        for _ in layout.chunks:
            try:
                return self._fuse_once(layout, method, room_tokens, begin)
            except RecordError as error:
                if not self.missing([placed.chunk for placed in layout.chunks]):
                    raise  # it was not dropped
                logger.warning("reading chunks again: %s", error)
        return self._fuse_once(layout, method, room_tokens, begin)

    def _fuse_once(self, layout: Layout, method: Method, room_tokens: int, begin: float) -> FusedPrompt:
        decoder, pieces, layers = self.decoder, self._reader.piece_tokens, len(self.decoder.layers)
        timer = Timer(clock([decoder.device, *(spec.device for spec in decoder.specs)]), begin)
        cache = decoder.cache(layout.tokens + room_tokens)
        placement: Placement | None = None

        def opened() -> Placement:
            nonlocal placement
            if placement is None:
                placement = self._open(layout, cache, method.needs_sensitivity, timer, stack)
            return placement

        def sensitivity() -> list[Tensor | None]:
            return self._sensitivities(layout, opened().batch, opened().fresh)

        looking = Looking(decoder, cache, layout, pieces, opened, self._turn, sensitivity, lambda: self._check_layer)
        with ExitStack() as stack:
            with timer.stage("select"):
                selection = Selection.of(method.select(View(layout, layers, looking)), method)
                work = plan(selection, layout, layers)
            first = work.first_stored
            if first < layers:
                opened().ahead(first)
            with self._turn(), placement.beside(first) if placement else nullcontext(), timer.stage("compute"):
                logits, done = fuse(decoder, cache, layout, work, pieces, timer)
        sources = placement.sources() if placement else ["unused"] * len(layout.chunks)
        report = FusionReport(
            method=selection.name,
            attention=done.attention,
            kernels=implementation(decoder.kernels, decoder.device, decoder.dtype),
            prefix_tokens=layout.chunks_start,
            chunk_tokens=layout.suffix_start - layout.chunks_start,
            suffix_tokens=layout.tokens - layout.suffix_start,
            hits={source: sources.count(source) for source in sorted(set(sources))},
            sources=sources,
            bytes_read=placement.bytes_read if placement else 0,
            budget=done.budget,
            fresh_by_layer=done.fresh,
            looked=looking.looked,
            timer=timer,
        )
        return FusedPrompt(layout.ids[None], logits, cache, done.rows, report)

    def _open(self, layout: Layout, cache: FusedCache, measured: bool, timer: Timer, stack: ExitStack) -> Placement:
        """Open a prompt's chunks in the store, and read those that are missing."""
        with timer.stage("place"):
            keys = {self.chunk_key(item.chunk): item for item in layout.chunks}
            batch = stack.enter_context(self.store.read(list(keys)))
            lost = self._lost(keys, batch, measured)
        fresh: dict[bytes, ChunkKV] = {}
        if lost:
            with timer.stage("read"):
                fresh = self._keep(lost, measured)
        held = {item.chunk: self.chunk_key(item.chunk) for item in layout.chunks}
        return Placement(self.decoder, cache, layout, self._prefix, batch, held, fresh, timer)

    def _turn(self) -> AbstractContextManager[Any]:
        """The right to run the model."""
        return self._lock

    @cached_property
    def _check_layer(self) -> int:
        with self._turn():
            return check_layer(self._reader.changes())

    def _sensitivities(self, layout: Layout, batch: Batch, fresh: dict[bytes, ChunkKV]) -> list[Tensor | None]:
        known = dict(zip(batch.keys, batch.sensitivities, strict=True))
        keys = [self.chunk_key(item.chunk) for item in layout.chunks]
        return [fresh[key].sensitivity if key in fresh else known[key] for key in keys]

    def _lost(self, keys: dict[bytes, Placed], batch: Batch, measured: bool) -> list[Chunk]:
        """The chunks that the store does not hold, or not with the sensitivity that is needed.

        A record that is not what its key promises is dropped, and missing.
        """
        missing = []
        found = zip(batch.tiers, batch.bases, batch.lengths, batch.sensitivities, strict=True)
        for (key, item), (tier, base, tokens, sensitivity) in zip(keys.items(), found, strict=True):
            intact = tier is not None and (base, tokens) == (item.base, len(item.chunk))
            if intact and not (measured and sensitivity is None):
                continue
            if tier is not None and not intact:
                self.store.remove(key)
            missing.append(item.chunk)
        return missing

    def _begin(
        self, chunks: Sequence[Chunk | Text], question: Text, method: Method | str | None, generation: dict[str, Any]
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


def _method(method: Method | str) -> Method:
    if method == "auto":
        return Auto()
    if not isinstance(method, Method):
        raise TypeError(
            f"method must be a ragkv.Method, as ragkv.Reuse() or ragkv.LegoLink(k=16), or 'auto'; got {method!r}"
        )
    return method
