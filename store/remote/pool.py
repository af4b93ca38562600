"""What a shared pool must be able to do."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

from ragkv.errors import MissingPackageError, StoreError

_SLOWEST_S = 60.0

Answer = TypeVar("Answer")


class PoolError(StoreError):
    """A pool did not answer, or not in time, or refused. What it was asked for is a miss, or is tried again later."""


class GoneError(PoolError):
    """The pool answers, but does not give this one: it was deleted meanwhile, or moved to where it cannot be read."""


class ClosedError(PoolError):
    """The pool was closed, here."""


class Pool(ABC):
    """Named bytes that many machines share. Safe for several threads.

    What is written is seen whole or not at all. Whatever goes wrong is a :class:`PoolError`.

    Attributes:
        name: where it is, without secrets.
        quick: asking it is so fast that nobody need know beforehand what is there.
        forks: whether a forked child can use it.
        most_bytes: what one value may have.
    """

    quick: bool = False
    forks: bool = True
    most_bytes: int = 1 << 40

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def begin(self, name: str, start: int, stop: int) -> Future[Any]:
        """Begins to read a value, see :meth:`read`. Those that were begun first are read first."""

    @contextmanager
    def together(self) -> Iterator[None]:
        """What this thread begins meanwhile is asked for at the end, at once, where that takes less time."""
        yield

    @abstractmethod
    def write(self, name: str, data: bytes | bytearray, lifetime_s: float) -> None:
        """Stores a value, in place of what has its name. It may go after its lifetime."""

    @abstractmethod
    def delete(self, *names: str) -> None:
        """Deletes values, in one request where that can be done; unknown ones are fine."""

    @abstractmethod
    def which(self, names: Sequence[str]) -> set[str]:
        """Those of the names that are there."""

    @abstractmethod
    def names(self, below: str = "") -> Iterator[tuple[str, int]]:
        """All names, or those below ``"FOLDER/"``, and the bytes of each. Slow where there are many."""

    @abstractmethod
    def after_fork(self) -> None:
        """In a child: threads of the parent are not there."""

    @abstractmethod
    def close(self) -> None:
        """Gives back what it holds; what is on its way fails."""

    def read(self, name: str, start: int, stop: int) -> Any:
        """A value's bytes, as a buffer, from one to another; as many as there are. None where there is no such value."""
        return self.answer(self.begin(name, start, stop))

    def heads(self, names: Sequence[str], size: int) -> dict[str, Any]:
        """The first bytes of those values that are there."""
        with self.together():
            begun = [self.begin(name, 0, size) for name in names]
        heads = self.answers(begun)
        return {name: head for name, head in zip(names, heads, strict=True) if head is not None}

    def answer(self, future: Future[Answer]) -> Answer:
        """Waits for what was begun."""
        try:
            return future.result()
        except CancelledError as error:
            raise ClosedError(f"{self.name} was closed") from error

    def answers(self, futures: Sequence[Future[Answer]]) -> list[Answer | None]:
        """Waits for all; once one has failed, for none. What the pool does not give is None, unless that is so of all."""
        found, gone = list[Any](), list[GoneError]()
        try:
            for future in futures:
                try:
                    found.append(self.answer(future))
                except GoneError as error:
                    gone.append(error)
                    found.append(None)
            if gone and len(gone) == len(futures):
                raise gone[0]
            return found
        finally:
            for future in futures:
                future.cancel()


class Breaker:
    """Says when to ask again who failed: after a second, then after twice as long each time, at most a minute.

    Whoever is allowed to try while it is broken tries for all: the others are told no meanwhile.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._delay = self._until = 0.0
        self._trying = False
        self._lock = threading.Lock()

    @property
    def broken(self) -> bool:
        """Whether the last try failed."""
        return self._delay > 0

    @property
    def left_s(self) -> float:
        """Seconds until the next try."""
        return max(0.0, self._until - self._now()) if self._delay else 0.0

    def allows(self) -> bool:
        """Whether to try now."""
        with self._lock:
            if not self._delay:
                return True
            if self._now() < self._until:
                return False
            self._trying, self._until = True, self._now() + self._delay
            return True

    def failed(self) -> None:
        """A try failed. What was asked before, and fails now too, does not count again."""
        with self._lock:
            if self._trying or not self._delay:
                self._delay = min(_SLOWEST_S, 2 * self._delay or 1.0)
                self._until = self._now() + self._delay
            self._trying = False

    def succeeded(self) -> None:
        """A try succeeded."""
        with self._lock:
            self._delay = self._until = 0.0
            self._trying = False


def end(future: Future[Any]) -> None:
    """Cancels what nobody works on any more; whoever waits for several at once is told, too."""
    future.cancel()
    future.set_running_or_notify_cancel()


@contextmanager
def needing(what: str) -> Iterator[None]:
    """To import a client: where it is not installed, a MissingPackageError says what is needed."""
    try:
        yield
    except ImportError as error:
        raise MissingPackageError(f"{what} ({error})") from error


def shown(url: str) -> str:
    """A URL without user, password and query; nothing of one in which a password may end early, at a letter that parts a URL."""
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
        if ":" not in host or "@" not in f"{parts.path}{parts.query}{parts.fragment}":
            return f"{parts.scheme}://{host}{parts.path}"
    except ValueError:
        pass
    return "the URL of the pool"
