"""In which order a prompt's rows are computed where some of its chunks are still on their way from a pool.

What stands in front of the first chunk that is away needs nothing of it: it is computed while that comes, as by Cake
(arXiv:2410.03065), from the front, and chunks are asked for from the back. N tokens of the prompt, S of them computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from ragkv.fusion.layout import Layout
from ragkv.store import Rates
from ragkv.store.source import Progress

#: Chunks are late once they took this many times as long as they should, and this share of the time that computing them takes; or
#: that share of the time that computing the whole prompt takes, if that is less.
_LATE, _SLACK = 1.1, 0.03
#: For this share of it nobody waits idle for what is not known to come soon.
_IDLE = 0.02
#: Fewer rows are not worth a forward of their own; chunks are given up until they have so many tokens.
_LEAST_ROWS, _AT_ONCE = 32, 192
_LEAST_S = 1e-3


class Coming(Protocol):
    """The prompt's stored chunks, by their numbers in it."""

    def away(self) -> list[int]:
        """Those to place that come over a network, ascending."""

    def begin(self) -> None:
        """Asks for them."""

    def here(self, number: int, limit_s: float) -> bool:
        """Waits at most so long; whether one is here, or cannot be had, which placing it says."""

    def progress(self, number: int) -> Progress:
        """How far one is on its way, with those that were asked for with it."""

    def give_up(self, number: int) -> list[int]:
        """One comes too slowly; the numbers of all chunks that are not placed because of that."""

    def place_front(self, stop: int) -> None:
        """Has all chunks placed that begin in front of a slot."""


class Course:
    """Rows one part after the other, each as soon as what stands in front of it is placed.

    While nothing is left that needs no chunk on its way, the first of these is computed. If it comes meanwhile it is placed all the
    same; if it is late, it is given up, and computed to its end.

    Args:
        layout: the prompt, its positions ascending.
        rows: ``[S]`` to compute, ascending.
        coming: the chunks.
        rates: figures by which a chunk that is late is computed instead; ``None``: all are waited for.
    """

    def __init__(self, layout: Layout, rows: Tensor, coming: Coming, rates: Rates | None = None):
        self._layout, self._coming, self._rates = layout, coming, rates
        self._chosen = torch.zeros(layout.tokens, dtype=torch.bool, device=rows.device)
        self._chosen[rows] = True
        self._full_s = 0.0 if rates is None else rates.compute_s(layout.tokens - layout.held, layout.held)
        self._done = 0  # slots in front of this one need nothing more

    @property
    def rows(self) -> Tensor:
        """Those that were computed and stayed so, ascending; known behind the last part."""
        return self._chosen.nonzero()[:, 0]

    def __iter__(self) -> Iterator[Tensor]:
        """The parts: slots to compute, ascending."""
        chunks = self._layout.chunks
        self._coming.begin()
        away, begun = self._coming.away(), 0  # tokens of the first that is away
        while away:
            first = chunks[away[0]]
            if self._coming.here(away[0], 0):
                away, begun = away[1:], 0
                continue
            if int(self._chosen[self._done : first.start].sum()) >= _LEAST_ROWS:
                yield from self._part(first.start)
                continue
            count, left_s = self._meanwhile(away, begun)
            if count == len(first.chunk) - begun:
                given = 0
                while not given or (away and given < _AT_ONCE and not self._coming.here(away[0], 0)):
                    given += len(chunks[away[0]].chunk)
                    for late in self._coming.give_up(away[0]):
                        self._chosen[chunks[late].start : chunks[late].stop] = True
                        away.remove(late)
                self._done, begun = self._done + begun, 0
            elif count:
                yield from self._part(first.start)
                yield torch.arange(count, device=self._chosen.device) + first.start + begun
                begun += count
            else:
                self._coming.here(away[0], left_s)
        yield from self._part(self._layout.tokens)

    def _part(self, stop: int) -> Iterator[Tensor]:
        """The rows up to a slot, where there are any, over what stands in front of it."""
        self._coming.place_front(stop)
        rows = self._chosen[self._done : stop].nonzero()[:, 0] + self._done
        self._done = stop
        if len(rows):
            yield rows

    def _meanwhile(self, away: list[int], begun: int) -> tuple[int, float]:
        """How many more tokens of the first chunk to compute before it is looked for again; if none, how long to wait for it.

        Args:
            away: numbers of those that are on their way.
            begun: tokens of the first that are computed.
        """
        if self._rates is None:
            return 0, math.inf
        first = self._layout.chunks[away[0]]
        left = len(first.chunk) - begun
        compute_s = self._rates.compute_s(left, first.start + begun)
        found = self._coming.progress(away[0])
        should_s = 0.0 if found.bytes_per_s is None else (found.came + found.left) / found.bytes_per_s
        left_s = self._left_s(away, found, should_s)
        if left_s >= compute_s:
            return left, 0.0
        count = int(left * left_s / compute_s)
        if found.since_s > max(should_s, _IDLE * self._full_s):
            count = min(left, max(count, _LEAST_ROWS))
        return (count, 0.0) if count >= _LEAST_ROWS else (0, left_s)

    def _left_s(self, away: list[int], found: Progress, should_s: float) -> float:
        """Seconds until chunks may be here: as fast as the last ones came, a little later, then as these do; else as long again."""
        assert self._rates is not None
        chunks = self._layout.chunks
        if should_s:
            whole_s = self._rates.compute_s(sum(len(chunks[number].chunk) for number in away), chunks[away[0]].start)
            late_s = should_s + min(max((_LATE - 1) * should_s, _SLACK * whole_s), _SLACK * self._full_s)
            if found.since_s < late_s:
                left_s = should_s - found.since_s
                return max(_LEAST_S, left_s if left_s > 0 else min(late_s - found.since_s, -left_s))
        return max(_LEAST_S, found.left * found.since_s / found.came if found.came else found.since_s)
