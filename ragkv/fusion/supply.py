"""Where a prompt's stored keys and values are, and how they are held there: what placing them is given.

H kv heads, T tokens of a chunk, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import is_
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ragkv.chunk import ChunkKV
from ragkv.fusion.convoy import Freight
from ragkv.fusion.layout import Placed
from ragkv.kernels import Layers, Stored
from ragkv.kernels.stored import CodecName, Side
from ragkv.lazy import lazy
from ragkv.model.cache import FusedCache, FusedLayer

if TYPE_CHECKING:
    from ragkv.store import Batch

_DECODED: tuple[CodecName, ...] = ("int8", "int4", "fp8")  # by the kernel that places
_READ: tuple[CodecName, ...] = ("raw", *_DECODED)


@dataclass(frozen=True, eq=False)
class Stretch:
    """One chunk of the prompt that is placed layer by layer.

    Attributes:
        placed: where.
        key: of its KV.
        codec: what the kernel decodes on its way; ``None`` for numbers.
        unrotated: its keys are held as they were before rotary embedding.
    """

    placed: Placed
    key: bytes = b""
    codec: CodecName | None = None
    unrotated: bool = False

    @property
    def turned(self) -> bool:
        """Whether keys stood elsewhere when they were made."""
        return self.unrotated or self.placed.position != self.placed.base


class Supply:
    """What one prompt's chunks are placed from.

    Args:
        cache: of the prompt.
        batch: an open read.
        index: where in it each key is.
        given: KV by key that are not taken out of it.
    """

    def __init__(self, cache: FusedCache, batch: Batch, index: Mapping[bytes, int], given: Mapping[bytes, ChunkKV]):
        self._cache, self._batch, self._index, self._given = cache, batch, index, given

    @lazy
    def device(self) -> torch.device | None:
        """Where the prompt's cache lies; ``None`` where that is on several devices."""
        return self._cache.device

    def beside(self, kv: ChunkKV) -> bool:
        """Whether KV lie on the device where the whole prompt does."""
        return self.device is not None and all(held.device == self.device for pair in kv for held in pair)

    def layers(self, key: bytes) -> Layers | None:
        """All layers of a chunk, or of the pool that it lies in, where they are on the prompt's device."""
        if self.device is None:
            return None
        if key in self._given:
            return layers_of(self._given[key]) if self.beside(self._given[key]) else None
        index = self._index[key]
        if self._batch.slots[index] is None:
            return None
        kept = self._batch.kept(index)
        pool = kept.get("layers")
        if pool is None:
            parts = (self._batch.parts(index, layer) for layer in range(len(self._cache.layers)))
            pool = kept["layers"] = Layers.pool([(keys[""], values[""]) for keys, values in parts])
        return pool if pool.device == self.device else None

    def freight(self, key: bytes, tokens: int) -> Freight | None:
        """A chunk of so many tokens in CPU memory, where kernels can read it as it is held once its bytes are on the device."""
        if key in self._given:
            return None
        index = self._index[key]
        kept = self._batch.kept(index)
        if "freight" not in kept:
            kept["freight"] = self._freight(index, tokens)
        freight: Freight | None = kept["freight"]
        return freight

    def _freight(self, index: int, tokens: int) -> Freight | None:
        codec = next((name for name in _READ if name == self._batch.codecs[index]), None)
        held = None if codec is None else self._batch.payload(index)
        if codec is None or held is None:
            return None
        layers = Layers([self._stored(index, layer, codec, tokens) for layer in range(len(self._cache.layers))])
        return Freight.of(*held, layers)

    def stretch(self, placed: Placed, key: bytes) -> Stretch:
        """A chunk of the prompt, with what its tier says of how it is held."""
        if key in self._given:
            return Stretch(placed, key)
        index = self._index[key]
        codec = next((name for name in _DECODED if name == self._batch.codecs[index]), None)
        return Stretch(placed, key, codec, codec is not None and self._batch.unrotated[index])

    def held(self, stretch: Stretch, layer: int) -> list[Stored]:
        """K and V of a stretch as their tier holds them, where the device reads them.

        Raises:
            RecordError: the record proved damaged; the store has dropped it.
        """
        room = self._cache.layers[layer]
        if stretch.key in self._given:
            given = self._given[stretch.key]
            return [Stored.raw(at_room(tensor, room)) for tensor in (given.keys[layer], given.values[layer])]
        index = self._index[stretch.key]
        if stretch.codec is None:
            return [Stored.raw(at_room(tensor, room)) for tensor in self._batch.layer(index, layer)]
        tokens = len(stretch.placed.chunk)
        return list(self._stored(index, layer, stretch.codec, tokens, lambda part: at_room(part, room)))

    def _stored(
        self,
        index: int,
        layer: int,
        codec: CodecName,
        tokens: int,
        moved: Callable[[Tensor], Tensor] = lambda part: part,
    ) -> tuple[Stored, Stored]:
        """K and V of a layer of the batch as they are held."""
        room = self._cache.layers[layer]
        heads = room.key_room.shape[1]

        def side(parts: Mapping[str, Tensor], name: Side, dim: int) -> Stored:
            return Stored.encoded(codec, {key: moved(part) for key, part in parts.items()}, (heads, tokens, dim), name)

        keys, values = self._batch.parts(index, layer)
        return side(keys, "k", room.key_room.shape[3]), side(values, "v", room.value_room.shape[3])


def layers_of(kv: ChunkKV) -> Layers:
    """All layers of KV, looked at once, as long as their tensors are the same."""
    known: Layers | None = kv.kept.get("layers")
    if known is not None:
        looked_at = (held.numbers for pair in known.pairs for held in pair)
        if all(map(is_, looked_at, (tensor for pair in kv for tensor in pair))):
            return known
    known = kv.kept["layers"] = Layers.raw(list(kv))
    return known


def at_room(tensor: Tensor, room: FusedLayer) -> Tensor:
    """A tensor on a layer's device; nothing waits for its copy."""
    return tensor.to(room.key_room.device, non_blocking=True)
