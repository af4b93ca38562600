"""A prompt's chunks that come over a network: what the order of its work asks about them."""

from __future__ import annotations

from ragkv.fusion.placement import Placement
from ragkv.fusion.timing import Timer
from ragkv.model.turns import look
from ragkv.store.source import Progress

#: Whoever waits looks so often whether anybody still wants the prompt.
_LOOK_S = 0.1


class Arriving:
    """A :class:`~ragkv.fusion.course.Coming` out of a batch. On the CPU alone, where all layers of a chunk are placed together.

    Args:
        placement: of the prompt.
        timer: counts the stage ``place``.
    """

    def __init__(self, placement: Placement, timer: Timer):
        self._placement, self._batch, self._timer = placement, placement.batch, timer
        self._index = placement.to_read()

    def away(self) -> list[int]:
        """See :class:`~ragkv.fusion.course.Coming`."""
        return [number for number, index in self._index.items() if self._batch.away(index)]

    def begin(self) -> None:
        """See :class:`~ragkv.fusion.course.Coming`."""
        self._batch.begin()

    def here(self, number: int, limit_s: float) -> bool:
        """See :class:`~ragkv.fusion.course.Coming`. It looks whether the prompt is still wanted."""
        look()
        with self._timer.stage("place"):
            return self._batch.here(self._index[number], min(limit_s, _LOOK_S))

    def progress(self, number: int) -> Progress:
        """See :class:`~ragkv.fusion.course.Coming`."""
        return self._batch.progress(self._index[number])

    def give_up(self, number: int) -> list[int]:
        """See :class:`~ragkv.fusion.course.Coming`."""
        given = self._index[number]
        late = [number for number, index in self._index.items() if index == given]
        self._batch.give_up(given)
        self._placement.spare(late, "late")
        return late

    def place_front(self, stop: int) -> None:
        """See :class:`~ragkv.fusion.course.Coming`."""
        with self._timer.stage("place"):
            self._placement.place_front(stop)
