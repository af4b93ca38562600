"""Placing stored keys and values into the prompt's cache: what is placed, and when.

N tokens of the prompt, H kv heads, T tokens of a chunk, D head_dim, R rotated dimensions, P tokens of a pool's block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ragkv.chunk import Chunk, ChunkKV
from ragkv.fusion.bus import bus
from ragkv.fusion.convoy import Convoy, Freight
from ragkv.fusion.layout import Layout, Placed
from ragkv.fusion.supply import Stretch, Supply, at_room, layers_of
from ragkv.fusion.timing import Timer
from ragkv.fusion.turning import Turning
from ragkv.kernels import Piece, Run, Stored, place, place_layers, place_pieces, rotation_tables
from ragkv.kernels.layers import joined
from ragkv.lazy import lazy
from ragkv.model.cache import FusedCache
from ragkv.store import Target

if TYPE_CHECKING:
    from ragkv.model.decoder import Decoder
    from ragkv.store import Batch, Moved


class _Sorted(NamedTuple):
    """A prompt's chunks.

    Attributes:
        runs: what lies on the device.
        carried: what lies in CPU memory, as keys and where they go.
        freight: what these are, by key.
        stretches: the rest, placed layer by layer.
    """

    runs: list[Run]
    carried: list[tuple[bytes, Run]]
    freight: dict[bytes, Freight]
    stretches: list[Stretch]


class Placement:
    """Puts the stored chunks of one prompt into its cache, keys turned to their new positions; knows what is there already.

    On the CPU chunks are taken one after the other, and all of a chunk's layers at once, so that besides the prompt's cache no more
    than one chunk's KV is in memory. On an accelerator all layers of all that lies there are taken in one go, out of a pool's
    blocks, before the model runs; what lies elsewhere follows layer by layer, as its tier holds it (encoded, say), and the next
    layers are loaded while one computes.

    Args:
        decoder: the model.
        cache: written.
        layout: the prompt.
        batch: an open read of the chunks, so that none is evicted meanwhile. On the CPU it is done with each once it is placed.
        keys: for every chunk to place, the key of the KV that it takes.
        fresh: KV that the batch does not hold, by key.
        paths: KV of chunks that prompts computed before, by :attr:`~ragkv.fusion.layout.Placed.path`.
        timer: counts the stage ``place``.
        by_layer: as on an accelerator; by default where there is one.
        front: KV that the prompt begins with, and that are not in the cache yet.

    Attributes:
        by_layer: whether layers are placed before chunks are done.
        batch: the read.
        fresh: what it does not hold.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: FusedCache,
        layout: Layout,
        batch: Batch,
        keys: Mapping[Chunk, bytes],
        fresh: dict[bytes, ChunkKV],
        timer: Timer | None = None,
        by_layer: bool | None = None,
        paths: Mapping[bytes, ChunkKV] | None = None,
        front: ChunkKV | None = None,
    ):
        self.batch: Batch = batch
        self.fresh: dict[bytes, ChunkKV] = fresh
        self._decoder, self._cache, self._keys = decoder, cache, keys
        self._timer = Timer() if timer is None else timer
        self._done = 0  # layers below are placed, or were not asked for
        self._begun = False  # what lies on the device is placed
        self._convoy: Convoy | None = None  # of what is brought from CPU memory
        self._paths: Mapping[bytes, ChunkKV] = {}
        self._index = {key: number for number, key in enumerate(batch.keys)}
        self.take(layout, {} if paths is None else paths)
        self.by_layer: bool = decoder.device.type != "cpu" if by_layer is None else by_layer
        self._bus = bus(decoder.device) if self.by_layer and len({spec.device for spec in decoder.specs}) == 1 else None
        self._spared: dict[int, str] = {}  # slots at which chunks begin that are not placed, and why not
        self._front = 0  # chunks that begin below this slot are placed in all layers, or spared
        self._opening = front if self.by_layer and front is not None and self._supply.beside(front) else None
        if self._opening is None:
            with self._timer.stage("place"):
                cache.append(front)

    def take(self, layout: Layout, paths: Mapping[bytes, ChunkKV]) -> None:
        """Have these KV too, and place what a layout of the same prompt says; also where others are placed by now."""
        if self._begun:
            self.upto(len(self._decoder.layers) - 1)  # by what the layout said before
        self._layout, self._paths = layout, {**self._paths, **paths}
        self._turning = Turning(self._decoder.rotations, layout)
        self._given = {**self.fresh, **self._paths}
        self._supply = Supply(self._cache, self.batch, self._index, self._given)
        self._chunks = [
            (placed, placed.path if placed.whole else self._keys[placed.chunk])
            for placed in layout.chunks
            if placed.path or placed.chunk in self._keys
        ]
        self._mended = [placed for placed in layout.chunks if placed.path and not placed.whole]
        for layer in range(self._done):
            for placed, key in self._chunks:
                if key in paths:
                    self._place(placed, layer, paths[key].keys[layer], paths[key].values[layer])
            self._mend(layer)

    def bytes_read(self, moved: Mapping[bytes, Moved]) -> int:
        """Bytes read from disk so far, for what was moved to memory for this prompt too."""
        return self.batch.bytes_read + sum(moved[key].bytes_read for key in self._index.keys() & moved.keys())

    def sources(self, moved: Mapping[bytes, Moved]) -> list[str]:
        """Where each chunk's KV came from, in prompt order; what was moved to memory for this prompt, from where it was before."""

        def source(placed: Placed, key: bytes) -> str:
            if placed.path:
                return "path" if placed.exact else "variant"
            if key in self.fresh:
                return "computed"
            if placed.start in self._spared:
                return self._spared[placed.start]
            return moved[key].tier if key in moved else str(self.batch.tiers[self._index[key]])

        return [source(placed, key) for placed, key in self._chunks]

    def levels(self) -> list[str]:
        """The lossy level of a pool at which each chunk's KV were taken, in prompt order; empty for those as they were stored."""
        held = {key: self.batch.held_at[index] or "" for key, index in self._index.items()}
        return [
            "" if placed.path or key in self.fresh or placed.start in self._spared else held.get(key, "")
            for placed, key in self._chunks
        ]

    def spare(self, numbers: Collection[int], why: str = "unused") -> None:
        """Leave out chunks, by their numbers in the prompt: a pass computes them whole. Nothing of them is loaded from here on."""
        if self._done or self._begun or not numbers:  # what was looked at is placed already
            return
        self._spared = {self._layout.chunks[number].start: why for number in numbers} | self._spared
        needed = {key for _, key in self._to_place}
        for key, index in self._index.items():
            if key not in needed:
                self.batch.done(index)

    def to_read(self) -> dict[int, int]:
        """Where in the batch the chunks are that are to be placed out of it, by their numbers in the prompt, ascending."""
        numbers = {placed.start: number for number, placed in enumerate(self._layout.chunks)}
        return {numbers[placed.start]: self._index[key] for placed, key in self._to_place if key not in self._given}

    def place_front(self, stop: int) -> None:
        """Have all layers placed of the chunks that begin in front of a slot; later calls go on from there. On the CPU alone."""
        self._place_chunks(range(len(self._decoder.layers)), range(self._front, stop))
        self._front = stop

    @property
    def _to_place(self) -> list[tuple[Placed, bytes]]:
        return [(placed, key) for placed, key in self._chunks if placed.start not in self._spared]

    def ahead(self, first: int = 0) -> None:
        """Place what a pass needs from layer ``first`` on, as far as that is better done before the pass: all of it on the CPU.

        Elsewhere what lies on the device is, and loading the rest begins.

        Raises:
            RecordError: a record proved damaged; the store has dropped it.
        """
        if self.by_layer:
            self.batch.read_ahead()
            with self._timer.stage("place"):
                self._begin(first)
        else:
            self.upto(len(self._decoder.layers) - 1, first)

    @contextmanager
    def beside(self, first: int = 0, cache: FusedCache | None = None) -> Iterator[None]:
        """A block in which the model runs: what is not placed yet is, right before its layer attends.

        Args:
            first: as for :meth:`ahead`.
            cache: that the model runs over, if not the prompt's.
        """
        cache = cache or self._cache
        left = self.by_layer and self._done < len(self._decoder.layers)
        cache.before = partial(self.upto, first=first) if left else None
        try:
            yield
        finally:
            cache.before = None

    def upto(self, layer: int, first: int = 0) -> None:
        """Have the layers from ``first`` to ``layer`` placed: keys rotated by their change of position, values as they are.

        Raises:
            RecordError: a record proved damaged; the store has dropped it.
        """
        layers = range(max(first, self._done), layer + 1)
        if not layers:
            return
        with self._timer.stage("place"):
            if not self.by_layer:
                self._place_chunks(layers, range(self._layout.tokens))
                self._done = layers.stop
                return
            self._begin(layers.start)
            done = layers.stop
            if self._convoy is not None:
                self._convoy.upto(layer)
                done = self._convoy.done
                if done == len(self._decoder.layers):
                    self._convoy = None  # its memory is free
            if not self._sorted.stretches and not self._mended:
                self._done = max(self._done, done)
            for number in range(max(layers.start, self._done), layers.stop):
                self._place_layer(number)
                self._done = number + 1

    def _begin(self, first: int) -> None:
        """Place all that lies on the device, from a layer on, and begin to bring what is in CPU memory."""
        if self._begun:
            return
        self._begun, layers, impl = True, range(first, len(self._decoder.layers)), self._decoder.kernels
        sorted_ = self._sorted
        if sorted_.carried:
            assert self._bus is not None
            device, freight = self._decoder.device, sorted_.freight
            self._convoy = Convoy(self._bus, device, freight, sorted_.carried, self._cache, layers, impl)
        if sorted_.runs:
            place_layers(self._cache.laid, sorted_.runs, layers=layers, impl=impl)
        if not sorted_.carried and not sorted_.stretches:  # that was all
            self.upto(layers.stop - 1, first)

    def _place_layer(self, layer: int) -> None:
        """Place what of a layer is placed by itself."""
        stretches = self._sorted.stretches
        if stretches:
            pieces = (self._pieces(stretch, layer, *self._supply.held(stretch, layer)) for stretch in stretches)
            place_pieces([piece for pair in pieces for piece in pair], impl=self._decoder.kernels)
        self._mend(layer)

    def _mend(self, layer: int) -> None:
        """Put the tokens that a prompt computed before in the place of those that were stored."""
        room, rotation = self._cache.layers[layer], self._decoder.rotations[layer]
        for placed in self._mended:
            kv = self._paths[placed.path]
            assert kv.rows is not None
            keys, rows = at_room(kv.keys[layer], room), at_room(kv.rows, room)
            if rotation is not None and kv.base != placed.position:
                cos, sin = rotation_tables(rotation, kv.base + rows, placed.position + rows)
                stood, impl = keys, self._decoder.kernels
                keys = torch.empty_like(stood)
                place(keys, stood, cos, sin, interleaved=rotation.interleaved, impl=impl)
            room.key_room[0].index_copy_(1, placed.start + rows, keys)
            room.value_room[0].index_copy_(1, placed.start + rows, at_room(kv.values[layer], room))

    def _place_chunks(self, layers: range, slots: range) -> None:
        """One after the other, those that begin at some slots; all behind these are still to be placed."""
        targets = [
            Target(held.key_room[0], held.value_room[0]) for held in self._cache.layers[layers.start : layers.stop]
        ]
        to_place = [(placed, key) for placed, key in self._to_place if placed.start >= slots.start]
        left = Counter(key for _, key in to_place)
        for placed, key in to_place:
            if placed.start >= slots.stop:
                break
            self._place_chunk(placed, key, layers, targets)
            left[key] -= 1
            if not left[key] and key not in self._given and layers.stop == len(self._decoder.layers):
                self.batch.done(self._index[key])
        for layer in layers:
            self._mend(layer)

    def _place_chunk(self, placed: Placed, key: bytes, layers: range, targets: list[Target]) -> None:
        if key in self._given:
            for layer in layers:
                self._place(placed, layer, self._given[key].keys[layer], self._given[key].values[layer])
            return
        index = self._index[key]
        if self.batch.direct(index):
            self.batch.place(index, layers, targets, placed.start)
            for layer in layers:
                self._turn_in_place(placed, layer)
        else:
            for layer in layers:
                self._place(placed, layer, *self.batch.layer(index, layer))

    def _place(self, placed: Placed, layer: int, keys: Tensor, values: Tensor) -> None:
        room = self._cache.layers[layer]
        stored = Stored.raw(at_room(keys, room)), Stored.raw(at_room(values, room))
        place_pieces(self._pieces(Stretch(placed), layer, *stored), impl=self._decoder.kernels)

    @lazy
    def _sorted(self) -> _Sorted:
        """The chunks by where they lie, in prompt order; neighbours in the prompt as one run where a pool holds them."""
        runs = [] if self._opening is None else [Run(layers_of(self._opening), 0, len(self._opening))]
        stretches, carried, freight = list[Stretch](), list[tuple[bytes, Run]](), dict[bytes, Freight]()
        for placed, key in self._to_place:
            source = self._supply.layers(key)
            if source is None:
                brought = None if self._bus is None else self._supply.freight(key, len(placed.chunk))
                if brought is None:
                    stretches.append(self._supply.stretch(placed, key))
                    continue
                turned = self._turning.layers if placed.position != placed.base else None
                turns = self._turning.unrotated if self.batch.unrotated[self._index[key]] else turned
                freight[key] = brought
                carried.append((key, Run(brought.layers, placed.start, len(placed.chunk), turns=turns)))
                continue
            slots = self.batch.slots[self._index[key]] if source.paged else None
            turns = self._turning.layers if placed.position != placed.base else None
            runs.append(Run(source, placed.start, len(placed.chunk), slots, turns))
        return _Sorted(joined(runs), carried, freight, stretches)

    def _pieces(self, stretch: Stretch, layer: int, keys: Stored, values: Stored) -> list[Piece]:
        room, tokens = self._cache.layers[layer], slice(stretch.placed.start, stretch.placed.stop)
        out = room.key_room[0, :, tokens]
        turn = self._turning.layer(layer, out.device, stretch.unrotated) if stretch.turned else None
        tables = () if turn is None else (turn.cos[tokens], turn.sin[tokens], turn.interleaved)
        return [Piece(out, keys, *tables), Piece(room.value_room[0, :, tokens], values)]

    def _turn_in_place(self, placed: Placed, layer: int) -> None:
        """Rotate keys that stand in their slots already."""
        tokens = slice(placed.start, placed.stop)
        keys = self._cache.layers[layer].key_room[0, :, tokens]
        turn = None if placed.position == placed.base else self._turning.layer(layer, keys.device)
        if turn is not None:
            cos, sin = turn.cos[tokens], turn.sin[tokens]
            place(keys, keys.clone(), cos, sin, interleaved=turn.interleaved, impl=self._decoder.kernels)
