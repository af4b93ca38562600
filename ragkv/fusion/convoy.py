"""What of a prompt lies whole in CPU memory, brought to the device a few layers of all chunks at a time, while it computes.

A layer of a chunk lies in one piece of its payload, so a few layers of it are one copy, whatever they consist of; and all that came
is placed by one launch for all that is of a kind, out of a table that is made once a prompt. L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ragkv.fusion.bus import Bus
from ragkv.kernels import Brought, Impl, Layers, Run, placing
from ragkv.model.cache import FusedCache

#: Layers that are brought together: fewer, and the host copies longer than the bus takes; more, and work begins later.
GROUP = 4
_AHEAD = 3  # groups that are on the device at once: one is placed, the others come
_ALIGNED = 16  # bytes that kernels read at once
_BLOCK = 512  # bytes, where memory of a device begins


class Cut(NamedTuple):
    """A chunk by groups of layers that follow each other.

    Attributes:
        parts: the bytes of each.
        spans: ``[groups, 2]`` the addresses between which they lie.
    """

    parts: list[Tensor]
    spans: NDArray[np.int64]


class Freight:
    """A chunk in CPU memory, looked at once for all prompts that it comes to.

    Args:
        data: uint8, as it is held.
        spans: between which bytes of it each layer lies.
        layers: all of them, in that memory.

    Attributes:
        layers: as given.
    """

    def __init__(self, data: Tensor, spans: Sequence[tuple[int, int]], layers: Layers):
        self.layers: Layers = layers
        self._data, self._spans, self._cuts = data, spans, dict[tuple[range, ...], Cut]()

    @classmethod
    def of(cls, data: Tensor, spans: Sequence[tuple[int, int]], layers: Layers) -> Freight | None:
        """``None`` where some of it had to be copied to be read, and does not lie there."""
        first, last = data.data_ptr(), data.data_ptr() + len(data)
        every = [part for pair in layers.pairs for stored in pair for part in stored.parts]
        there = all(first <= part.data_ptr() < last and part.is_contiguous() for part in every)
        return cls(data, spans, layers) if there else None

    def cut(self, groups: tuple[range, ...]) -> Cut:
        """Its bytes by groups of layers."""
        cut = self._cuts.get(groups)
        if cut is None:
            spans = [(self._spans[group.start][0], self._spans[group.stop - 1][1]) for group in groups]
            parts = [self._data[begin:end] for begin, end in spans]
            cut = self._cuts[groups] = Cut(parts, np.array(spans, dtype=np.int64) + self._data.data_ptr())
        return cut


class Convoy:
    """Brings and places one prompt's.

    Args:
        bus: of the device.
        device: where the prompt is.
        freight: the chunks, by key.
        runs: where they go, by key, from where they are now.
        cache: of the prompt, written.
        layers: those that are placed.
        impl: what places.

    Attributes:
        done: layers below are placed.
    """

    def __init__(
        self,
        bus: Bus,
        device: torch.device,
        freight: dict[bytes, Freight],
        runs: Sequence[tuple[bytes, Run]],
        cache: FusedCache,
        layers: range,
        impl: Impl,
    ):
        self._bus, self._cache, self._impl = bus, cache, impl
        self._groups = tuple(range(first, min(first + GROUP, layers.stop)) for first in layers[::GROUP])
        self.done: int = layers.start
        self._placed = 0  # groups
        cuts = [each.cut(self._groups) for each in freight.values()]
        self._here = list(zip(*(cut.parts for cut in cuts), strict=True))  # group by group
        self._there = list[Sequence[Tensor]]()
        self._ring, self._sizes, shifts = self._packed(np.stack([cut.spans for cut in cuts], axis=1))
        brought = zip(freight.items(), shifts.T, strict=True)
        there = {key: Brought(each.layers, self._ring, shift) for (key, each), shift in brought}
        self._runs = [Run(there[key], run.start, run.tokens, turns=run.turns) for key, run in runs]
        self._sent = list[Callable[[], object]]()
        self._free = list[Any]()  # when what a group stood in may be written to
        self._placing: tuple[Layers, Callable[[int], None]] | None = None
        for _ in self._groups[:_AHEAD]:
            self._send()

    def upto(self, layer: int) -> None:
        """Have all layers placed up to this one, and those that it came with."""
        while self.done <= layer:
            self._sent[self._placed]()
            if self._placing is None or self._placing[0] is not self._cache.laid:  # it is in a room by now
                laid = self._cache.laid
                self._placing = laid, placing(laid, self._runs, self._groups, impl=self._impl)
            self._placing[1](self._placed)
            self._free.append(self._bus.mark())
            self.done = self._groups[self._placed].stop
            self._placed += 1
            if len(self._sent) < len(self._groups):
                self._send()

    def _send(self) -> None:
        number = len(self._sent)
        here, there = self._here[number], self._split(number)
        free = self._free[number - _AHEAD] if number >= _AHEAD else None
        self._there.append(there)

        def load() -> list[Tensor]:
            for part, place in zip(here, there, strict=True):
                place.copy_(part, non_blocking=True)
            return [self._ring]

        self._sent.append(self._bus.send(load, free))

    def _split(self, number: int) -> Sequence[Tensor]:
        """Where the parts of a group go: as a rule where those went whose place it takes."""
        before, sizes = number - len(self._ring), self._sizes[number]
        if before >= 0 and sizes == self._sizes[before]:
            return self._there[before]
        return self._ring[number % len(self._ring)].split_with_sizes(sizes)[1::2]

    def _packed(self, spans: NDArray[np.int64]) -> tuple[Tensor, list[list[int]], NDArray[np.int64]]:
        """Where groups stand on the device: one chunk behind the other, each aligned as it is here.

        Args:
            spans: ``[groups, chunks, 2]`` the addresses between which they lie.

        Returns:
            Room for some groups at once; for each group how it fills that: bytes of a gap, a chunk, a gap ... to the end; and
            ``[L, chunks]`` by how many bytes each layer's addresses are greater there.
        """
        begins, sizes = spans[..., 0], spans[..., 1] - spans[..., 0]
        taken = _up(begins % _ALIGNED + sizes, _ALIGNED)
        ends = taken.cumsum(axis=1)
        at = ends - taken + begins % _ALIGNED
        ring = self._bus.room(len(self._groups[:_AHEAD]), _up(int(ends.max()), _BLOCK))
        rooms = ring.data_ptr() + np.arange(len(spans)) % len(ring) * ring.shape[1]
        edges = np.full((len(spans), 2 * at.shape[1] + 2), ring.shape[1])
        edges[:, 0], edges[:, 1:-1:2], edges[:, 2:-1:2] = 0, at, at + sizes
        filled = (edges[:, 1:] - edges[:, :-1]).tolist()
        # Nothing is asked of the layers in front.
        lengths = [self._groups[0].stop, *(len(group) for group in self._groups[1:])]
        return ring, filled, np.repeat(rooms[:, None] + at - begins, lengths, axis=0)


def _up(size: Any, step: int) -> Any:
    """The next multiple."""
    return -(-size // step) * step
