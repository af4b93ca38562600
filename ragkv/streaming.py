"""Answers in an event loop: the model works in a thread, the loop never waits for it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Executor, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from typing import Any, Generic, TypeVar

from ragkv.answering import AnswerStream
from ragkv.errors import CLOSED, OfOneProcess, RagKVError, whole_number
from ragkv.logprobs import TokenLogprob
from ragkv.model.generation import Stop
from ragkv.report import AnswerReport
from ragkv.retrieval import Hit

Result = TypeVar("Result")
Found = TypeVar("Found")  # what an answer is out of: hits, or an engine's chunks
# Questions of an event loop that stand in the line, or are answered.
_AT_ONCE = 32


class Threads:
    """Threads for an event loop's questions; those of a parent are not there in its fork."""

    def __init__(self) -> None:
        self._pool, self._process = ThreadPoolExecutor(_AT_ONCE, "ragkv-answer"), os.getpid()

    def pool(self) -> ThreadPoolExecutor:
        """Those of this process."""
        if self._process != os.getpid():
            self._pool, self._process = ThreadPoolExecutor(_AT_ONCE, "ragkv-answer"), os.getpid()
        return self._pool

    def close(self) -> None:
        """Wait for what is worked on; what was not begun is cancelled."""
        self.pool().shutdown(cancel_futures=True)


class AsyncAnswerStream(
    AsyncIterator[str], OfOneProcess, Generic[Found], instead="read it where it was begun, and hand on its text"
):
    """A generated answer, piece by piece; the pieces joined are its text.

    Whoever stops listening (a task that is cancelled, a connection that is closed, a loop that is left, an event loop that is
    closed, :meth:`aclose`) stops the model: before the prompt is begun, or behind the token at hand.

    Args:
        start: begins the answer.
        executor: of the thread that makes it.
        ended: called behind the last piece, if somebody listened to the end.
        **options: for ``start``.
    """

    def __init__(
        self,
        start: Callable[..., tuple[list[Found], AnswerStream]],
        executor: Executor,
        ended: Callable[[AnswerStream], object] | None = None,
        **options: Any,
    ):
        self._making = _Making(start, executor, ended, options)
        # Nothing but this object holds the pieces, and they do not hold it: where nobody has it any more, asyncio closes them.
        self._pieces, self._awaited = self._making.pieces(), 0

    def __del__(self) -> None:
        self._making.stop.set()  # now: asyncio closes the pieces when it comes to it

    @property
    def sources(self) -> list[Found]:
        """The passages in the order of the prompt; empty until the first piece is there."""
        return self._making.sources

    @property
    def left_out(self) -> list[Hit]:
        """Those that were found and are too long for the model; likewise."""
        return self._making.left_out

    @property
    def token_ids(self) -> Sequence[int]:
        """The ids generated so far, an end token included."""
        return [] if self._stream is None else self._stream.token_ids

    @property
    def report(self) -> AnswerReport | None:
        """What it cost so far; ``None`` until the first piece is there."""
        return None if self._stream is None else self._stream.report

    @property
    def logprobs(self) -> Sequence[TokenLogprob] | None:
        """As of :class:`~ragkv.Answer`, so far."""
        return None if self._stream is None else self._stream.logprobs

    @property
    def value(self) -> Any:
        """As of :class:`~ragkv.Answer`, behind the last piece; ``None`` until the first piece is there."""
        return None if self._stream is None else self._stream.value

    @property
    def _stream(self) -> AnswerStream | None:
        return self._making.stream

    async def __anext__(self) -> str:
        self._awaited += 1
        try:
            return await self._pieces.__anext__()
        finally:
            self._awaited -= 1

    async def aclose(self) -> None:
        """Stop the model, be a piece awaited or not. Closing twice, or behind the last piece, is fine."""
        self._making.stop.set()
        if self._awaited:
            self._making.queue.put_nowait(None)  # whoever waits for a piece is told that there are no more
        else:
            await self._pieces.aclose()


