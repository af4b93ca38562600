"""Blocks of KV on a device, allocated once (PagedAttention's idea, arXiv:2309.06180, section 4).

A chunk is a list of blocks of equally many tokens, anywhere in the pool: what one leaves fits any other.

L layers, H kv heads, T tokens, D head_dim, P tokens of a block, N blocks.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ragkv.chunk import ChunkKV
from ragkv.errors import StoreError, StoreFullError
from ragkv.store.source import Parts, Source

BLOCK_TOKENS = 16  # P

Kind = tuple[int, int, int, int, torch.dtype]  # heads and dim of K, heads and dim of V, dtype


class BlockPool:
    """N blocks. Safe for several threads.

    Args:
        like: KV of whose layers, heads, dims and dtype all others must be.
        budget_bytes: the most that the pool may take.
        device: where.

    Raises:
        StoreFullError: not one block fits.
    """

    def __init__(self, like: ChunkKV, budget_bytes: int, device: torch.device | str) -> None:
        self.kinds: tuple[Kind, ...] = kinds_of(like)
        self.block_bytes: int = BLOCK_TOKENS * sum((hk * dk + hv * dv) * t.itemsize for hk, dk, hv, dv, t in self.kinds)
        self.count: int = budget_bytes // self.block_bytes
        if not self.count:
            raise StoreFullError(f"a block takes {self.block_bytes} bytes, gpu_bytes is {budget_bytes}")
        shape = (self.count, BLOCK_TOKENS)
        with torch.inference_mode(False):  # whoever is first in may be in it, and others not
            self._keys = [torch.empty(shape[0], h, shape[1], d, dtype=t, device=device) for h, d, _, _, t in self.kinds]
            self._values = [
                torch.empty(shape[0], h, shape[1], d, dtype=t, device=device) for _, _, h, d, t in self.kinds
            ]
        self.kept: dict[str, Any] = {}  # see Source
        self._free = list(range(self.count))
        # Reentrant: blocks are given back when their chunk is collected, which may be here.
        self._lock = threading.RLock()

    @property
    def free_blocks(self) -> int:
        """How many blocks nobody uses."""
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """How many blocks so many tokens take."""
        return -(-tokens // BLOCK_TOKENS)

    def allocate(self, count: int) -> list[int]:
        """Takes blocks.

        Raises:
            StoreFullError: fewer are free; none was taken.
        """
        with self._lock:
            if count > len(self._free):
                raise StoreFullError(f"{count} blocks are needed, {len(self._free)} of {self.count} are free")
            return [self._free.pop() for _ in range(count)]

    def release(self, blocks: Sequence[int]) -> None:
        """Gives blocks back."""
        with self._lock:
            self._free += blocks

    def write(self, blocks: Sequence[int], kv: ChunkKV) -> None:
        """Copies a chunk's KV into blocks."""
        place = torch.arange(len(kv), device=self._keys[0].device)
        index = torch.tensor(blocks, device=place.device)[place // BLOCK_TOKENS]
        for layer, (keys, values) in enumerate(kv):
            self._keys[layer][index, :, place % BLOCK_TOKENS] = keys.transpose(0, 1).to(place.device)
            self._values[layer][index, :, place % BLOCK_TOKENS] = values.transpose(0, 1).to(place.device)

    def read(self, blocks: Tensor, tokens: int, layer: int) -> tuple[Tensor, Tensor]:
        """K and V ``[H, T, D]`` of one layer, gathered from its blocks."""
        keys, values = (store[layer].index_select(0, blocks).transpose(0, 1) for store in (self._keys, self._values))
        return keys.flatten(1, 2)[:, :tokens], values.flatten(1, 2)[:, :tokens]

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """All blocks' K and V of a layer, ``[N, H, P, D]`` each."""
        return self._keys[layer], self._values[layer]


class Pooled(Source):
    """A chunk in a pool. Its blocks are given back when nobody refers to it: no tier, and no batch."""

    def __init__(self, pool: BlockPool, kv: ChunkKV) -> None:
        if kinds_of(kv) != pool.kinds:
            raise StoreError("the chunk has other layers, heads or dtypes than the pool")
        super().__init__("gpu", kv)
        self._pool = pool
        blocks = pool.allocate(pool.blocks_for(len(kv)))
        weakref.finalize(self, pool.release, blocks).atexit = False
        pool.write(blocks, kv)
        self.kept = pool.kept
        self._blocks = torch.tensor(blocks, device=pool._keys[0].device)
        places = torch.arange(BLOCK_TOKENS, device="cpu")
        self.slots: Tensor | None = (torch.tensor(blocks, device="cpu")[:, None] * BLOCK_TOKENS + places).flatten()[
            : len(kv)
        ]

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V ``[H, T, D]`` of a layer, on the device."""
        return self._pool.read(self._blocks, self.tokens, layer)

    def parts(self, layer: int) -> Parts:
        """The layer's whole pool, in which ``slots`` are the chunk's."""
        keys, values = self._pool.layer(layer)
        return {"": keys}, {"": values}


def kinds_of(kv: ChunkKV) -> tuple[Kind, ...]:
    """What must be equal in all chunks of a pool."""
    return tuple((k.shape[0], k.shape[2], v.shape[0], v.shape[2], k.dtype) for k, v in kv)
