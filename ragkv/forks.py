"""What a forked child begins anew: the threads that waited for it, or held its lock, are not there."""

from __future__ import annotations

import os
from threading import RLock
from typing import Protocol, TypeVar
from weakref import WeakSet


class Anew(Protocol):
    """What holds locks, or waits for threads."""

    def anew(self) -> None:
        """As it was made, without what threads have begun."""


Held = TypeVar("Held", bound=Anew)

_all: WeakSet[Anew] = WeakSet()


def anew_in_forks(held: Held) -> Held:
    """Have something begun anew in each child that is forked while it lives. Returns it."""
    _all.add(held)
    return held


class ForkedLock:
    """A reentrant lock that is free in each child, whoever holds it in the parent.

    Attributes:
        held: to be held; this process's.
    """

    def __init__(self) -> None:
        self.anew()
        anew_in_forks(self)

    def anew(self) -> None:
        """Another one."""
        self.held: RLock = RLock()


def _after_fork_in_child() -> None:
    for each in list(_all):
        each.anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
