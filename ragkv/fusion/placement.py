"""Placing stored keys and values into the prompt's cache, one layer at a time.

N tokens of the prompt, H kv heads, T tokens of a chunk, D head_dim, R rotated dimensions, P tokens of a pool's block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ragkv.chunk import Chunk, ChunkKV
from ragkv.fusion.layout import Layout, Placed
from ragkv.kernels import Piece, Rotation, Stored, place, place_pieces, rotation_tables, slots_of
from ragkv.kernels.stored import CodecName, Side
from ragkv.model.cache import FusedCache, FusedLayer
from ragkv.store import Target

if TYPE_CHECKING:
    from ragkv.model.decoder import Decoder
    from ragkv.store import Batch, TieredStore


_DECODED: tuple[CodecName, ...] = ("int8", "int4", "fp8")  # by the kernel that places


@dataclass(frozen=True, eq=False)
class _Run:
    """Tokens of the prompt that are placed as one piece: a chunk's, or those of neighbours that lie in one pool.

    Attributes:
        start: position of the first token.
        stop: position behind the last one.
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
    def of(cls, placed: Placed, key: bytes = b"", **held: Any) -> _Run:
        """One chunk; how it is held, by name."""
        return cls(placed.start, placed.stop, placed.start != placed.base, key, **held)

    def joined(self, other: _Run) -> _Run | None:
        """Both as one run, where the other follows and may be placed together with this one."""
        if self.slots is None or other.slots is None or (self.stop, self.turned) != (other.start, other.turned):
            return None
        return replace(self, stop=other.stop, slots=torch.cat([self.slots, other.slots]))