class _Making(Generic[Found]):
    """An answer in the making: what the thread that makes it and the event loop share; arguments as of its stream."""

    def __init__(
        self,
        start: Callable[..., tuple[list[Found], AnswerStream]],
        executor: Executor,
        ended: Callable[[AnswerStream], object] | None,
        options: dict[str, Any],
    ):
        self.sources: list[Found] = []
        self.left_out: list[Hit] = []
        self.stream: AnswerStream | None = None
        self.stop = Stop()
        self.queue = asyncio.Queue[str | None]()
        self._start, self._executor, self._ended = partial(start, **self.stop.among(options)), executor, ended

    async def pieces(self) -> AsyncGenerator[str]:
        """The pieces as they come; ``ended`` is called behind the last one, if somebody listened to the end."""
        loop = self.stop.loop = asyncio.get_running_loop()

        def say(piece: str | None) -> None:
            with suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(self.queue.put_nowait, piece)

        working = _submitted(self._executor, lambda: self._work(say))
        working.add_done_callback(lambda _: say(None))  # also where it is cancelled before it begins
        try:
            while (piece := await self.queue.get()) is not None:
                yield piece
            if not self.stop.is_set():
                await _given(working)
                if self._ended is not None and self.stream is not None:
                    self._ended(self.stream)
        finally:
            self.stop.set()
            working.cancel()
            del working  # as in results

    def _work(self, say: Callable[[str], None]) -> None:
        if not self.stop.is_set():
            self.sources, self.stream = self._start()
            self.left_out = self.stream.left_out
        if self.stream is not None and not self.stop.is_set():
            for piece in self.stream.to_the_end():
                say(piece)


async def in_thread(executor: Executor, work: Callable[[], Result]) -> Result:
    """What ``work`` gives, run in a thread; it goes on where nobody waits for it any more."""
    return await _given(_submitted(executor, work))


async def stoppable(executor: Executor, ask: Callable[..., Result], **options: Any) -> Result:
    """What ``ask`` gives, run in a thread; it is stopped behind the token at hand where nobody waits for it any more.

    Args:
        executor: of the thread.
        ask: takes ``stopping_criteria``, as ``model.generate`` does.
        **options: for it.
    """
    stop = Stop(asyncio.get_running_loop())
    try:
        return await _given(_submitted(executor, partial(ask, **stop.among(options))))
    finally:
        stop.set()


def side_by_side(ask: Callable[..., Result], items: Sequence[Any], at_once: int = 8, **options: Any) -> list[Result]:
    """What ``ask`` gives for each item, in order, several worked on at a time.

    Args:
        ask: takes an item and ``stopping_criteria``, as ``model.generate`` does.
        items: any number.
        at_once: threads.
        **options: for ``ask``.

    Raises:
        Whatever the first of them raises that fails: those not begun are cancelled, and the others end behind the token at hand.
    """
    whole_number("at_once", at_once, 1)
    stop = Stop()
    options = stop.among(options)
    with ThreadPoolExecutor(at_once, "ragkv-answer") as pool:
        working = [pool.submit(ask, item, **options) for item in items]
        try:
            wait(working, return_when=FIRST_EXCEPTION)
            working.sort(key=lambda one: not one.done() or one.exception() is None)  # who failed is asked first
            return results(working)
        finally:  # behind an interruption too
            stop.set()
            for one in working:
                one.cancel()


def results(working: list[Future[Result]]) -> list[Result]:
    """What each of them gives, taken out of the list one by one.

    Whoever waits is in the traceback of the first that fails: holding its error too would keep all that is in there in memory until
    Python collects garbage.
    """
    given = list[Result]()
    while working:
        given.append(working.pop(0).result())
    return given


def _submitted(executor: Executor, work: Callable[[], Result]) -> Future[Result]:
    try:
        return executor.submit(work)
    except RuntimeError as error:
        raise RagKVError(CLOSED) from error


async def _given(working: Future[Result]) -> Result:
    """What it gives or raises; where it was cancelled, that it was closed."""
    try:
        return await asyncio.wrap_future(working)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if working.cancelled() and not (task and task.cancelling()):
            raise RagKVError(CLOSED) from None
        raise
    finally:
        del working  # as in results
