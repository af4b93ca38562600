"""Asking a pool what is there, for as long as whoever reads wants to wait."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Any

from ragkv.store.remote.pool import Breaker, GoneError, PoolError
from ragkv.store.remote.records import Records
from ragkv.store.remote.speed import Speed

logger: logging.Logger = logging.getLogger("ragkv.store")

#: What is there is late once that takes this many times as long as lately, and the limit.
_LATE = 1.1


class Heads:
    """The beginnings of objects. A pool that does not answer is left alone for a while. Safe for several threads.

    Args:
        records: the pool's.
        speed: is shown how long it takes, also where nobody waits any more.

    Attributes:
        breaker: says when to ask again.
        unanswered: how often there was no answer.
    """

    def __init__(self, records: Records, speed: Speed) -> None:
        self._records, self._speed = records, speed
        self.breaker: Breaker = Breaker()
        self.unanswered: int = 0

    @contextmanager
    def asking(self, keys: Collection[bytes]) -> Iterator[bool]:
        """To ask the pool, where it says that one may; when it does not answer, what was asked for is a miss."""
        may = bool(keys) and self.breaker.allows()
        try:
            yield may
        except PoolError as error:
            self.failed(error)

    def failed(self, error: PoolError) -> None:
        """The pool did not answer."""
        self.unanswered += 1
        level = logging.DEBUG if self.breaker.broken else logging.WARNING
        self.breaker.failed()
        logger.log(level, "the pool is left alone for %.0f s: %s", self.breaker.left_s, str(error))

    def which(self, keys: Sequence[bytes], limit_s: float) -> Collection[bytes]:
        """Those that are there, or of which that is not known after so much longer than lately.

        Raises:
            PoolError: the pool does not answer.
        """
        if limit_s == math.inf:
            there = self._records.which(keys)
        else:
            asked = Future[Collection[bytes]]()
            threading.Thread(target=self._ask, args=(asked, keys), name="ragkv-pool-ask", daemon=True).start()
            try:
                there = asked.result(_LATE * self._speed.start_s + limit_s)
            except TimeoutError:
                self._watch([asked], None)
                return keys
        self.breaker.succeeded()
        return there

    def _ask(self, asked: Future[Collection[bytes]], keys: Sequence[bytes]) -> None:
        try:
            asked.set_result(self._records.which(keys))
        except BaseException as error:
            asked.set_exception(error)

    def read(self, keys: Sequence[bytes], limit_s: float) -> tuple[dict[bytes, memoryview], set[bytes]]:
        """Those of what is there, and the keys of which that was not known after so much longer than lately.

        Raises:
            PoolError: the pool does not answer.
        """
        begin, records, left = self._speed.now(), self._records, dict[bytes, Future[Any]]()
        if limit_s == math.inf:
            heads = records.heads(keys)
        else:
            until = begin + _LATE * self._speed.start_s + limit_s
            came, left = self._until(until, records.begin_heads(keys))
            heads = {key: memoryview(head) for key, head in came.items() if head is not None}
            rests, more = self._until(until, records.begin_rests(heads))
            heads |= records.joined(heads, rests)
            for key, future in more.items():
                left[key] = future
                del heads[key]
            self._watch(left.values(), begin)
        if heads and not left:
            self._speed.started(self._speed.now() - begin)
        if len(left) < len(keys):
            self.breaker.succeeded()
        return heads, set(left)

    def _until(
        self, until: float, asked: Mapping[bytes, Future[Any]]
    ) -> tuple[dict[bytes, Any], dict[bytes, Future[Any]]]:
        """What was answered by then, and what was not."""
        left, refused = set(asked.values()), True
        while refused:  # what the pool does not give says nothing of the others
            done, left = wait(left, max(0.0, until - self._speed.now()), "FIRST_EXCEPTION")
            refused = any(not future.cancelled() and isinstance(future.exception(), GoneError) for future in done)
        try:
            came = {key: future for key, future in asked.items() if future not in left}
            answers = dict(zip(came, self._records.pool.answers(list(came.values())), strict=True))
        except PoolError:
            for future in left:
                future.cancel()
            raise
        return answers, {key: future for key, future in asked.items() if future in left}

    def _watch(self, left: Collection[Future[Any]], begin: float | None) -> None:
        """Learns from what nobody waits for any more: whether there is an answer, and from a beginning on, when."""

        def done(future: Future[Any]) -> None:
            if future.cancelled():
                return
            error = future.exception()
            if isinstance(error, PoolError):
                self.failed(error)
            elif error is None:
                self.breaker.succeeded()
                if begin is not None and all(one.done() for one in left):
                    self._speed.started(self._speed.now() - begin)

        for future in left:
            future.add_done_callback(done)
