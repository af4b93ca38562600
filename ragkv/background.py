"""Work that nobody waits for, one piece after the other, in a thread that is there only while there is work."""

from __future__ import annotations

import atexit
import logging
from collections import deque
from collections.abc import Callable
from threading import Condition, Event, Thread
from weakref import WeakSet

from ragkv.forks import anew_in_forks

logger: logging.Logger = logging.getLogger(__name__)

#: Does the work; ends early where the event is set.
Work = Callable[[Event], object]


class Background:
    """A queue of work and its thread. Where it is closed, or the process ends, what was not begun is dropped.

    A fork begins with no work: its parent does it.

    Args:
        name: of the thread.
        most: work that waits at most; more is dropped.

    Attributes:
        guard: a reentrant lock, free in a fork; for what the work changes.
    """

    def __init__(self, name: str, most: int):
        self._name, self._most = name, most
        self.anew()
        _all.add(anew_in_forks(self))

    def anew(self) -> None:
        """As it was made."""
        self.guard: Condition = Condition()
        self._closing = Event()
        self._waiting, self._thread = deque[Work](), None

    _thread: Thread | None

    def add(self, work: Work) -> bool:
        """Have something done; whether it will be."""
        with self.guard:
            if self._closing.is_set() or len(self._waiting) >= self._most:
                return False
            self._waiting.append(work)
            if self._thread is None:
                thread = Thread(target=self._run, name=self._name, daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # the interpreter ends
                    self._waiting.clear()
                    return False
                self._thread = thread
        return True

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing is left to do; whether that is so."""
        with self.guard:
            return self.guard.wait_for(lambda: self._thread is None, timeout_s)

    def close(self) -> None:
        """Drop what is left, and wait for the end of what was begun. Closing twice is fine."""
        self._closing.set()
        thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while True:
            with self.guard:
                if not self._waiting or self._closing.is_set():
                    self._waiting.clear()
                    self._thread = None
                    self.guard.notify_all()
                    return
                work = self._waiting.popleft()
            try:
                work(self._closing)
            except Exception as error:
                logger.warning("%s gave up: %s", self._name, repr(error))
            del work  # and all that it holds


_all: WeakSet[Background] = WeakSet()


def _close_all() -> None:
    """Before the interpreter ends: a thread that runs a model then may end the process."""
    for each in list(_all):
        each.close()


atexit.register(_close_all)
