"""Placing stored keys and values into the prompt's cache, one layer at a time.

N tokens of the prompt, H kv heads, T tokens of a chunk, D head_dim, R rotated dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ragkv.cache import FusedCache
from ragkv.chunk import Chunk, ChunkKV
from ragkv.kernels import Piece, Rotation, Stored, place, place_pieces, rotation_tables
from ragkv.layout import Layout, Placed
from ragkv.store import Target

if TYPE_CHECKING:
    from ragkv.model import Decoder
    from ragkv.store import Batch, TieredStore


class Placement:
    """Where each stored chunk of one prompt comes from, and how its keys turn on the way.

    Chunks are taken one after the other, so that besides the prompt's cache no more than one chunk's KV is in memory. On an
    accelerator they are taken layer by layer instead, and the next layers are loaded while one computes.

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
        self._whole_from: int | None = None  # with whole chunks, layers from this one on are placed
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}
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
            pieces = [self._pieces(placed, layer, *self._stored(key, layer)) for placed, key in self.chunks]
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
                self._place(placed, layer, *self._stored(key, layer))
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

    def _stored(self, key: bytes, layer: int) -> tuple[Tensor, Tensor]:
        if key in self.fresh:
            return self.fresh[key].keys[layer], self.fresh[key].values[layer]
        return self.batch.layer(self.index[key], layer)

    def _place(self, placed: Placed, layer: int, stored_keys: Tensor, stored_values: Tensor) -> None:
        place_pieces(self._pieces(placed, layer, stored_keys, stored_values), impl=self.decoder.kernels)

    def _pieces(self, placed: Placed, layer: int, stored_keys: Tensor, stored_values: Tensor) -> tuple[Piece, Piece]:
        rotation, keys = self.decoder.rotations[layer], self._slots(placed, layer)
        values = self.cache.layers[layer].value_room[0, :, placed.start : placed.stop]
        cos, sin = self._turn(rotation, placed, keys.device)
        interleaved = rotation is not None and rotation.interleaved
        moved = [tensor.to(keys.device, non_blocking=True) for tensor in (stored_keys, stored_values)]
        return Piece(keys, Stored.raw(moved[0]), cos, sin, interleaved), Piece(values, Stored.raw(moved[1]))

    def _turn_in_place(self, placed: Placed, layer: int) -> None:
        """Rotate keys that stand in their slots already."""
        rotation, keys = self.decoder.rotations[layer], self._slots(placed, layer)
        cos, sin = self._turn(rotation, placed, keys.device)
        if rotation is not None and cos is not None:
            place(keys, keys.clone(), cos, sin, interleaved=rotation.interleaved, impl=self.decoder.kernels)

    def _slots(self, placed: Placed, layer: int) -> Tensor:
        """Where a chunk's keys ``[H, T, D]`` of a layer go."""
        return self.cache.layers[layer].key_room[0, :, placed.start : placed.stop]

    def _target(self, layer: int) -> Target:
        if layer not in self._targets:
            held = self.cache.layers[layer]
            self._targets[layer] = Target(held.key_room[0], held.value_room[0])
        return self._targets[layer]

    def _turn(
        self, rotation: Rotation | None, placed: Placed, device: torch.device
    ) -> tuple[Tensor | None, Tensor | None]:
        if rotation is None or placed.start == placed.base:
            return None, None
        if id(rotation) not in self._tables:
            self._tables[id(rotation)] = self._whole_table(rotation)
        cos, sin = self._tables[id(rotation)]
        rows = slice(placed.start - self.layout.chunks_start, placed.stop - self.layout.chunks_start)
        return cos[rows].to(device), sin[rows].to(device)

    def _whole_table(self, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Tables ``[all chunk tokens, R / 2]``, made once a prompt for each distinct rotation."""
        new = self.layout.reusable
        shift = torch.cat([torch.full((len(p.chunk),), p.base - p.start) for p in self.layout.chunks]).to(new.device)
        return rotation_tables(rotation, new + shift, new)