class Placement:
    """Where each stored chunk of one prompt comes from, and how its keys turn on the way.

    Chunks are taken one after the other, so that besides the prompt's cache no more than one chunk's KV is in memory. On an
    accelerator they are taken layer by layer instead, and the next layers are loaded while one computes. There they are placed
    from what their tier holds, in one pass: from the blocks of a pool, and from encoded numbers.

    Args:
        decoder: the model.
        cache: written.
        layout: the prompt.
        opening: KV of what stands in front of the chunks, or ``None`` where nothing does.
        store: holds the chunks.
        batch: an open read of them, so that none is evicted meanwhile.
        keys: for every chunk to place, the key of the KV that it takes.
        fresh: KV that the batch does not hold, by key.
        by_layer: layer by layer; by default on an accelerator.

    Attributes:
        bytes_read: bytes read from disk so far.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: FusedCache,
        layout: Layout,
        opening: ChunkKV | None,
        store: TieredStore,
        batch: Batch,
        keys: Mapping[Chunk, bytes],
        fresh: Mapping[bytes, ChunkKV],
        by_layer: bool | None = None,
    ):
        self.decoder, self.cache, self.layout, self.opening = decoder, cache, layout, opening
        self.store, self.batch, self.fresh = store, batch, fresh
        self.chunks = [(placed, keys[placed.chunk]) for placed in layout.chunks if placed.chunk in keys]
        self.index = {key: number for number, key in enumerate(batch.keys)}
        self.by_layer = decoder.device.type != "cpu" if by_layer is None else by_layer
        self.bytes_read = 0
        self._made_runs: list[_Run] | None = None
        self._whole_from: int | None = None  # with whole chunks, layers from this one on are placed
        self._tables: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}
        self._targets: dict[int, Target] = {}
        if self.by_layer:
            batch.read_ahead()

    def sources(self) -> list[str]:
        """Where each chunk's KV came from, in prompt order."""
        return ["computed" if key in self.fresh else str(self.batch.tiers[self.index[key]]) for _, key in self.chunks]

    def layer(self, layer: int) -> None:
        """Write a layer's opening and chunks to their slots: keys rotated by their change of position, values as they are.

        Layers must be asked for in ascending order.

        Raises:
            RecordError: a record proved damaged; the store has dropped it.
        """
        if self.by_layer:
            self._place_opening(layer)
            pieces = [self._pieces(run, layer, *self._held(run, layer)) for run in self._runs()]
            place_pieces([piece for pair in pieces for piece in pair], impl=self.decoder.kernels)
            self.bytes_read = self.batch.bytes_read
        elif self._whole_from is None:
            self._whole_from = layer
            layers = range(layer, len(self.decoder.layers))
            for number in layers:
                self._place_opening(number)
            for placed, key in self.chunks:
                self._place_whole(placed, key, layers)

    def _place_whole(self, placed: Placed, key: bytes, layers: range) -> None:
        if key in self.fresh:
            for layer in layers:
                self._place(placed, layer, self.fresh[key].keys[layer], self.fresh[key].values[layer])
            return
        with self.store.read([key], again=True) as alone:
            if alone.direct(0):
                alone.place(0, layers, [self._target(layer) for layer in layers], placed.start)
                for layer in layers:
                    self._turn_in_place(placed, layer)
            else:
                for layer in layers:
                    self._place(placed, layer, *alone.layer(0, layer))
            self.bytes_read += alone.bytes_read

    def _place_opening(self, layer: int) -> None:
        if self.opening is not None:
            held, tokens = self.cache.layers[layer], len(self.opening)
            held.key_room[0, :, :tokens] = self.opening.keys[layer]
            held.value_room[0, :, :tokens] = self.opening.values[layer]

    def _place(self, placed: Placed, layer: int, keys: Tensor, values: Tensor) -> None:
        device = self.cache.layers[layer].key_room.device
        stored = Stored.raw(keys.to(device)), Stored.raw(values.to(device))
        place_pieces(self._pieces(_Run.of(placed), layer, *stored), impl=self.decoder.kernels)

    def _runs(self) -> list[_Run]:
        """What is placed as one piece, in prompt order; the same in every layer."""
        if self._made_runs is None:
            runs: list[_Run] = []
            for placed, key in self.chunks:
                run = _Run.of(placed, key, **self._how(placed, key))
                joined = runs[-1].joined(run) if runs else None
                runs[-1:] = [joined] if joined else [*runs[-1:], run]
            self._made_runs = runs
        return self._made_runs

    def _how(self, placed: Placed, key: bytes) -> dict[str, Any]:
        """How a chunk is held, for :class:`_Run`: in a pool on the same device, encoded, or neither."""
        if key in self.fresh:
            return {}
        index = self.index[key]
        blocks, codec = self.batch.blocks[index], self.batch.codecs[index]
        if blocks is not None:
            if any(layer.key_room.device != blocks.device for layer in self.cache.layers):
                return {}
            page = self.batch.parts(index, 0)[0][""].shape[2]
            return {"slots": slots_of(blocks, page, len(placed.chunk))}
        return {"codec": codec, "unrotated": self.batch.unrotated[index]} if codec in _DECODED else {}

    def _held(self, run: _Run, layer: int) -> list[Stored]:
        """K and V of a run as their tier holds them, where the device reads them."""
        room = self.cache.layers[layer]
        if run.key in self.fresh:
            fresh = self.fresh[run.key]
            return [Stored.raw(_moved(tensor, room)) for tensor in (fresh.keys[layer], fresh.values[layer])]
        index = self.index[run.key]
        if run.slots is not None:
            return [Stored.paged(parts[""], run.slots) for parts in self.batch.parts(index, layer)]
        if run.codec is None:
            return [Stored.raw(_moved(tensor, room)) for tensor in self.batch.layer(index, layer)]
        sides: list[tuple[Side, int]] = [("k", room.key_room.shape[3]), ("v", room.value_room.shape[3])]
        heads, tokens = room.key_room.shape[1], run.stop - run.start
        return [
            Stored.encoded(
                run.codec, {name: _moved(part, room) for name, part in parts.items()}, (heads, tokens, dim), side
            )
            for parts, (side, dim) in zip(self.batch.parts(index, layer), sides, strict=True)
        ]

    def _pieces(self, run: _Run, layer: int, keys: Stored, values: Stored) -> list[Piece]:
        rotation, tokens = self.decoder.rotations[layer], slice(run.start, run.stop)
        room = self.cache.layers[layer]
        cos, sin = self._turn(rotation, run, room.key_room.device)
        interleaved = rotation is not None and rotation.interleaved
        return [
            Piece(room.key_room[0, :, tokens], keys, cos, sin, interleaved),
            Piece(room.value_room[0, :, tokens], values),
        ]

    def _turn_in_place(self, placed: Placed, layer: int) -> None:
        """Rotate keys that stand in their slots already."""
        rotation, room = self.decoder.rotations[layer], self.cache.layers[layer].key_room[0]
        keys = room[:, placed.start : placed.stop]
        cos, sin = self._turn(rotation, _Run.of(placed), keys.device)
        if rotation is not None and cos is not None:
            place(keys, keys.clone(), cos, sin, interleaved=rotation.interleaved, impl=self.decoder.kernels)

    def _target(self, layer: int) -> Target:
        if layer not in self._targets:
            held = self.cache.layers[layer]
            self._targets[layer] = Target(held.key_room[0], held.value_room[0])
        return self._targets[layer]

    def _turn(self, rotation: Rotation | None, run: _Run, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        if rotation is None or not (run.turned or run.unrotated):
            return None, None
        kind = id(rotation), run.unrotated
        if kind not in self._tables:
            self._tables[kind] = self._whole_table(rotation, run.unrotated)
        cos, sin = self._tables[kind]
        rows = slice(run.start - self.layout.chunks_start, run.stop - self.layout.chunks_start)
        return cos[rows].to(device), sin[rows].to(device)

    def _whole_table(self, rotation: Rotation, unrotated: bool) -> tuple[Tensor, Tensor]:
        """Tables ``[all chunk tokens, R / 2]``, made once a prompt for each distinct rotation."""
        new = self.layout.reusable
        if unrotated:
            return rotation_tables(rotation, torch.zeros_like(new), new)
        shift = torch.cat([torch.full((len(p.chunk),), p.base - p.start) for p in self.layout.chunks]).to(new.device)
        return rotation_tables(rotation, new + shift, new)


def _moved(tensor: Tensor, room: FusedLayer) -> Tensor:
    return tensor.to(room.key_room.device, non_blocking=True)
