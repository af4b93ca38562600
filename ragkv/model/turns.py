"""Whose turn it is to run a model: one lock for everything that shares an attention switch."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from threading import Lock, get_ident, local
from weakref import WeakValueDictionary

from transformers import PreTrainedConfig

from ragkv.forks import ForkedLock


class _Own(local):
    """A thread's."""

    look: Callable[[], object] | None = None


_own = _Own()


@contextmanager
def looking(look: Callable[[], object]) -> Iterator[None]:
    """A block that calls ``look`` before each turn that it takes, and each forward that it asks for; it ends what is not wanted any
    more by raising.
    """
    _own.look = look
    try:
        yield
    finally:
        _own.look = None


def look() -> None:
    """Look whether what this thread does is wanted, see :func:`looking`."""
    if _own.look is not None:
        _own.look()


class Turns:
    """A reentrant lock that lets threads in in the order in which they came.

    A thread that gives its turn back while others wait stands behind them when it asks again, so work done piece by piece starves
    nobody. A turn must not be held across a ``yield`` to a caller who may finish elsewhere.

    Args:
        config: what the turns are about; kept alive.
    """

    def __init__(self, config: PreTrainedConfig):
        self.config = config
        self.depth: int = 0  # how often the thread whose turn it is has entered
        self.taken: int = 0  # how many turns there were
        self._owner: int | None = None
        self._guard = Lock()
        self._waiting: deque[tuple[int, Lock]] = deque()

    def __enter__(self) -> None:
        me = get_ident()
        if self._owner == me:
            self.depth += 1
            return
        look()
        gate = Lock()
        try:
            with self._guard:
                if self._owner is None:
                    self._owner, self.depth = me, 1
                    self.taken += 1
                    return
                gate.acquire()
                self._waiting.append((me, gate))
            gate.acquire()
        except BaseException:  # interrupted, most likely while waiting
            with self._guard:
                if (me, gate) in self._waiting:
                    self._waiting.remove((me, gate))
                elif self._owner == me:
                    self._pass_on()
            raise

    def __exit__(self, *exc: object) -> None:
        if self._owner != get_ident():
            raise RuntimeError("a turn must end in the thread that took it")
        self.depth -= 1
        if not self.depth:
            me = self._owner
            try:
                with self._guard:
                    self._pass_on()
            except BaseException:  # interrupted, before that or behind it
                with self._guard:
                    if self._owner == me:
                        self._pass_on()
                raise

    @property
    def free(self) -> bool:
        """Whether nobody has or wants it just now."""
        return self._owner is None and not self._waiting

    @property
    def mine(self) -> bool:
        """Whether it is this thread's turn."""
        return self._owner == get_ident()

    def alone(self) -> None:
        """In a forked child: the threads that waited are not there, and what this one held for the fork is given back."""
        self._guard, self._waiting = Lock(), deque()
        self.depth -= 1
        self._owner = get_ident() if self.depth else None

    def _pass_on(self) -> None:
        if self._waiting:
            self._owner, gate = self._waiting.popleft()
            self.depth = 1
            self.taken += 1
            gate.release()
        else:
            self._owner = None


_made: WeakValueDictionary[int, Turns] = WeakValueDictionary()
_making = ForkedLock()


def turns(config: PreTrainedConfig) -> Turns:
    """The turns of all that reads its attention implementation from ``config``: a model, its parts, and wrappers about it.

    Args:
        config: the text config of a decoder.
    """
    _watch_forks()
    with _making.held:
        found = _made.get(id(config))
        if found is None:
            found = _made[id(config)] = Turns(config)
        return found


class _Forking(local):
    """What a thread has taken to fork: several may fork at once."""

    held: Sequence[Turns] = ()


_forking = _Forking()


def _before_fork() -> None:
    """Wait until nobody runs a model: in the child whoever did is not there to give it back, or to undo a switched attention."""
    with _making.held:
        _forking.held = list(_made.values())
    for each in _forking.held:
        each.__enter__()


def _after_fork_in_parent() -> None:
    for each in _forking.held:
        each.__exit__()
    _forking.held = ()


def _after_fork_in_child() -> None:
    for each in _forking.held:
        each.alone()
    _forking.held = ()


@cache
def _watch_forks() -> None:
    """Registered when a model is first run, behind the hooks of the store: so its locks are taken after the turns, as in a pass."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(
            before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child
        )
