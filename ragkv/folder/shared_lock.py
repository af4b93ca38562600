"""Keeps threads out of LMDB while the process is forked, or the folder closed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class SharedLock:
    """Lets any number of threads in, and keeps new ones out while it is shut, be it by several.

    LMDB's handle can only be closed in the child if no thread was inside it: that thread is not there to come out.
    """

    def __init__(self) -> None:
        self._inside: dict[int, int] = {}
        self.anew()

    def anew(self) -> None:
        """In a fork: nobody shuts it, and no other thread is inside."""
        self._changed, self._shut = threading.Condition(), 0
        me = threading.get_ident()
        self._inside = {thread: count for thread, count in self._inside.items() if thread == me}

    def __enter__(self) -> None:
        thread = threading.get_ident()
        with self._changed:
            while self._shut and thread not in self._inside:
                self._changed.wait()
            self._inside[thread] = self._inside.get(thread, 0) + 1

    def __exit__(self, *_: object) -> None:
        thread = threading.get_ident()
        with self._changed:
            self._inside[thread] -= 1
            if not self._inside[thread]:
                del self._inside[thread]
                self._changed.notify_all()

    @contextmanager
    def left(self) -> Iterator[None]:
        """A block in which this thread is outside, however often it came in."""
        thread = threading.get_ident()
        with self._changed:
            count = self._inside.pop(thread, 0)
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                try:
                    while self._shut:
                        self._changed.wait()
                finally:
                    if count:
                        self._inside[thread] = count

    def shut(self) -> None:
        """Waits until no other thread is inside, and keeps all out."""
        with self._changed:
            self._shut += 1
            try:
                while self._inside.keys() - {threading.get_ident()}:
                    self._changed.wait()
            except BaseException:
                self.open()
                raise

    def open(self) -> None:
        """Lets threads in again, once for each :meth:`shut`."""
        with self._changed:
            self._shut -= 1
            self._changed.notify_all()
