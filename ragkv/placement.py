"""Placing stored keys and values into the prompt's cache, one layer at a time.

N tokens of the prompt, H kv heads, T tokens of a chunk, D head_dim, R rotated dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
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
        prefix: KV of the prefix, or ``None`` where it is empty.
        batch: an open read of the store.
        keys: the batch's keys, in its order.
        fresh: chunks that the batch does not hold, by key.
        key_of: the key of a chunk.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: FusedCache,
        layout: Layout,
        prefix: ChunkKV | None,
        batch: Batch,
        keys: list[bytes],
        fresh: dict[bytes, ChunkKV],
        key_of: Callable[[Chunk], bytes],
    ):
        self.decoder, self.cache, self.layout, self.prefix = decoder, cache, layout, prefix
        self.batch, self.fresh = batch, fresh
        index = {key: number for number, key in enumerate(keys)}
        self.chunks = [(placed, key_of(placed.chunk)) for placed in layout.chunks] if keys else []
        self.index = index
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}

    def sources(self) -> list[str]:
        """Where each chunk's KV came from, in prompt order."""
        return ["computed" if key in self.fresh else str(self.batch.tiers[self.index[key]]) for _, key in self.chunks]

    def layer(self, layer: int) -> None:
        """Write one layer's prefix and chunks to their slots: keys rotated by their change of position, values as they are."""
        held = self.cache.layers[layer]
        keys, values = held.key_room[0], held.value_room[0]
        if self.prefix is not None:
            keys[:, : len(self.prefix)] = self.prefix.keys[layer]
            values[:, : len(self.prefix)] = self.prefix.values[layer]
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
        shift = torch.cat([torch.full((len(p.chunk),), p.base - p.start) for p, _ in self.chunks]).to(new.device)
        return rotation_tables(rotation, new + shift, new)
