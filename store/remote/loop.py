"""Requests on a loop in a thread of its own: whoever waits for one waits in Python, and may stop to."""

from __future__ import annotations

import asyncio
import atexit
import threading
import weakref
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeAlias, TypeVar

from ragkv.store.remote.pool import end

_END_S, _LET_GO_S = 0.5, 0.05

Answer = TypeVar("Answer")
_Begun: TypeAlias = tuple[Coroutine[Any, Any, Any], Future[Any]]  # a request, and its answer

_loops: weakref.WeakSet[Loop] = weakref.WeakSet()


class Loop:
    """It begins with its first request, and begins no more once it is closed. Safe for several threads."""

    def __init__(self) -> None:
        self._lock, self._here = threading.Lock(), threading.local()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        _loops.add(self)

    def begin(self, request: Coroutine[Any, Any, Answer]) -> Future[Answer]:
        """Begins a request; nobody works on it any more where its future is cancelled."""
        future = Future[Answer]()
        begun: list[_Begun] | None = getattr(self._here, "begun", None)
        if begun is None:
            self._wake([(request, future)])
        else:
            begun.append((request, future))
        return future

    @contextmanager
    def together(self) -> Iterator[None]:
        """What this thread begins meanwhile is begun at the end: whoever wakes the loop waits until it sleeps again."""
        self._here.begun = begun = list[_Begun]()
        try:
            yield
        finally:
            self._here.begun = None
            if begun:
                self._wake(begun)

    def after_fork(self) -> None:
        """In a child, where its thread is not: it is closed."""
        self._lock, self._loop, self._closed = threading.Lock(), None, True

    def close(self) -> None:
        """What is on its way is cancelled."""
        with self._lock:
            loop, self._loop, self._closed = self._loop, None, True
        if loop is not None:
            asyncio.run_coroutine_threadsafe(_end(), loop)
            self._thread.join(_END_S)

    def _wake(self, begun: Sequence[_Begun]) -> None:
        with self._lock:
            if not self._closed and self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=_run, args=[self._loop], name="ragkv-pool-loop", daemon=True)
                self._thread.start()
            if self._loop is not None:
                self._loop.call_soon_threadsafe(_start, self._loop, begun)
                return
        for request, future in begun:
            request.close()
            end(future)


@atexit.register
def _close_all() -> None:
    """What is on its way when the program ends must not come back to it."""
    for loop in list(_loops):
        loop.close()


def _run(loop: asyncio.AbstractEventLoop) -> None:
    """Until it is ended; with it go its sockets."""
    try:
        loop.run_forever()
    finally:
        loop.close()


def _start(loop: asyncio.AbstractEventLoop, begun: Sequence[_Begun]) -> None:
    for request, future in begun:
        task = loop.create_task(request)
        task.add_done_callback(partial(_tell, future))
        future.add_done_callback(partial(_end_unwanted, loop, task))


def _tell(future: Future[Any], task: asyncio.Task[Any]) -> None:
    if task.cancelled():
        end(future)
    elif future.set_running_or_notify_cancel():
        error = task.exception()
        if error is None:
            future.set_result(task.result())
        else:
            future.set_exception(error)


def _end_unwanted(loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any], future: Future[Any]) -> None:
    if future.cancelled() and not task.done():
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(task.cancel)


async def _end() -> None:
    """Ends what is on its way, then the loop."""
    loop = asyncio.get_running_loop()
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    if tasks:  # the client's own threads let go of them a moment later, and panic where Python has ended by then
        await asyncio.sleep(_LET_GO_S)
    loop.call_soon(loop.stop)
