"""Asking a pool what is there and can be read here, for as long as whoever reads wants to wait."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from ragkv.errors import RecordError
from ragkv.lazy import keep_last
from ragkv.store.remote.envelope import ID, ForeignError, Opened
from ragkv.store.remote.manifest import MOST_KNOWN, Manifest
from ragkv.store.remote.pool import Breaker, GoneError, PoolError
from ragkv.store.remote.records import Records
from ragkv.store.remote.speed import Speed
from ragkv.store.rows import Row

logger: logging.Logger = logging.getLogger("ragkv.store")

#: What is there is late once that takes this many times as long as lately, and the limit.
_LATE = 1.1
_LOOKED_INTO = 8
MOST_ASKED = 1024  # keys that are asked for together
AVOIDED_S = 10.0


@dataclass
class Heads:
    """The beginnings of objects. A pool that does not answer is left alone for a while. Safe for several threads.

    Attributes:
        records: the pool's.
        speed: is shown how long it takes, also where nobody waits any more.
        manifest: is told what is not there.
        counts: of what is ``unanswered``, ``late`` and ``foreign``.
        drop: told the key of an object that is damaged, its id, and why.
        breaker: says when to ask again.
        seen: of what was read lately, on what terms it is kept, and its object's id.
    """

    records: Records
    speed: Speed
    manifest: Manifest
    counts: Counter[str]
    drop: Callable[[bytes, bytes, str], object]
    breaker: Breaker = field(default_factory=Breaker)
    seen: dict[bytes, tuple[Row, bytes]] = field(default_factory=dict)

    def after_fork(self) -> None:
        """In a child: it asks for itself."""
        self.breaker = Breaker()

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
        self.counts["unanswered"] += 1
        level = logging.DEBUG if self.breaker.broken else logging.WARNING
        self.breaker.failed()
        logger.log(level, "the pool is left alone for %.0f s: %s", self.breaker.left_s, str(error))

    def lost(self, key: bytes, error: PoolError) -> None:
        """The pool did not give a chunk that it had."""
        if isinstance(error, GoneError):
            self.manifest.note([key], False)
        else:
            self.failed(error)
        self.manifest.avoid(key, AVOIDED_S)

    def which(self, keys: Sequence[bytes], limit_s: float) -> Collection[bytes]:
        """Those that are there, or of which that is not known after so much longer than lately."""
        with self.asking(keys) as may:
            if not may:
                return ()
            if limit_s == math.inf:
                there: Collection[bytes] = self.records.which(keys)
            else:
                asked = Future[Collection[bytes]]()
                threading.Thread(target=self._ask, args=(asked, keys), name="ragkv-pool-ask", daemon=True).start()
                try:
                    there = asked.result(_LATE * self.speed.start_s + limit_s)
                except TimeoutError:
                    self._watch([asked], None)
                    return keys
            self.breaker.succeeded()
            return there
        return ()

    def _ask(self, asked: Future[Collection[bytes]], keys: Sequence[bytes]) -> None:
        try:
            asked.set_result(self.records.which(keys))
        except BaseException as error:
            asked.set_exception(error)

    def open(self, keys: Sequence[bytes], limit_s: float) -> tuple[dict[bytes, tuple[Opened, memoryview]], set[bytes]]:
        """Those that are there and for us, with their first bytes, and those of which that is not known in time."""
        found, late = dict[bytes, tuple[Opened, memoryview]](), set[bytes]()
        with self.asking(keys) as may:
            if may:
                heads, late = self._read(keys, limit_s)
                found = {key: (opened, head) for key, head in heads.items() if (opened := self._open(key, head))}
                self.manifest.note(set(keys) - heads.keys() - late, False)
                self.counts["late"] += len(late)
        return found, late

    def unreadable(self, keys: Sequence[bytes]) -> set[bytes]:
        """Those of what is there that cannot be read here: written with another key, expired, damaged, or moved to an archive.

        A few are looked into, always the same ones, and all others only where one of them is such.

        Raises:
            PoolError: the pool does not answer.
        """
        few = keys[:: -(-len(keys) // _LOOKED_INTO) or 1]
        unread = self._unopened(few)
        return unread | self._unopened([key for key in keys if key not in few]) if unread else unread

    def _unopened(self, keys: Sequence[bytes]) -> set[bytes]:
        """Those that cannot be opened; what was lately is not asked for again."""
        now, seen = time.time(), {key: self.seen.get(key) for key in keys}
        left = [key for key, found in seen.items() if found is None or not found[0].alive(now)]
        unread = set(left)
        for start in range(0, len(left), MOST_ASKED):
            with suppress(GoneError):  # it refuses them all
                heads, _ = self._read(left[start : start + MOST_ASKED], math.inf)
                unread -= {key for key, head in heads.items() if self._open(key, head)}
        return unread

    def _open(self, key: bytes, head: memoryview) -> Opened | None:
        """The object that begins so; None where it is not for us."""
        try:
            opened = self.records.open(key, head)
        except ForeignError as error:
            self.counts["foreign"] += 1
            level = logging.WARNING if self.counts["foreign"] == 1 else logging.DEBUG  # there may be thousands of them
            logger.log(level, "%s in the pool is not read: %s", key.hex(), str(error))
            return None
        except RecordError as error:
            self.drop(key, bytes(head[ID]), str(error))
            return None
        if not opened.row.alive(time.time()):
            return None
        keep_last(self.seen, key, (opened.row, opened.id), MOST_KNOWN)
        return opened

    def _read(self, keys: Sequence[bytes], limit_s: float) -> tuple[dict[bytes, memoryview], set[bytes]]:
        """Those of what is there, and the keys of which that was not known after so much longer than lately.

        Raises:
            PoolError: the pool does not answer.
        """
        begin, records, left = self.speed.now(), self.records, dict[bytes, Future[Any]]()
        if limit_s == math.inf:
            heads = records.heads(keys)
        else:
            until = begin + _LATE * self.speed.start_s + limit_s
            came, left = self._until(until, records.begin_heads(keys))
            heads = {key: memoryview(head) for key, head in came.items() if head is not None}
            rests, more = self._until(until, records.begin_rests(heads))
            heads |= records.joined(heads, rests)
            for key, future in more.items():
                left[key] = future
                del heads[key]
            self._watch(left.values(), begin)
        if heads and not left:
            self.speed.started(self.speed.now() - begin)
        if len(left) < len(keys):
            self.breaker.succeeded()
        return heads, set(left)

    def _until(
        self, until: float, asked: Mapping[bytes, Future[Any]]
    ) -> tuple[dict[bytes, Any], dict[bytes, Future[Any]]]:
        """What was answered by then, and what was not."""
        left, refused = set(asked.values()), True
        while refused:  # what the pool does not give says nothing of the others
            done, left = wait(left, max(0.0, until - self.speed.now()), "FIRST_EXCEPTION")
            refused = any(not future.cancelled() and isinstance(future.exception(), GoneError) for future in done)
        try:
            came = {key: future for key, future in asked.items() if future not in left}
            answers = dict(zip(came, self.records.pool.answers(list(came.values())), strict=True))
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
                    self.speed.started(self.speed.now() - begin)

        for future in left:
            future.add_done_callback(done)
