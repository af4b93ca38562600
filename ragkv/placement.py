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
from ragkv.kernels import Rotation, place, rotation_tables
from ragkv.layout import Layout, Placed

if TYPE_CHECKING:
    from ragkv.model import Decoder
    from ragkv.store import Batch


class Placement:
    """Where each stored chunk of one prompt comes from, and how its keys turn on the way.

    Args:
        decoder: the model.
        cache: written.
        layout: the prompt.
        opening: KV of what stands in front of the chunks, or ``None`` where nothing does.
        batch: an open read of the store.
        keys: for every chunk to place, the key of the KV that it takes.
        fresh: KV that the batch does not hold, by key.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: FusedCache,
        layout: Layout,
        opening: ChunkKV | None,
        batch: Batch,
        keys: Mapping[Chunk, bytes],
        fresh: Mapping[bytes, ChunkKV],
    ):
        self.decoder, self.cache, self.layout, self.opening = decoder, cache, layout, opening
        self.batch, self.fresh = batch, fresh
        self.chunks = [(placed, keys[placed.chunk]) for placed in layout.chunks if placed.chunk in keys]
        self.index = {key: number for number, key in enumerate(batch.keys)}
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}

    def sources(self) -> list[str]:
        """Where each chunk's KV came from, in prompt order."""
        return ["computed" if key in self.fresh else str(self.batch.tiers[self.index[key]]) for _, key in self.chunks]

    def layer(self, layer: int) -> None:
        """Write one layer's opening and chunks to their slots: keys rotated by their change of position, values as they are."""
        held = self.cache.layers[layer]
        keys, values = held.key_room[0], held.value_room[0]
        if self.opening is not None:
            keys[:, : len(self.opening)] = self.opening.keys[layer]
            values[:, : len(self.opening)] = self.opening.values[layer]
        rotation = self.decoder.rotations[layer]
        for placed, key in self.chunks:
            stored_keys, stored_values = self._stored(key, layer)
            slots = slice(placed.start, placed.stop)
            cos, sin = self._turn(rotation, placed, keys.device)
            place(
                keys[:, slots],
                stored_keys.to(keys.device, non_blocking=True),
                cos,
                sin,
                interleaved=rotation is not None and rotation.interleaved,
            )
            values[:, slots] = stored_values.to(values.device, non_blocking=True)

    def _stored(self, key: bytes, layer: int) -> tuple[Tensor, Tensor]:
        if key in self.fresh:
            kv = self.fresh[key]
            return kv.keys[layer], kv.values[layer]
        return self.batch.layer(self.index[key], layer)

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
