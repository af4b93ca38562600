"""One question's way from its prompt to its answer, whole or piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Event, Lock
from time import perf_counter
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ragkv.detokenizer import Detokenizer, cut, stop_texts
from ragkv.errors import CLOSED, ArgumentError, OfOneProcess, PromptError, RagKVError
from ragkv.library.documents import Documents
from ragkv.logprobs import Logprobs
from ragkv.model.cache import FusedCache
from ragkv.model.decoding import beam_search, decode
from ragkv.model.generation import Settings
from ragkv.model.rows import Rows
from ragkv.past import Past
from ragkv.report import Answer, AnswerReport, FusedPrompt, Structured
from ragkv.request import Room

if TYPE_CHECKING:
    from ragkv.model.schema import Schema
    from ragkv.retrieval import Hit

#: Makes the prompt: given are the tokens that the call asks for behind a prompt of so many, when the question began, what is undone
#: behind the answer, and how many copies that makes of the prompt's cache.
MakePrompt = Callable[[Room, float, ExitStack, int], FusedPrompt]


@dataclass
class Made:
    """What there is of an answer so far; see :class:`AnswerStream`."""

    token_ids: list[int] = field(default_factory=list)
    report: AnswerReport | None = None
    past: Past | None = None


class AnswerStream(Structured, Iterator[str], OfOneProcess, instead="read it where it was begun, and hand on its text"):
    """A generated answer, piece by piece; the pieces joined are its text. It ends where nobody holds it any more, and with a
    RagKVError where its engine was closed.

    Args:
        made: what there is so far.
        pieces: makes it.
        logprobs, schema: see the attributes.
        closing: set where its engine is closed.

    Attributes:
        sources, left_out: as of :class:`~ragkv.finding.SourcedAnswer`, where :meth:`RAG.stream` asked.
        text: the pieces so far.
        logprobs, schema: as of :class:`~ragkv.Answer`; ``logprobs`` grow with ``token_ids``.
    """

    def __init__(
        self,
        made: Made,
        pieces: Generator[str, None, None],
        logprobs: Logprobs | None,
        schema: Schema | None,
        closing: Event,
    ):
        self._made, self._pieces, self._closing = made, pieces, closing
        self.sources: list[Hit] = []
        self.left_out: list[Hit] = []
        self.logprobs: Logprobs | None = logprobs
        self.schema: Schema | None = schema
        self.text: str = ""
        self._reading = Lock()
        self._context = copy_context()  # who watches when it is made is told what is read later

    @property
    def token_ids(self) -> list[int]:
        """The ids generated so far, an end token and the ids of a stop text included."""
        return self._made.token_ids

    @property
    def report(self) -> AnswerReport | None:
        """What it cost so far; ``None`` until the first piece was asked for."""
        return self._made.report

    @property
    def past(self) -> Past | None:
        """As of :class:`~ragkv.Answer`, behind the last piece."""
        return self._made.past

    def __next__(self) -> str:
        if self._closing.is_set():
            self.close()
            raise RagKVError(CLOSED)
        return self._next()

    def to_the_end(self) -> Iterator[str]:
        """The pieces still to come, also where the engine is closed meanwhile."""
        with suppress(StopIteration):
            while True:
                yield self._next()

    def _next(self) -> str:
        with self._alone():
            piece = self._context.run(next, self._pieces)
            self.text += piece
        return piece

    def close(self) -> None:
        """End it here. Closing twice, or behind the last piece, is fine.

        Raises:
            RagKVError: another thread makes a piece just now.
        """
        with self._alone():
            self._pieces.close()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._reading.acquire(blocking=False):
            raise RagKVError(
                "a stream is for one thread at a time, and another one reads it: let that one read or close it"
            )
        try:
            yield
        finally:
            self._reading.release()


class Answering:
    """Decodes behind a prompt that is made when it is needed. All arguments are checked before anything is computed.

    Args:
        documents: of the engine.
        prompt: makes the prompt.
        stop: texts at which the answer ends, besides the template's.
        generation: what ``model.generate`` takes.
        closing: set where nobody is answered any more: what is read piece by piece ends.
        pieces: it is wanted piece by piece.
        kept: it is to be gone on from.

    Raises:
        PromptError, ArgumentError: what is asked for needs a tokenizer; beams for pieces, or for what is to be gone on from; and as
            :class:`~ragkv.model.generation.Settings`.
    """

    def __init__(
        self,
        documents: Documents,
        prompt: MakePrompt,
        stop: str | Sequence[str],
        generation: dict[str, Any],
        closing: Event,
        pieces: bool = False,
        kept: bool = False,
    ):
        steps, encoder = documents.steps, documents.encoder
        stop = (*stop_texts(encoder.template.stop), *stop_texts(stop))
        if pieces and encoder.tokenizer is None:
            raise PromptError("streaming yields text and the engine has no tokenizer: use generate()")
        if stop and encoder.tokenizer is None:
            raise ArgumentError(
                f"stop={stop} is text and the engine has no tokenizer: give it one, or stopping_criteria=[...]"
            )
        settings = Settings(steps.decoder, encoder.tokenizer, generation, stop)
        if settings.beams > 1 and (pieces or kept):
            why = "beam search knows its text only at the end" if pieces else "beams leave no cache to go on from"
            raise ArgumentError(f"num_beams: {why}: leave it out" + (", or use generate()" if pieces else ""))
        self._steps, self._encoder, self._settings, self._prompt = steps, encoder, settings, prompt
        self._closing = closing

    @property
    def room(self) -> Room:
        """Says how many tokens are asked for behind a prompt of so many."""
        return self._settings.asked

    def whole(self, begin: float) -> Answer:
        """The whole answer to a question that began at ``begin``, by beam search where several beams are asked for."""
        if self._settings.beams > 1:
            ids, report = self._searched(begin)
            return Answer(self.said(ids), ids, report, schema=self._settings.schema)
        stream = self.pieces(begin)
        for _ in stream.to_the_end():
            pass
        assert stream.report is not None
        text, ids = self.said(stream.token_ids), stream.token_ids
        return Answer(text, ids, stream.report, past=stream.past, logprobs=stream.logprobs, schema=stream.schema)

    def pieces(self, begin: float | None = None, ended: Callable[[Made], object] | None = None) -> AnswerStream:
        """The answer piece by piece; the prompt is made, and by default the question begins, when the first one is asked for.

        Args:
            begin: ``perf_counter()`` at which the question began.
            ended: called behind the last piece.
        """
        settings, made = self._settings, Made()
        logprobs = None if settings.logprobs is None else Logprobs(self._encoder.tokenizer, settings.logprobs)
        return AnswerStream(made, self._pieces(made, begin, logprobs, ended), logprobs, settings.schema, self._closing)

    def _pieces(
        self, made: Made, begin: float | None, logprobs: Logprobs | None, ended: Callable[[Made], object] | None
    ) -> Generator[str, None, None]:
        begin = perf_counter() if begin is None else begin
        text = Detokenizer(self._encoder, self._settings.stop)
        with ExitStack() as stack:
            prompt = self._prompt(self._settings.asked, begin, stack, 1)
            made.report = AnswerReport(prompt.report)
            # Closed before anybody goes on behind them.
            with closing(self._timed(prompt, made.report, begin, logprobs)) as tokens:
                for token in tokens:
                    made.token_ids.append(token)
                    piece = text.add(token)
                    if piece:
                        yield piece
                    if text.stopped:
                        break
            rest = text.rest()
            if rest:
                yield rest
            made.past = self._past(prompt, made.token_ids)
            if ended is not None:
                ended(made)

    def said(self, ids: Sequence[int]) -> str:
        """The text of an answer's ids."""
        return cut(self._encoder.decode(ids), self._settings.stop)

    def _past(self, prompt: FusedPrompt, ids: Sequence[int]) -> Past | None:
        """Prompt and answer, without what of the ids is no part of it: those of a stop text, and an end token, which the
        template writes behind an earlier answer where there is one.
        """
        if prompt.past is None:
            return None
        text, kept = self.said(ids), len(ids)
        while kept and not text.startswith(self._encoder.decode(ids[:kept])):
            kept -= 1
        rest = self._encoder.ids(text[len(self._encoder.decode(ids[:kept])) :])
        if kept and ids[kept - 1] in self._settings.ends:
            kept -= 1
        front = prompt.input_ids.shape[1]
        held = front + min(kept, len(ids) - 1)  # the last token was never run
        return replace(prompt.past, ids=(*prompt.past.ids, *ids[:kept], *rest), held=held)

    def _searched(self, begin: float) -> tuple[list[int], AnswerReport]:
        with ExitStack() as stack:
            prompt = self._prompt(self._settings.asked, begin, stack, self._settings.beams)
            fused_ms = _ms(begin)
            assert isinstance(prompt.past_key_values, FusedCache)
            self._steps.leave(prompt.past_key_values)  # each beam takes as much as the cache has
            with self._steps.turn_of(prompt.fingerprint):
                ids = beam_search(self._settings, prompt, begin)
            prompt.spoken(len(ids))
        return ids, AnswerReport(prompt.report, decode_ms=_ms(begin) - fused_ms, new_tokens=len(ids))

    def _timed(
        self, prompt: FusedPrompt, report: AnswerReport, begin: float, logprobs: Logprobs | None
    ) -> Generator[int, None, None]:
        note = None if logprobs is None else logprobs.note
        steps = self._steps
        assert isinstance(prompt.past_key_values, FusedCache)
        with steps.seat() as seat, steps.driving(prompt.past_key_values):

            def forward(rows: Rows) -> Tensor:
                logits = steps.run(rows, prompt.fingerprint, seat)
                report.ran = rows.ran
                return logits

            turn, graphs = partial(steps.turn_of, prompt.fingerprint), steps.graphs
            early = graphs is not None and graphs.early and not graphs.why and note is None
            for token in decode(self._settings, prompt, begin, forward, turn, note, early):
                report.new_tokens += 1
                if report.new_tokens == 1:
                    report.first_token_ms = _ms(begin)
                report.decode_ms = _ms(begin) - report.first_token_ms
                prompt.spoken(1)
                yield token


def _ms(begin: float) -> float:
    return (perf_counter() - begin) * 1e3
