"""What of a prompt lies whole in CPU memory, brought to the device a few layers of all chunks at a time, while it computes.

A layer of a chunk lies in one piece of its payload, so a few layers of it are one copy, whatever they consist of; and all that came
is placed by one launch for all that is of a kind, out of a table that is made once a prompt. L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ragkv.fusion.bus import Bus
from ragkv.kernels import Brought, Impl, Layers, Run, placing
from ragkv.model.cache import FusedCache

#: Layers that are brought together: fewer, and the host copies longer than the bus takes; more, and work begins later.
GROUP = 4
_AHEAD = 3  # groups that are on the device at once: one is placed, the others come
_ALIGNED = 16  # bytes that kernels read at once
_BLOCK = 512  # bytes, where memory of a device begins


class Freight(NamedTuple):
    """A chunk in CPU memory.

    Attributes:
        data: uint8, as it is held.
        spans: between which bytes of it each layer lies.
        layers: all of them, in that memory.
    """

    data: Tensor
    spans: Sequence[tuple[int, int]]
    layers: Layers

    @classmethod
    def of(cls, data: Tensor, spans: Sequence[tuple[int, int]], layers: Layers) -> Freight | None:
        """``None`` where some of it had to be copied to be read, and does not lie there."""
        first, last = data.data_ptr(), data.data_ptr() + len(data)
        every = [part for pair in layers.pairs for stored in pair for part in stored.parts]
        there = all(first <= part.data_ptr() < last and part.is_contiguous() for part in every)
        return cls(data, spans, layers) if there else None

    def between(self, group: range) -> tuple[int, int]:
        """The bytes of some layers that follow each other."""
        return self.spans[group.start][0], self.spans[group.stop - 1][1]

    def part(self, group: range) -> Tensor:
        """Some layers that follow each other."""
        begin, end = self.between(group)
        return self.data[begin:end]


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
        self._bus, self._freight, self._cache, self._impl = bus, freight, cache, impl
        self._groups = [range(first, min(first + GROUP, layers.stop)) for first in layers[::GROUP]]
        self.done: int = layers.start
        self._placed = 0  # groups
        packed, size = self._packed()
        self._ring = bus.room(len(self._groups[:_AHEAD]), size)
        self._copies, there = self._brought(packed)
        self._runs = [replace(run, source=there[key]) for key, run in runs]
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
        copies, free = self._copies[number], self._free[number - _AHEAD] if number >= _AHEAD else None

        def load() -> list[Tensor]:
            for there, here in copies:
                there.copy_(here, non_blocking=True)
            return [self._ring]

        self._sent.append(self._bus.send(load, free))

    def _packed(self) -> tuple[list[list[int]], int]:
        """For each group the sizes of a gap, a chunk's bytes, a gap ... in what it stands in; and how much the largest takes."""
        packed, most = [], 0
        for group in self._groups:
            at, sizes = 0, list[int]()
            for freight in self._freight.values():
                begin, end = freight.between(group)
                gap = (freight.data.data_ptr() + begin - at) % _ALIGNED
                sizes += [gap, end - begin]
                at += gap + end - begin
            packed.append(sizes)
            most = max(most, at)
        return packed, -(-most // _BLOCK) * _BLOCK

    def _brought(self, packed: list[list[int]]) -> tuple[list[list[tuple[Tensor, Tensor]]], dict[bytes, Brought]]:
        """What is copied, and to where, group by group; and what the chunks are there."""
        copies = list[list[tuple[Tensor, Tensor]]]()
        shifts = {key: [0] * len(freight.spans) for key, freight in self._freight.items()}
        for number, (group, sizes) in enumerate(zip(self._groups, packed, strict=True)):
            room = self._ring[number % len(self._ring)]
            at, to = room.data_ptr(), room[: sum(sizes)].split_with_sizes(sizes)[1::2]
            copies.append(list(zip(to, (freight.part(group) for freight in self._freight.values()), strict=True)))
            for place, (key, freight) in enumerate(self._freight.items()):
                at += sizes[2 * place]
                moved = at - freight.data.data_ptr() - freight.between(group)[0]
                shifts[key][group.start : group.stop] = [moved] * len(group)
                at += sizes[2 * place + 1]
        there = {key: Brought(freight.layers, self._ring, shifts[key]) for key, freight in self._freight.items()}
        return copies, there
