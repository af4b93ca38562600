"""The transformers cache that fusion fills and decoding grows: allocated once, written in place.

L layers, B sequences, H kv heads, N tokens held, C tokens allocated, D head_dim.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import create_causal_mask

from ragkv.chunk import ChunkKV
from ragkv.errors import ArgumentError
from ragkv.kernels import Impl, Layers, scatter

#: Called with the layer, fresh keys and fresh values ``[B, H, S, D]``; returns what attention shall see.
Writer = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


@functools.cache
def cache_argument(function: Callable[..., Any]) -> str:
    """By which name a function of transformers, or a model's ``forward``, takes the cache.

    transformers 5.24 calls ``cache`` what was ``past_key_values``; a model that brings its own code may not have followed. One that
    hands all on takes what transformers' own functions do.
    """
    names = ("cache", "past_key_values")
    taken = inspect.signature(function).parameters
    return next((name for name in names if name in taken), None) or cache_argument(create_causal_mask)


class LayerSpec(NamedTuple):
    """What one layer's keys and values look like."""

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def token_bytes(self) -> int:
        """What a token takes."""
        return self.heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


def random_kv(specs: Sequence[LayerSpec], tokens: int) -> ChunkKV:
    """Random numbers of a model's shapes, always the same: to measure what KV take."""
    draw = torch.Generator().manual_seed(0)

    def side(heads: int, dim: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(heads, tokens, dim, generator=draw, dtype=torch.float32, device="cpu").to(dtype)

    keys = [side(spec.heads, spec.key_dim, spec.dtype) for spec in specs]
    return ChunkKV(keys, [side(spec.heads, spec.value_dim, spec.dtype) for spec in specs], 0)


def empty_like(room: Tensor, capacity: int) -> Tensor:
    """Another room ``[B, H, C, D]``; it may be written to in inference mode and outside, whoever makes it where."""
    with torch.inference_mode(False):
        return room.new_empty(*room.shape[:2], capacity, room.shape[3])


#: K and V ``[B, H, C, D]`` of each layer.
Rooms = Sequence[tuple[Tensor, Tensor]]


def in_blocks(specs: Sequence[LayerSpec], capacity: int) -> tuple[list[Tensor], Rooms]:
    """Blocks ``[count, 1, H, C, D]``, one for all keys and values of a shape; and the rooms side by side in them."""
    kinds: dict[tuple[int, int, torch.dtype, torch.device], list[tuple[int, int]]] = {}
    for number, (heads, key_dim, value_dim, dtype, device) in enumerate(specs):
        for side, dim in enumerate((key_dim, value_dim)):
            kinds.setdefault((heads, dim, dtype, device), []).append((number, side))
    blocks, rooms = list[Tensor](), [[Tensor(), Tensor()] for _ in specs]
    with torch.inference_mode(False):  # as of empty_like
        for (heads, dim, dtype, device), places in kinds.items():
            blocks.append(torch.empty(len(places), 1, heads, capacity, dim, dtype=dtype, device=device))
            for (number, side), room in zip(places, blocks[-1].unbind(0), strict=True):
                rooms[number][side] = room
    return blocks, [(keys, values) for keys, values in rooms]


class FusedLayer(CacheLayerMixin):
    """One layer's keys and values, with room to grow in place.

    Attributes:
        length: N.
        dropped: positions in front that are claimed to have been read and forgotten, as by a sliding window; 0 but in probes.
        laid: what is known of the memory of this layer and those behind it, see :attr:`FusedCache.laid`; let go with the memory.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, spec: LayerSpec, keys: Tensor, values: Tensor):
        self.dtype: torch.dtype = spec.dtype
        self.device: torch.device = spec.device
        self.length: int = 0
        self.dropped: int = 0
        self.is_initialized = True
        self.laid: tuple[list[Tensor], Layers] | None = None
        self.key_room: Tensor = keys
        self.value_room: Tensor = values

    @property
    def keys(self) -> Tensor:
        """``[B, H, N, D]``, a view without the room kept for the answer."""
        return self.key_room[:, :, : self.length]

    @property
    def values(self) -> Tensor:
        """``[B, H, N, D]``, a view without the room kept for the answer."""
        return self.value_room[:, :, : self.length]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the room is allocated when the layer is made."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append ``[B, H, S, D]`` behind what is held and return all of it, without copying what is held."""
        end = self.length + key_states.shape[2]
        if end > self.key_room.shape[2]:
            self._grow(max(end, self.key_room.shape[2] * 3 // 2))  # amortised: each token is moved O(1) times
        self.key_room[:, :, self.length : end] = key_states
        self.value_room[:, :, self.length : end] = value_states
        self.length = end
        return self.keys, self.values

    def _grow(self, capacity: int) -> None:
        def larger(old: Tensor) -> Tensor:
            room = empty_like(old, capacity)
            room[:, :, : self.length] = old[:, :, : self.length]
            return room

        self._map(larger)  # both or, where there is no memory, none

    def get_seq_length(self) -> int:
        """The position of the next token: N, unless something in front was dropped."""
        return self.dropped + self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that ``query_length`` new tokens will see."""
        return self.length + query_length, self.dropped

    def get_max_length(self) -> int:
        """-1: it grows."""
        return -1

    @property
    def batch_size(self) -> int:
        """B."""
        return self.key_room.shape[0]

    def reset(self) -> None:
        """Forget everything, keep the room."""
        self.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens (transformers passes a number <= 0)."""
        self.length = max(0, self.length - abs(tokens_to_remove))

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.key_room, self.value_room = change(self.key_room), change(self.value_room)
        self.laid = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Pick sequences, for beam search."""
        self._map(lambda room: room.index_select(0, beam_idx.to(room.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence ``repeats`` times."""
        self._map(lambda room: room.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices``."""
        self._map(lambda room: room[indices.to(room.device)])


def _rooms(spec: LayerSpec, capacity: int) -> tuple[Tensor, Tensor]:
    keys, values = (
        torch.empty(1, spec.heads, capacity, dim, dtype=spec.dtype, device=spec.device)
        for dim in (spec.key_dim, spec.value_dim)
    )
    return keys, values


class FusedCache(Cache):
    """A :class:`transformers.Cache` of :class:`FusedLayer`.

    It appends, as any other, but while :meth:`writing`: then a writer takes the fresh keys and values.

    Args:
        specs: of the layers.
        capacity: C.
        rooms: their memory, of so many slots; new by default.

    Attributes:
        writer: takes them, where there is one.
        before: told of each layer right before they are taken: time to have in it what they attend to.
    """

    layers: list[FusedLayer]

    def __init__(self, specs: Sequence[LayerSpec], capacity: int, rooms: Rooms | None = None):
        with torch.inference_mode(False):  # as of empty_like
            rooms = [_rooms(spec, capacity) for spec in specs] if rooms is None else rooms
            super().__init__(layers=[FusedLayer(spec, *pair) for spec, pair in zip(specs, rooms, strict=True)])
        self.writer: Writer | None = None
        self.before: Callable[[int], object] | None = None
        self._assisted = False

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take fresh keys and values ``[B, H, S, D]`` of one layer; return all that attention shall see.

        Raises:
            ArgumentError: ``model.generate`` begins assisted decoding with the whole prompt, behind the prompt that is held.
        """
        if self.before is not None:
            self.before(layer_idx)
        if self.writer is not None:
            return self.writer(layer_idx, key_states, value_states)
        assisted, self._assisted = self._assisted, False
        if assisted and key_states.shape[2] > self.layers[layer_idx].length > 0:
            raise ArgumentError(
                "model.generate does not go on from a prompt that a cache holds when tokens are proposed (assistant_model, "
                "prompt_lookup_num_tokens): it computes the prompt again behind itself. Give engine.generate these arguments, "
                "or leave them out"
            )
        return self.layers[layer_idx].update(key_states, value_states)

    def activate_past_recording(self) -> None:
        """Called by transformers where it will crop, as before assisted decoding; whatever is held can be cropped."""
        self._assisted = True

    @contextmanager
    def writing(self, writer: Writer) -> Iterator[None]:
        """Have fresh keys and values taken by a writer. The cache counts as empty: ready-made masks say what is seen."""
        self.set_length(0)
        self.writer = writer
        try:
            yield
        finally:
            self.writer = None

    def scatter(
        self, layer: int, keys: Tensor, values: Tensor, slots: Tensor, shown: int, impl: Impl = "auto"
    ) -> tuple[Tensor, Tensor]:
        """Put fresh ``[1, H, S, D]`` of one layer to their slots ``[S]``; return the first ``shown`` slots ``[1, H, N, D]``."""
        held = self.layers[layer]
        scatter(keys[0], values[0], slots.to(keys.device), held.key_room[0], held.value_room[0], impl=impl)
        return held.key_room[:, :, :shown], held.value_room[:, :, :shown]

    @property
    def device(self) -> torch.device | None:
        """Where all layers lie; ``None`` where that is on several devices."""
        found = {layer.key_room.device for layer in self.layers}
        return found.pop() if len(found) == 1 else None

    @property
    def laid(self) -> Layers:
        """K and V ``[H, C, D]`` of all layers as placing takes them, on one device; looked at once, as long as they stay there."""
        rooms = [room for layer in self.layers for room in (layer.key_room, layer.value_room)]
        known = self.layers[0].laid
        if known is None or not all(map(is_, rooms, known[0])):
            known = rooms, Layers.raw([(layer.key_room[0], layer.value_room[0]) for layer in self.layers])
            self.layers[0].laid = known
        return known[1]

    def share(self, other: FusedCache) -> None:
        """Have the memory of another cache for one's own."""
        for layer, there in zip(self.layers, other.layers, strict=True):
            layer.key_room, layer.value_room = there.key_room, there.value_room
        self.layers[0].laid = other.layers[0].laid

    def leave(self, other: FusedCache, rooms: Rooms) -> None:
        """Have other memory for what is another cache's; some may have grown out of it already, where a pass failed."""
        for layer, there, (keys, values) in zip(self.layers, other.layers, rooms, strict=True):
            if layer.key_room is there.key_room:
                layer.key_room = keys
            if layer.value_room is there.value_room:
                layer.value_room = values
        self.layers[0].laid = None

    def append(self, kv: ChunkKV | None) -> None:
        """Put KV behind what is held; ``None`` for no tokens."""
        if kv is None:
            return
        for layer, (keys, values) in zip(self.layers, kv, strict=True):
            layer.update(keys[None].to(layer.device), values[None].to(layer.device))

    def clear(self, slots: Tensor) -> None:
        """Zero slots that attention is shown before anything is held there: what masks hide must be numbers too."""
        for layer in self.layers:
            here = slots.to(layer.key_room.device)
            layer.key_room.index_fill_(2, here, 0)
            layer.value_room.index_fill_(2, here, 0)

    def reserve(self, held: int, capacity: int) -> None:
        """Declare the first ``held`` slots as held, forget what is behind them, and have room for ``capacity`` in all, or for more:
        as much in every layer.
        """
        self.set_length(held)
        capacity = max(capacity, *(layer.key_room.shape[2] for layer in self.layers))
        for layer in self.layers:
            if capacity > layer.key_room.shape[2]:
                layer._grow(capacity)

    def set_length(self, tokens: int) -> None:
        """Declare the first ``tokens`` slots of every layer as held."""
        for layer in self.layers:
            layer.length = tokens
