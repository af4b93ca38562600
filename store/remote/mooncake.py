# ruff: noqa: D102 - methods without a docstring keep the contract of pool.Pool
"""A pool in Mooncake's store (arXiv:2407.00079): memory that processes lend, over TCP or RDMA, found through one master."""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl, urlsplit

import numpy as np

from ragkv.errors import StoreError
from ragkv.store.remote.membership import Member, client_class, members
from ragkv.store.remote.pool import ClosedError, Pool, PoolError, end, shown

_MASTER_PORT = 50051
_SMALL_BYTES = 64 << 10
_WRITE_S = 30.0
_WRITTEN_S, _AGAIN_S = 0.5, 0.005  # how long what is just being written is waited for, and how often it is looked at
_THREADS = 4
_LISTED = 1000
# mooncake-store/include/types.h
_BEHIND_END, _NOT_READY, _NOT_FOUND = -600, -703, -704

Answer = TypeVar("Answer")


class _Range(NamedTuple):
    key: str
    start: int
    stop: int
    future: Future[Any]


class MooncakePool(Pool):
    """Values whose keys begin alike. They go when the store needs their memory, and with the process that lends it.

    Whatever reads wait are asked for together, in one call. All pools of a process that name one store are one member of it. A
    value is replaced in its place: who reads it meanwhile waits, or gets bytes of both, which checksums find.

    Args:
        member: how this process takes part. It joins with the first request.
        name: what messages call it.
        prefix: what keys begin with.
        limit_s: seconds without any answer after which a request fails.
        requests: how many reads are asked for in one call.
    """

    quick = True
    forks = False  # its threads are the parent's

    def __init__(
        self, member: Member, name: str, *, prefix: str = "ragkv/", limit_s: float = 3.0, requests: int = 16
    ) -> None:
        super().__init__(name)
        self._member, self._prefix, self._limit_s, self._requests = member, prefix, limit_s, requests
        client_class()
        self._closed = False
        self._threads = ThreadPoolExecutor(_THREADS, "ragkv-pool")
        self._lock, self._here = threading.Lock(), threading.local()
        # What is small does not stand in line behind what is large.
        self._small, self._large = deque[_Range](), deque[_Range]()
        self._answered = 0.0

    @classmethod
    def open(cls, url: str, limit_s: float, requests: int) -> MooncakePool:
        """See :func:`ragkv.store.remote.opening.open_pool`; the query says how this process takes part: see :class:`Member`."""
        name = shown(url)
        try:
            parts = urlsplit(url)
            query = dict[str, Any](parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
            query |= {what: int(query[what]) for what in ("admin", "segment") if what in query}
            member = Member((parts.hostname or "127.0.0.1", parts.port or _MASTER_PORT), **query)
            if member.segment < 0 or parts.fragment:
                raise ValueError(url)
        except (ValueError, TypeError):
            raise StoreError(
                f"{name} cannot be opened: a store of Mooncake's is mooncake://MASTER:PORT/PREFIX, and behind a question mark "
                "any of admin=PORT, host=NAME, segment=BYTES, protocol=tcp, device=NAME, metadata=URL"
            ) from None  # the text may tell the URL
        return cls(member, name, prefix=f"{parts.path.strip('/') or 'ragkv'}/", limit_s=limit_s, requests=requests)

    def begin(self, name: str, start: int, stop: int) -> Future[Any]:
        wanted = _Range(self._prefix + name, start, stop, Future())
        with self._lock:
            (self._small if stop - start <= _SMALL_BYTES else self._large).append(wanted)
        if not getattr(self._here, "together", False):
            self._submit(self._serve)
        return wanted.future

    @contextmanager
    def together(self) -> Iterator[None]:
        self._here.together = True
        try:
            yield
        finally:
            self._here.together = False
            with self._lock:
                calls = bool(self._small) + math.ceil(len(self._large) / self._requests)
            for _ in range(calls):
                self._submit(self._serve)

    def write(self, name: str, data: bytes | bytearray, lifetime_s: float) -> None:
        """See :class:`Pool`. It does not go by itself when its lifetime ends."""
        self._wait(self._submit(self._write, self._prefix + name, data), max(self._limit_s, _WRITE_S))

    def delete(self, *names: str) -> None:
        """See :class:`Pool`. Also while it is read: who does gets an error, or bytes that checksums refuse."""
        for name in names:
            self.answer(self._submit(self._remove, self._prefix + name))

    def which(self, names: Sequence[str]) -> set[str]:
        """See :class:`Pool`. One round trip."""

        def run() -> set[str]:
            there = self._joined().batch_is_exist([self._prefix + name for name in names])
            return {name for name, found in zip(names, map(self._check, there), strict=True) if found}

        return self.answer(self._submit(run)) if names else set()

    def names(self, below: str = "") -> Iterator[tuple[str, int]]:
        """See :class:`Pool`. The master is asked through its port for administrators, and for all that is in the store."""
        begin = self._prefix + below
        keys = [key for key in self.answer(self._submit(self._listed)) if key.startswith(begin)]
        for at in range(0, len(keys), _LISTED):
            sizes = self.answer(self._submit(self._sizes, keys[at : at + _LISTED]))
            yield from ((key.removeprefix(self._prefix), size) for key, size in sizes.items())

    def answer(self, future: Future[Answer]) -> Answer:
        """See :class:`Pool`. The client's own limit is half a minute: who waits has waited enough before."""
        return self._wait(future, self._limit_s)

    def after_fork(self) -> None:
        """See :class:`Pool`. It is closed."""
        self._lock, self._threads = threading.Lock(), ThreadPoolExecutor(1)
        self.close()

    def close(self) -> None:
        """See :class:`Pool`. The process stays a member of the store, and lends what it lends, until it ends."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            waiting = [*self._small, *self._large]
            self._small.clear()
            self._large.clear()
            self._closed = True
        for wanted in waiting:
            end(wanted.future)

    def _submit(self, work: Callable[..., Answer], *args: Any) -> Future[Answer]:
        try:
            return self._threads.submit(work, *args)
        except RuntimeError as error:
            raise ClosedError(f"{self.name} is closed") from error

    def _wait(self, future: Future[Answer], limit_s: float) -> Answer:
        begin = time.monotonic()
        while not future.done():
            left_s = max(begin, self._answered) + limit_s - time.monotonic()
            if left_s <= 0:
                raise PoolError(f"{self.name}: no answer for {limit_s:g} s")
            wait([future], left_s)
        return super().answer(future)

    def _joined(self) -> Any:
        if self._closed:
            raise ClosedError(f"{self.name} is closed")
        return members.client(self._member, self._limit_s)

    def _serve(self) -> None:
        """Answers reads that wait, as many as are asked for together."""
        with self._lock:
            ranges = [self._small.popleft() for _ in range(len(self._small))]
            ranges += [self._large.popleft() for _ in range(min(len(self._large), self._requests))]
        ranges = [wanted for wanted in ranges if wanted.future.set_running_or_notify_cancel()]
        until = time.monotonic() + _WRITTEN_S
        while ranges:
            try:
                answers = self._read(ranges)
            except Exception as error:
                for wanted in ranges:
                    wanted.future.set_exception(error)
                return
            self._answered = time.monotonic()
            left: list[_Range] = []
            for wanted, answer in zip(ranges, answers, strict=True):
                if answer == _NOT_READY and self._answered < until:
                    left.append(wanted)
                elif isinstance(answer, int) and answer not in (_NOT_READY, _NOT_FOUND):
                    wanted.future.set_exception(self._error(answer))
                else:
                    wanted.future.set_result(None if isinstance(answer, int) else answer)
            ranges = left
            if ranges:
                time.sleep(_AGAIN_S)

    def _read(self, ranges: Sequence[_Range]) -> list[Any]:
        """The bytes of each, or why there are none."""
        client = self._joined()
        answers = self._ranges(client, ranges)
        for index, answer in enumerate(answers):
            if answer == _BEHIND_END:
                key, start, stop, future = ranges[index]
                size = client.get_size(key)
                if size < 0 or size <= start:
                    answers[index] = size if size < 0 else b""
                elif size < stop:
                    answers[index] = self._ranges(client, [_Range(key, start, size, future)])[0]
        return answers

    def _ranges(self, client: Any, ranges: Sequence[_Range]) -> list[Any]:
        sizes = [wanted.stop - wanted.start for wanted in ranges]
        begins = [0, *accumulate(sizes)]
        room = np.empty(begins[-1], np.uint8)
        of = defaultdict[str, list[int]](list)
        for index, wanted in enumerate(ranges):
            of[wanted.key].append(index)
        numbers = list(of.values())
        with self._registered(client, room):
            (codes,) = client.get_into_ranges(
                [room.ctypes.data],
                [list(of)],
                [[[begins[index] for index in each] for each in numbers]],
                [[[ranges[index].start for index in each] for each in numbers]],
                [[[sizes[index] for index in each] for each in numbers]],
            )
        answers: list[Any] = [None] * len(ranges)
        for each, found in zip(numbers, codes, strict=True):
            for index, code in zip(each, found, strict=True):
                answers[index] = code if code < 0 else room[begins[index] : begins[index] + code].data
        return answers

    def _write(self, key: str, data: bytes | bytearray) -> None:
        client, room = self._joined(), np.frombuffer(data, np.uint8)
        with self._registered(client, room):
            self._check(client.upsert_from(key, room.ctypes.data, room.nbytes))
        self._answered = time.monotonic()

    def _remove(self, key: str) -> None:
        self._check(self._joined().remove(key, True), _NOT_FOUND)

    @contextmanager
    def _registered(self, client: Any, room: np.ndarray[Any, Any]) -> Iterator[None]:
        self._check(client.register_buffer(room.ctypes.data, room.nbytes))
        try:
            yield
        finally:
            client.unregister_buffer(room.ctypes.data)

    def _listed(self) -> list[str]:
        master = HTTPConnection(self._member.master[0], self._member.admin, timeout=self._limit_s)
        try:
            master.request("GET", "/get_all_keys")
            answer = master.getresponse()
            listed = answer.read().decode(errors="replace")
            if answer.status != 200:
                raise HTTPException(f"status {answer.status}")
        except (OSError, HTTPException) as error:
            raise PoolError(f"{self.name}: its master does not say what is there (admin=PORT): {error}") from error
        finally:
            master.close()
        return listed.splitlines()

    def _sizes(self, keys: Sequence[str]) -> dict[str, int]:
        client = self._joined()
        sizes = {key: self._check(client.get_size(key), _NOT_FOUND, _NOT_READY) for key in keys}
        return {key: size for key, size in sizes.items() if size >= 0}

    def _check(self, code: int, *fine: int) -> int:
        if code < 0 and code not in fine:
            raise self._error(code)
        return code

    def _error(self, code: int) -> PoolError:
        return PoolError(f"{self.name}: error {code} of Mooncake's store")
