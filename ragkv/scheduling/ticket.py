"""One request in the line."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Event, Lock

import torch


def _nothing() -> int:
    return 0


def _shut() -> Lock:
    gate = Lock()
    gate.acquire()
    return gate


@dataclass(eq=False)
class Ticket:
    """A prompt that waits to be computed, is computed, or whose answer is decoded.

    Attributes:
        namespace: of its passages.
        tokens: of the prompt that its cache does not hold yet.
        needs_bytes: what prompt and answer take in memory.
        answer_bytes: what of it is the answer's.
        held_bytes: what of it is in memory already, in the cache that the prompt goes on in.
        device: where.
        priority: a higher one goes first.
        deadline_s: ``perf_counter()`` behind which nobody wants the answer.
        stop: set where nobody waits for it any more.
        closing: set where nobody is answered any more.
        stored: looks how many of the tokens are stored, so that they need not be computed.
        prefetch: begins to move what is stored to memory.
        reused: tokens that are stored, as far as anybody looked.
        number: the how manieth it is.
        overtaken: how many began before it and came later, as far as its policy counts them.
        gate: opened when it may begin, or has failed. No Event, whose lock is not reentrant: garbage that is collected within its
            ``wait()`` may be an answer whose end lets this one begin.
        failed: why it never will.
        asked_s, begun_s: ``perf_counter()`` at which it came, and began.
    """

    namespace: str
    tokens: int
    needs_bytes: int = 0
    answer_bytes: int = 0
    held_bytes: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    priority: int = 0
    deadline_s: float = math.inf
    stop: Event | None = None
    closing: Event | None = None
    stored: Callable[[], int] = _nothing
    prefetch: Callable[[], object] = _nothing
    reused: int = 0
    number: int = 0
    overtaken: int = 0
    asked_s: float = 0.0
    begun_s: float = 0.0
    gate: Lock = field(default_factory=_shut)
    failed: Exception | None = None

    @property
    def new_bytes(self) -> int:
        """What memory must still have for it."""
        return self.needs_bytes - self.held_bytes

    @property
    def computed(self) -> int:
        """Tokens that have to be computed, at least."""
        return self.tokens - self.reused
