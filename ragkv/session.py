"""Conversations over documents: earlier turns, their answers and their passages stay in one cache and are not computed again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock
from time import perf_counter
from typing import Any

from ragkv.answering import Answering, AnswerStream, Made
from ragkv.chunk import Chunk
from ragkv.engine import Engine
from ragkv.errors import (
    ArgumentTypeError,
    ConversationError,
    ModelChangedError,
    OfOneProcess,
    PromptTooLongError,
    RetrievalError,
    whole_number,
)
from ragkv.finding import Finder, Found, SourcedAnswer, streamed
from ragkv.library.documents import Documents
from ragkv.library.watching import Progress, told_of_hits
from ragkv.messages import Message, last_turns
from ragkv.methods import Method
from ragkv.model.generation import DEFAULT_NEW_TOKENS
from ragkv.past import Past
from ragkv.prompt import Text
from ragkv.report import FusedPrompt
from ragkv.request import Request, Room, most, scheduling
from ragkv.retrieval import Hit, Retrieval
from ragkv.streaming import AsyncAnswerStream, Threads, stoppable


@dataclass(frozen=True, eq=False)
class _Turn:
    """A question, its answer, and the passages that were found for it."""

    question: str
    answer: str
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, eq=False)
class _State:
    """What a session knows: the turns of its prompt, those that were dropped, and what was computed of the former."""

    turns: tuple[_Turn, ...] = ()
    dropped: tuple[_Turn, ...] = ()
    past: Past | None = None

    def without(self, turns: int) -> _State:
        """The oldest turns dropped; the rest has to be placed anew."""
        return _State(self.turns[turns:], (*self.dropped, *self.turns[:turns]))


class _Next:
    """A turn in the making.

    Attributes:
        question: what is asked.
        found: the passages for it.
        begun: the session's state when its prompt was begun.
        state: that state as its prompt has it: turns may have been dropped.
        answering: decodes.
    """

    def __init__(self, question: str):
        self.question = question
        self.begun = self.state = _State()
        self.found: Found
        self.answering: Answering


class Session(OfOneProcess, instead="keep its messages, and ask with RAG.ask(messages=[...]) where it is needed"):
    """A conversation over a :class:`~ragkv.RAG`'s documents, for one caller at a time; made by :meth:`RAG.session`.

    Prompt and answers of all turns lie in one cache, which lives as long as the session: its KV are not computed again, and a
    passage that stands in it is not placed again. Where a prompt would be longer than ``context_tokens``, the oldest turns are
    dropped and the rest is put together anew, with the passages of the turns that are left in front of the new question. So it is
    where the model has changed. A turn that fails or is cancelled leaves everything as it was.

    Args:
        engine: answers.
        finder: finds passages.
        threads: to answer in, in an event loop.
        system, namespace, rewrite, context_tokens: see :meth:`RAG.session`.
    """

    def __init__(
        self,
        engine: Engine,
        finder: Finder,
        threads: Threads,
        system: str | None = None,
        namespace: str | None = None,
        rewrite: Callable[[list[dict[str, str]]], str] | None = None,
        context_tokens: int | None = None,
    ):
        if rewrite is not None and not callable(rewrite):
            raise ArgumentTypeError(f"rewrite must be a function that takes messages, got {rewrite!r:.80}")
        if context_tokens is not None:
            whole_number("context_tokens", context_tokens, 1)
        self._engine, self._finder, self._threads = engine, finder, threads
        self._system, self._namespace = system, namespace
        self._rewrite, self._context_tokens = rewrite, context_tokens
        self._documents()  # says now what is wrong with them
        self._state, self._guard = _State(), Lock()

    @property
    def messages(self) -> list[dict[str, str]]:
        """All that was said, as chat messages; also the turns that are not in the prompt any more."""
        said = [{"role": "system", "content": self._system}] if self._system else []
        for turn in (*self._state.dropped, *self._state.turns):
            said += _messages(turn)
        return said

    def ask(self, question: str, **options: Any) -> SourcedAnswer:
        """The next turn.

        Args:
            question: not blank.
            **options: ``method``, ``slots``, ``progress``, those of :class:`ragkv.Retrieval` and generation arguments, as for
                :meth:`RAG.ask`; no beams.

        Returns:
            The answer. Its sources are all passages found for this question, those that stood in the prompt already among them;
            ``report.fusion.tokens`` says what was reused, placed, recomputed and fresh.

        Raises:
            As :meth:`RAG.ask`; ConversationError where another caller asks just now.
        """
        turn = _Next(question)
        return self._kept(turn, self._answered(turn, **options))

    def stream(self, question: str, **options: Any) -> tuple[list[Hit], AnswerStream]:
        """The next turn, piece by piece: its passages, and its answer. It belongs to the session behind the last piece.

        Args:
            question: not blank.
            **options: as for :meth:`ask`.
        """
        turn = _Next(question)
        return self._streamed(turn, partial(self._said, turn), **options)

    async def aask(self, question: str, **options: Any) -> SourcedAnswer:
        """:meth:`ask` in an event loop, which goes on meanwhile. When the task is cancelled, the model stops."""
        turn = _Next(question)
        return self._kept(turn, await stoppable(self._threads.pool(), partial(self._answered, turn), **options))

    def astream(self, question: str, **options: Any) -> AsyncAnswerStream[Hit]:
        """:meth:`stream` in an event loop: ``async for piece in session.astream(question)``; see its ``sources``, too."""
        turn = _Next(question)
        start = partial(self._streamed, turn, None)
        return AsyncAnswerStream(start, self._threads.pool(), partial(self._ended, turn), **options)

    def _answered(
        self, turn: _Next, *, progress: Callable[[Progress], object] | None = None, **options: Any
    ) -> SourcedAnswer:
        self._begin(turn, **options)
        with told_of_hits(progress, turn.found.hits):
            return SourcedAnswer.of(turn.answering.whole(perf_counter()), turn.found)

    def _streamed(
        self,
        turn: _Next,
        ended: Callable[[Made], object] | None,
        *,
        progress: Callable[[Progress], object] | None = None,
        **options: Any,
    ) -> tuple[list[Hit], AnswerStream]:
        self._begin(turn, **options, pieces=True)
        return streamed(turn.found, self._documents(), progress, partial(turn.answering.pieces, ended=ended))

    def _begin(
        self,
        turn: _Next,
        *,
        method: Method | str | None = None,
        stop: str | Sequence[str] = (),
        slots: Mapping[str, Text] | None = None,
        pieces: bool = False,
        **options: Any,
    ) -> None:
        """Check all arguments and find passages; nothing is computed yet."""
        retrieval, generation = Retrieval.split(options)
        asked = {"keep": True, "most_tokens": self._context_tokens, "slots": slots, **scheduling(generation)}
        request = Request((), turn.question, self._engine.method_of(method), **asked)
        make = partial(self._prompt, turn, request)
        documents, closing = self._engine.documents, self._engine.closing
        turn.answering = Answering(documents, make, stop, generation, closing, pieces, kept=True)
        text = turn.question
        alone = replace(request, system=self._system, namespace=self._namespace)
        self._engine.prompting.check(alone, text, turn.answering.room)
        if isinstance(text, str) and text.strip() and self._state.turns:
            messages = [*self.messages, {"role": "user", "content": text}]
            text = self._look_for(messages)
        turn.found = self._finder.found(text, retrieval, self._documents(), method=request.method)

    def _look_for(self, messages: list[dict[str, str]]) -> str:
        if self._rewrite is not None:
            text = self._rewrite(messages)
            if not isinstance(text, str) or not text.strip():
                raise RetrievalError(f"rewrite must give a text to look for that is not blank, got {text!r:.80}")
            limit, whose = most(self._engine.documents, None)
            tokens = len(self._engine.encoder.ids(text)) if limit is not None and len(text) > limit else 0
            if limit is not None and tokens > limit:  # or the embedder would read all of it
                raise RetrievalError(f"rewrite gave {tokens} tokens to look for, more than {whose}: let it give fewer")
            return text
        return last_turns([Message(**message) for message in messages if message["role"] != "system"])

    def _prompt(
        self, turn: _Next, request: Request, room: Room, begin: float, stack: ExitStack, copies: int
    ) -> FusedPrompt:
        """The turn's prompt: behind what was said, or put together anew, without as many of the oldest turns as is needed."""
        state = turn.begun = turn.state = self._state
        made, dropped = partial(self._engine.prompting.prompt, copies=copies), 0

        def roomy(tokens: int) -> int:
            asked = room(tokens)
            return DEFAULT_NEW_TOKENS if asked is None else asked

        if state.past is not None and state.past.stands:  # or a copy of this session was asked
            there = {chunk.ids for earlier in state.turns for chunk in earlier.chunks}
            chunks = [chunk for chunk in turn.found.chunks if chunk.ids not in there]
            try:
                going_on = replace(request, chunks=chunks, ranks=turn.found.ranks(chunks), past=state.past)
                prompt = made(going_on, roomy, begin, stack)
                return _for_question(prompt, chunks, turn.found.chunks)
            except PromptTooLongError:
                dropped = 1
            except ModelChangedError:
                pass  # all of it is computed by the model as it is now
        while True:
            turn.state = state.without(dropped)
            left = turn.state.turns
            said = [message for earlier in left for message in _messages(earlier)]
            every = {chunk.ids: chunk for earlier in left for chunk in earlier.chunks}
            every |= {chunk.ids: chunk for chunk in turn.found.chunks}
            chunks = list(every.values())
            anew = replace(
                request,
                chunks=chunks,
                ranks=turn.found.ranks(chunks),
                question=[*said, {"role": "user", "content": turn.question}],
                system=self._system,
                namespace=self._namespace,
            )
            try:
                prompt = made(anew, roomy if left else room, begin, stack)
                return _for_question(prompt, chunks, turn.found.chunks)
            except PromptTooLongError:
                if not left:
                    raise
                dropped += 1

    def _ended(self, turn: _Next, made: Made | AnswerStream) -> None:
        self._keep(turn, turn.answering.said(made.token_ids), made.past)

    def _said(self, turn: _Next, made: Made) -> None:
        self._ended(turn, made)
        made.past = None  # the session goes on from it

    def _kept(self, turn: _Next, answer: SourcedAnswer) -> SourcedAnswer:
        self._keep(turn, answer.text, answer.past)
        return replace(answer, past=None)

    def _keep(self, turn: _Next, answer: str, past: Past | None) -> None:
        """Make a turn a part of the session."""
        done = _Turn(turn.question, answer, tuple(turn.found.chunks))
        with self._guard:
            if self._state is not turn.begun:
                raise ConversationError(
                    "another question was answered in this session meanwhile, and this one is no part of it: a session is for one "
                    "caller at a time"
                )
            self._state = _State((*turn.state.turns, done), turn.state.dropped, past)

    def _documents(self) -> Documents:
        return self._engine.prompting.documents_for(self._system, self._namespace)


def _for_question(prompt: FusedPrompt, placed: Sequence[Chunk], asked: Sequence[Chunk]) -> FusedPrompt:
    """The prompt, whose report names the KV of the question's passages: of those that were placed, and those that were there."""
    origins = {chunk.ids: origin for chunk, origin in zip(placed, prompt.report.sources, strict=True)}
    prompt.report.sources = [origins.get(chunk.ids, "prompt") for chunk in asked]
    return prompt


def _messages(turn: _Turn) -> list[dict[str, str]]:
    return [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
