"""Questions over documents: passages are found, a prompt of them is made, perhaps begun meanwhile, and answered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from time import perf_counter
from typing import Any, cast

from ragkv.answering import Answering, AnswerStream
from ragkv.engine import Engine
from ragkv.errors import ArgumentError
from ragkv.finding import Finder, Found, SourcedAnswer, known, streamed
from ragkv.library.documents import Documents
from ragkv.library.watching import Tell, prefetched, told_of_hits
from ragkv.messages import Question, conversation, last_turns
from ragkv.report import FusedPrompt
from ragkv.request import Request, Room, scheduling
from ragkv.retrieval import Hit, Retrieval
from ragkv.speculation import Ahead, Speculation

Messages = Sequence[Mapping[str, Any]]


class Asking:
    """Asks over a RAG's documents.

    Args:
        engine: answers.
        finder: finds passages.
    """

    def __init__(self, engine: Engine, finder: Finder):
        self._engine, self._finder = engine, finder
        self._ahead = Ahead(engine, finder)

    def whole(
        self, question: str | None, messages: Messages | None, tell: Tell | None, **options: Any
    ) -> SourcedAnswer:
        """The answer; arguments as of :meth:`ragkv.RAG.ask`."""
        asked, answering = self._asked(question, messages, tell, options)
        try:
            with told_of_hits(tell, asked.found.hits), prefetched(asked.begun.moved):
                return SourcedAnswer.of(answering.whole(perf_counter()), asked.found)
        finally:
            asked.begun.drop()

    def pieces(
        self, question: str | None, messages: Messages | None, tell: Tell | None, **options: Any
    ) -> tuple[list[Hit], AnswerStream]:
        """The passages, and the answer piece by piece."""
        asked, answering = self._asked(question, messages, tell, options, pieces=True)
        return streamed(asked.found, asked.documents, tell, answering.pieces, asked.begun.moved)

    def close(self) -> None:
        """Give up what was begun. Closing twice is fine."""
        self._ahead.close()

    def _asked(
        self,
        question: str | None,
        messages: Messages | None,
        tell: Tell | None,
        options: dict[str, Any],
        pieces: bool = False,
    ) -> tuple[_Asked, Answering]:
        """A question whose passages are found and whose arguments are checked, and what answers it."""
        retrieval, options = Retrieval.split(options)
        if (question is None) == (messages is None):
            raise ArgumentError("give a question or messages=[...], one of the two")
        text, system, namespace = question, options.pop("system", None), options.pop("namespace", None)
        within = system
        if isinstance(messages, Iterator):  # which gives them only once
            messages = list(messages)
        if messages is not None:
            within, said = conversation(messages, system)
            text = last_turns(said)
        request = Request(
            chunks=(),
            question=cast(Question, question if messages is None else list(messages)),
            method=self._engine.method_of(options.pop("method", None)),
            system=system,
            namespace=namespace,
            past=options.pop("past", None),
            keep=options.pop("keep_past", False),
            slots=options.pop("slots", None),
            **scheduling(options),
        )
        documents = self._engine.prompting.documents_for(within, namespace, request.past)
        asked = _Asked(self._engine, request, documents)
        stop, closing = options.pop("stop", ()), self._engine.closing
        answering = Answering(self._engine.documents, asked.prompt, stop, options, closing, pieces, request.keep)
        first = known(retrieval, request.method)
        self._engine.prompting.check(request, cast(str, text), answering.room)
        asked.begun = Speculation(self._ahead, request, answering.room, documents, tell, asked, first)
        try:
            asked.found = self._finder.found(cast(str, text), retrieval, documents, asked.begun.first, request.method)
            asked.begun.final(asked.found)
        except BaseException:
            asked.begun.drop()
            raise
        return asked, answering


class _Asked:
    """A question on its way.

    Attributes:
        documents: where its passages are read.
        found: the passages.
        begun: its prompt, perhaps.
    """

    found: Found
    begun: Speculation

    def __init__(self, engine: Engine, request: Request, documents: Documents):
        self.documents: Documents = documents
        self._engine, self._request = engine, request

    def prompt(self, room: Room, begin: float, stack: ExitStack, copies: int) -> FusedPrompt:
        """The prompt, now that its passages are known."""
        ranks = self.found.ranks(self.found.chunks)
        request = replace(self._request, chunks=self.found.chunks, ranks=ranks, begun=self.begun)
        return self._engine.prompting.prompt(request, room, begin, stack, copies)
