"""What was said so far, with its keys and values: the next turn goes on behind it, and nothing of it is computed again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event, Lock

from ragkv.errors import ConversationError, OfOneProcess
from ragkv.forks import anew_in_forks
from ragkv.model.cache import FusedCache


class Line:
    """What all turns in one cache share.

    Attributes:
        cache: of the prompt and whatever came behind it.
        turns: those whose tokens stand there, one behind the other.
        begun: those that stand there once the turn that is begun has the cache.
    """

    def __init__(self, cache: FusedCache):
        self.cache: FusedCache = cache
        self.turns: tuple[object, ...] = ()
        self.begun: tuple[object, ...] = ()
        self.anew()
        anew_in_forks(self)

    def anew(self) -> None:
        """In a fork: nobody answers yet."""
        self._lock, self._stop = Lock(), Event()

    @contextmanager
    def alone(self, stop: Event | None) -> Iterator[None]:
        """The cache for one caller. One that is being stopped is waited for: it ends behind the token at hand."""
        lock = self._lock
        if not lock.acquire(blocking=self._stop.is_set()):
            raise ConversationError(
                "an answer is being made behind this turn: a conversation is gone on with by one caller at a time. Wait for it, or "
                "end or close() its stream"
            )
        try:
            self._stop = stop or Event()
            yield
        finally:
            lock.release()


@dataclass(frozen=True, eq=False)
class Past(
    OfOneProcess, instead="leave it out, dataclasses.replace(answer, past=None), and go on from it where its engine is"
):
    """A prompt and its answer, to be gone on from. It holds its whole cache in memory as long as it is held.

    Attributes:
        ids: of all that was said.
        held: how many of them have their KV in ``cache``; the last one or few are computed with the next turn.
        fingerprint: of the model that computed them.
        anchor: what its passages were read behind.
        namespace: of its passages.
    """

    ids: tuple[int, ...]
    held: int
    fingerprint: str
    anchor: tuple[int, ...]
    namespace: str
    line: Line = field(repr=False)
    turns: tuple[object, ...] = field(default=(), repr=False)

    @property
    def cache(self) -> FusedCache:
        """A transformers ``Cache``; of the first ``held`` tokens, and perhaps of turns that came later."""
        return self.line.cache

    @property
    def stands(self) -> bool:
        """Whether its KV are there: no other answer went on from an earlier turn in its place."""
        return self.line.turns[: len(self.turns)] == self.turns

    @contextmanager
    def going_on(self, stop: Event | None = None) -> Iterator[tuple[object, ...]]:
        """A block in which the next turn is computed in the same cache; yields the turns that stand there then.

        Args:
            stop: stops the answer when it is set.

        Raises:
            ConversationError: another caller goes on from here just now, or went on from an earlier turn in its place.
        """
        with self.line.alone(stop):
            if not self.stands:
                raise ConversationError(
                    "this turn's KV are not there any more: another answer went on from an earlier turn in its place"
                )
            self.line.begun = (*self.turns, object())
            yield self.line.begun

    def taken(self) -> FusedCache:
        """The cache, for the turn that is begun to be written behind this one.

        Another turn that went on from here before is overwritten: whoever tries to go on behind that one is told so.
        """
        self.line.turns = self.line.begun
        return self.line.cache
