"""Placing stored keys and values into the prompt's cache: what is placed, and when.

N tokens of the prompt, H kv heads, T tokens of a chunk, D head_dim, R rotated dimensions, P tokens of a pool's block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ragkv.chunk import Chunk, ChunkKV
from ragkv.fusion.layout import Layout, Placed
from ragkv.fusion.timing import Timer
from ragkv.kernels import Piece, Rotation, Stored, place, place_pieces, rotation_tables, slots_of
from ragkv.kernels.stored import CodecName, Side
from ragkv.lazy import lazy
from ragkv.model.cache import FusedCache, FusedLayer
from ragkv.store import Target

if TYPE_CHECKING:
    from ragkv.model.decoder import Decoder
    from ragkv.store import Batch, Moved

_DECODED: tuple[CodecName, ...] = ("int8", "int4", "fp8")  # by the kernel that places


@dataclass(frozen=True, eq=False)
class _Stretch:
    """Tokens of the prompt that are placed as one piece: a chunk's, or those of neighbours that lie in one pool.

    Attributes:
        start: slot of the first token.
        stop: slot behind the last one.
        turned: whether keys stood elsewhere when they were made.
        key: of the (first) chunk.
        slots: ``[T]`` where the tokens lie in the pool, if they do.
        codec: what the kernel decodes on its way; empty for numbers.
        unrotated: its keys are held as they were before rotary embedding.
    """

    start: int
    stop: int
    turned: bool
    key: bytes = b""
    slots: Tensor | None = None
    codec: CodecName | None = None
    unrotated: bool = False

    @classmethod
    def of(cls, placed: Placed, key: bytes = b"", **held: Any) -> _Stretch:
        """One chunk; how it is held, by name."""
        return cls(placed.start, placed.stop, placed.position != placed.base, key, **held)

    def joined(self, other: _Stretch) -> _Stretch | None:
        """Both as one run, where the other follows and may be placed together with this one."""
        if self.slots is None or other.slots is None or (self.stop, self.turned) != (other.start, other.turned):
            return None
        return replace(self, stop=other.stop, slots=torch.cat([self.slots, other.slots]))


class Placement:
    """Puts the stored chunks of one prompt into its cache, keys turned to their new positions; knows what is there already.

    On the CPU chunks are taken one after the other, and all of a chunk's layers at once, so that besides the prompt's cache no more
    than one chunk's KV is in memory. On an accelerator they are taken layer by layer instead, from what their tier holds (the
    blocks of a pool, encoded numbers), and the next layers are loaded while one computes.

    Args:
        decoder: the model.
        cache: written.
        layout: the prompt.
        batch: an open read of the chunks, so that none is evicted meanwhile. On the CPU it is done with each once it is placed.
        keys: for every chunk to place, the key of the KV that it takes.
        fresh: KV that the batch does not hold, by key.
        paths: KV of chunks that prompts computed before, by :attr:`~ragkv.fusion.layout.Placed.path`.
        timer: counts the stage ``place``.
        by_layer: layer by layer; by default on an accelerator.

    Attributes:
        by_layer: whether it goes layer by layer.
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
    ):
        self.batch: Batch = batch
        self.fresh: dict[bytes, ChunkKV] = fresh
        self._decoder, self._cache, self._keys = decoder, cache, keys
        self._timer = Timer() if timer is None else timer
        self._done = 0  # layers below are placed, or were not asked for
        self._tables: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}
        self._paths: Mapping[bytes, ChunkKV] = {}
        self.take(layout, {} if paths is None else paths)
        self._index = {key: number for number, key in enumerate(batch.keys)}
        self.by_layer: bool = decoder.device.type != "cpu" if by_layer is None else by_layer
        self._spared: dict[int, str] = {}  # slots at which chunks begin that are not placed, and why not
        self._front = 0  # chunks that begin below this slot are placed in all layers, or spared

    def take(self, layout: Layout, paths: Mapping[bytes, ChunkKV]) -> None:
        """Have these KV too, and place what a layout of the same prompt says; also where others are placed by now."""
        self._layout, self._paths = layout, {**self._paths, **paths}
        self._given = {**self.fresh, **self._paths}
        self._chunks = [
            (placed, placed.path if placed.whole else self._keys[placed.chunk])
            for placed in layout.chunks
            if placed.path or placed.chunk in self._keys
        ]
        self._tables.clear()
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
        if self._done or not numbers:  # what was looked at is placed already
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

        Elsewhere loading begins.

        Raises:
            RecordError: a record proved damaged; the store has dropped it.
        """
        if self.by_layer:
            self.batch.read_ahead()
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
        cache.before = partial(self.upto, first=first) if self.by_layer else None
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
            if self.by_layer:
                for number in layers:
                    self._place_layer(number)
            else:
                self._place_chunks(layers, range(self._layout.tokens))
        self._done = layers.stop

    def _place_layer(self, layer: int) -> None:
        pieces = [self._pieces(stretch, layer, *self._held(stretch, layer)) for stretch in self._stretches]
        place_pieces([piece for pair in pieces for piece in pair], impl=self._decoder.kernels)
        self._mend(layer)

    def _mend(self, layer: int) -> None:
        """Put the tokens that a prompt computed before in the place of those that were stored."""
        room, rotation = self._cache.layers[layer], self._decoder.rotations[layer]
        for placed, _ in self._chunks:
            if placed.path and not placed.whole:
                kv = self._paths[placed.path]
                assert kv.rows is not None
                keys, rows = _moved(kv.keys[layer], room), kv.rows.to(room.key_room.device)
                if rotation is not None and kv.base != placed.position:
                    cos, sin = rotation_tables(rotation, kv.base + rows, placed.position + rows)
                    stood, impl = keys, self._decoder.kernels
                    keys = torch.empty_like(stood)
                    place(keys, stood, cos, sin, interleaved=rotation.interleaved, impl=impl)
                room.key_room[0].index_copy_(1, placed.start + rows, keys)
                room.value_room[0].index_copy_(1, placed.start + rows, _moved(kv.values[layer], room))

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
        device = self._cache.layers[layer].key_room.device
        stored = Stored.raw(keys.to(device)), Stored.raw(values.to(device))
        place_pieces(self._pieces(_Stretch.of(placed), layer, *stored), impl=self._decoder.kernels)

    @lazy
    def _stretches(self) -> list[_Stretch]:
        """What is placed as one piece, in prompt order; the same in every layer."""
        made: list[_Stretch] = []
        for placed, key in self._to_place:
            stretch = _Stretch.of(placed, key, **self._how(placed, key))
            joined = made[-1].joined(stretch) if made else None
            made[-1:] = [joined] if joined else [*made[-1:], stretch]
        return made

    def _how(self, placed: Placed, key: bytes) -> dict[str, Any]:
        """How a chunk is held, for :class:`_Stretch`: in a pool on the same device, encoded, or neither."""
        if key in self._given:
            return {}
        index = self._index[key]
        blocks, codec = self.batch.blocks[index], self.batch.codecs[index]
        if blocks is not None:
            if any(layer.key_room.device != blocks.device for layer in self._cache.layers):
                return {}
            page = self.batch.parts(index, 0)[0][""].shape[2]
            return {"slots": slots_of(blocks, page, len(placed.chunk))}
        return {"codec": codec, "unrotated": self.batch.unrotated[index]} if codec in _DECODED else {}

    def _held(self, stretch: _Stretch, layer: int) -> list[Stored]:
        """K and V of a stretch as their tier holds them, where the device reads them."""
        room = self._cache.layers[layer]
        if stretch.key in self._given:
            given = self._given[stretch.key]
            return [Stored.raw(_moved(tensor, room)) for tensor in (given.keys[layer], given.values[layer])]
        index = self._index[stretch.key]
        if stretch.slots is not None:
            return [Stored.paged(parts[""], stretch.slots) for parts in self.batch.parts(index, layer)]
        if stretch.codec is None:
            return [Stored.raw(_moved(tensor, room)) for tensor in self.batch.layer(index, layer)]
        sides: list[tuple[Side, int]] = [("k", room.key_room.shape[3]), ("v", room.value_room.shape[3])]
        heads, tokens = room.key_room.shape[1], stretch.stop - stretch.start
        return [
            Stored.encoded(
                stretch.codec, {name: _moved(part, room) for name, part in parts.items()}, (heads, tokens, dim), side
            )
            for parts, (side, dim) in zip(self.batch.parts(index, layer), sides, strict=True)
        ]

    def _pieces(self, stretch: _Stretch, layer: int, keys: Stored, values: Stored) -> list[Piece]:
        rotation, tokens = self._decoder.rotations[layer], slice(stretch.start, stretch.stop)
        room = self._cache.layers[layer]
        cos, sin = self._turn(rotation, stretch, room.key_room.device)
        interleaved = rotation is not None and rotation.interleaved
        return [
            Piece(room.key_room[0, :, tokens], keys, cos, sin, interleaved),
            Piece(room.value_room[0, :, tokens], values),
        ]

    def _turn_in_place(self, placed: Placed, layer: int) -> None:
        """Rotate keys that stand in their slots already."""
        rotation, room = self._decoder.rotations[layer], self._cache.layers[layer].key_room[0]
        keys = room[:, placed.start : placed.stop]
        cos, sin = self._turn(rotation, _Stretch.of(placed), keys.device)
        if rotation is not None and cos is not None:
            place(keys, keys.clone(), cos, sin, interleaved=rotation.interleaved, impl=self._decoder.kernels)

    def _turn(
        self, rotation: Rotation | None, stretch: _Stretch, device: torch.device
    ) -> tuple[Tensor | None, Tensor | None]:
        if rotation is None or not (stretch.turned or stretch.unrotated):
            return None, None
        kind = id(rotation), stretch.unrotated
        if kind not in self._tables:
            self._tables[kind] = self._whole_table(rotation, stretch.unrotated)
        cos, sin = self._tables[kind]
        rows = slice(stretch.start - self._layout.chunks_start, stretch.stop - self._layout.chunks_start)
        return cos[rows].to(device), sin[rows].to(device)

    def _whole_table(self, rotation: Rotation, unrotated: bool) -> tuple[Tensor, Tensor]:
        """Tables ``[all chunk tokens, R / 2]``, made once a prompt for each distinct rotation."""
        layout = self._layout
        new = layout.positions[layout.chunks_start : layout.suffix_start]
        if unrotated:
            return rotation_tables(rotation, torch.zeros_like(new), new)
        back = torch.cat([torch.full((len(p.chunk),), p.base - p.position) for p in layout.chunks]).to(new.device)
        return rotation_tables(rotation, new + back, new)


def _moved(tensor: Tensor, room: FusedLayer) -> Tensor:
    return tensor.to(room.key_room.device, non_blocking=True)
