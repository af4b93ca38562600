"""Answers in an event loop: the model works in a thread, the loop never waits for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ragkv.errors import RagKVError
from ragkv.report import AnswerReport, AnswerStream
from ragkv.retrieval import Hit

Result = TypeVar("Result")


class AsyncAnswerStream(AsyncIterator[str]):
    """A generated answer, piece by piece; the pieces joined are its text.

    Whoever stops listening (a task that is cancelled, a connection that is closed, :meth:`aclose`) stops the model: before the
    prompt is begun, or behind the token at hand.

    Attributes:
        sources: the passages in the order of the prompt; empty until the first piece is there.
    """

    def __init__(self, start: Callable[[], tuple[list[Hit], AnswerStream]], executor: Executor):
        self.sources: list[Hit] = []
        self._start, self._executor = start, executor
        self._stream: AnswerStream | None = None
        self._pieces = self._run()

    @property
    def token_ids(self) -> Sequence[int]:
        """The ids generated so far, an end token included."""
        return [] if self._stream is None else self._stream.token_ids

    @property
    def report(self) -> AnswerReport | None:
        """What it cost so far; ``None`` until the first piece is there."""
        return None if self._stream is None else self._stream.report

    async def __anext__(self) -> str:
        return await self._pieces.__anext__()

    async def aclose(self) -> None:
        """Stop the model. Closing twice, or behind the last piece, is fine."""
        await self._pieces.aclose()

    async def _run(self) -> AsyncGenerator[str]:
        loop, stopped = asyncio.get_running_loop(), threading.Event()
        pieces: asyncio.Queue[str | None] = asyncio.Queue()

        def say(piece: str | None) -> None:
            try:
                loop.call_soon_threadsafe(pieces.put_nowait, piece)
            except RuntimeError:  # the loop was closed meanwhile
                stopped.set()

        def work() -> None:
            try:
                if not stopped.is_set():
                    self.sources, self._stream = self._start()
                while not stopped.is_set() and self._stream and (piece := next(self._stream, None)) is not None:
                    say(piece)
            finally:
                say(None)

        working = _submitted(self._executor, work)
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            await asyncio.wrap_future(working)  # raises what it raised
        finally:
            stopped.set()
            working.cancel()


async def stoppable(executor: Executor, ask: Callable[..., Result], **options: Any) -> Result:
    """What ``ask`` gives, run in a thread; it is stopped behind the token at hand where nobody waits for it any more.

    Args:
        executor: of the thread.
        ask: takes ``stopping_criteria``, as ``model.generate`` does.
        **options: others for it.
    """
    stopped = threading.Event()

    def given_up(ids: Tensor, scores: Tensor | None, **_: Any) -> Tensor:
        return torch.full((len(ids),), stopped.is_set(), device=ids.device)

    criteria = [*(options.pop("stopping_criteria", None) or ()), given_up]
    working = _submitted(executor, partial(ask, stopping_criteria=criteria, **options))
    try:
        return await asyncio.wrap_future(working)
    finally:
        stopped.set()


def _submitted(executor: Executor, work: Callable[[], Result]) -> Future[Result]:
    try:
        return executor.submit(work)
    except RuntimeError as error:
        raise RagKVError("nothing is answered any more: it is closed") from error
