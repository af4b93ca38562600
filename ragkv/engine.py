"""The engine: documents go in once, prompts over their stored keys and values come out."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ragkv.chunk import Chunk, ChunkKV
from ragkv.errors import PromptError, PromptTooLongError, RecordError, whole_number
from ragkv.fusion.fuse import fuse, plan
from ragkv.fusion.layout import Layout, Placed, lay_out
from ragkv.fusion.placement import Placement
from ragkv.fusion.scene import Once, Scene
from ragkv.kernels import implementation
from ragkv.library.documents import Documents, several
from ragkv.methods import Auto, Method, SensitiveTokens
from ragkv.model.decoding import DEFAULT_NEW_TOKENS, Settings, beam_search, decode
from ragkv.model.runner import per_fingerprint
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
        reading.setdefault("sensitivity", self.method.measured)
        super().__init__(model, tokenizer, store=store, template=template, **reading)
        _ = self._prefix  # read now, not with the first question

    @per_fingerprint
    def _prefix(self) -> ChunkKV | None:
        return self._reader.opening(self.encoder.prefix)

    def fuse(
        self,
        chunks: Sequence[Chunk | Text],
        question: Text,
        *,
        method: Method | str | None = None,
        room_tokens: int | None = None,
    ) -> FusedPrompt:
        """Put prefix, chunks and question together as one prompt, computing only what the method asks for.

        Chunks that the store has lost are read again, in the context that they had.

        Args:
            chunks: from :meth:`add` or :meth:`add_document`, in the order of the prompt; text or ids are added on the way. May be
                empty, and may hold a chunk twice.
            question: text or token ids; not empty.
            method: instead of the engine's.
            room_tokens: room that the cache keeps for an answer; by default 64, or as much as the model's positions leave.

        Raises:
            PromptError: an empty question or chunk, or ids out of the vocabulary.
            PromptTooLongError: the prompt, and the room that was asked for, exceed the model's positions.
        """
        begin = perf_counter()
        if room_tokens is not None:
            whole_number("room_tokens", room_tokens)
        chosen = self.method if method is None else _method(method)
        suffix = self.encoder.suffix(question)
        known = [chunk if isinstance(chunk, Chunk) else self.add([chunk])[0] for chunk in several(chunks, "chunks")]
        layout = lay_out(self.encoder.prefix, self.encoder.anchor, known, suffix, self.decoder.device)
        room = self._room(layout.tokens, room_tokens)
        with self.runner.turn(), torch.no_grad():
            try:
                return self._fuse(layout, chosen, room, begin)
            except RecordError as error:  # the store has dropped the damaged record: it is a miss now
                logger.warning("reading chunks again: %s", error)
                return self._fuse(layout, chosen, room, begin)

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

    def _room(self, tokens: int, asked: int | None) -> int:
        """Room for an answer; its last token takes no position, for the model never runs it."""
        limit = self.decoder.max_positions
        if limit is not None and tokens > limit:
            raise PromptTooLongError(
                f"the prompt has {tokens} tokens, {tokens - limit} more than the model's {limit} positions: give fewer or shorter "
                "chunks"
            )
        left = None if limit is None else limit + 1 - tokens
        if left is None or (asked is not None and asked <= left):
            return DEFAULT_NEW_TOKENS if asked is None else asked
        if asked is not None:
            raise PromptTooLongError(
                f"the prompt's {tokens} tokens leave room for {left} more in the model's {limit} positions, and {asked} were asked "
                "for: give fewer or shorter chunks, or ask for a shorter answer"
            )
        return min(DEFAULT_NEW_TOKENS, left)

    def _fuse(self, layout: Layout, method: Method, room_tokens: int, begin: float) -> FusedPrompt:
        method, layers = method.pick(layout, self.depth), len(self.decoder.layers)
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
        keys = {self.chunk_key(item.chunk): item for item in placed}
        with self.store.read(list(keys)) as batch:
            start = perf_counter()
            fresh = self._keep(self._lost(keys, batch, method.measured), method.measured)
            read_ms = _ms(start) if fresh else 0.0
            held = {item.chunk: self.chunk_key(item.chunk) for item in placed}
            placement = Placement(self.decoder, cache, layout, self._prefix, self.store, batch, held, fresh)
            pieces, place, look_s = self._reader.piece_tokens, Once(placement.layer), 0.0
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
        report.hits = {source: report.sources.count(source) for source in sorted(set(report.sources))}
        report.attention, report.fresh_by_layer, report.budget = trace.attention, trace.fresh, trace.budget(layout)
        stages = {name: seconds * 1e3 for name, seconds in trace.seconds.items()}
        report.milliseconds = {"read": read_ms, **stages, "total": _ms(begin)}
        return FusedPrompt(layout.ids[None], logits, cache, trace.rows, report)

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
        return settings, self.fuse(chunks, question, method=method, room_tokens=settings.asked)

    def _tokens(self, settings: Settings, prompt: FusedPrompt, report: AnswerReport, begin: float) -> Iterator[int]:
        for token in decode(settings, prompt):  # each step is a turn of its own
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
