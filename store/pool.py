"""Blocks of KV on a device, allocated once (PagedAttention's idea, arXiv:2309.06180, section 4).

A chunk is a list of blocks of equally many tokens, anywhere in the pool: what one leaves fits any other.

L layers, H kv heads, T tokens, D head_dim, P tokens of a block, N blocks.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ragkv.chunk import ChunkKV
from ragkv.errors import StoreError, StoreFullError
from ragkv.store.buffers import allocate
from ragkv.store.record import Record
from ragkv.store.source import Parts, Source

BLOCK_TOKENS = 16  # P

Kind = tuple[int, int, torch.dtype]  # heads, dim and dtype of one layer's K or V


class BlockPool:
    """N blocks. Safe for several threads.

    Args:
        like: a chunk, of whose layers, heads, dims and dtype all others must be.
        budget_bytes: the most that the pool may take.
        device: where.

    Raises:
        StoreFullError: not one block fits.
    """

    def __init__(self, like: Record, budget_bytes: int, device: torch.device | str) -> None:
        self.kinds: tuple[Kind, ...] = kinds_of(like)
        self.block_bytes: int = BLOCK_TOKENS * sum(heads * dim * dtype.itemsize for heads, dim, dtype in self.kinds)
        self.count: int = budget_bytes // self.block_bytes
        if not self.count:
            raise StoreFullError(f"a block takes {self.block_bytes} bytes, gpu_bytes is {budget_bytes}")
        # What is of one kind lies in one tensor [sides of this kind, N, H, P, D]: a chunk is written to all of it at once.
        self._rooms: dict[Kind, Tensor] = {}
        with torch.inference_mode(False):  # whoever is first in may be in it, and others not
            for kind in dict.fromkeys(self.kinds):
                heads, dim, dtype = kind
                shape = (self.kinds.count(kind), self.count, heads, BLOCK_TOKENS, dim)
                self._rooms[kind] = torch.empty(shape, dtype=dtype, device=device)
            self._sides = self._in_order(self._rooms.values())
        self.device: torch.device = self._sides[0].device
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

    @torch.no_grad()
    def bring(self, kv: ChunkKV) -> list[Tensor]:
        """A chunk's numbers on the device, as :meth:`write` takes them: ``[sides, H, T, D]`` a kind.

        Nothing is waited for where they lie in pinned memory, or are there already.

        Raises:
            StoreError: they do not fit in here.
        """
        if tuple((side.shape[0], side.shape[2], side.dtype) for pair in kv for side in pair) != self.kinds:
            raise StoreError("the chunk has other layers, heads or dtypes than the pool")
        brought = [room.new_empty(len(room), room.shape[2], len(kv), room.shape[4]) for room in self._rooms.values()]
        given = (side for pair in kv for side in pair)
        for place, side in zip(self._in_order(brought), given, strict=True):
            place.copy_(side, non_blocking=place.is_cuda)
        return brought

    @torch.no_grad()
    def write(self, slots: Tensor, brought: Sequence[Tensor]) -> None:
        """Copies a chunk's numbers to where its tokens lie, a launch a kind. ``slots`` are on the device."""
        blocks, places = slots // BLOCK_TOKENS, slots % BLOCK_TOKENS
        for room, numbers in zip(self._rooms.values(), brought, strict=True):
            room[:, blocks, :, places] = numbers.permute(2, 0, 1, 3)

    def read(self, blocks: Tensor, tokens: int, layer: int) -> tuple[Tensor, Tensor]:
        """K and V ``[H, T, D]`` of one layer, gathered from its blocks."""
        keys, values = (side.index_select(0, blocks).transpose(0, 1) for side in self.layer(layer))
        return keys.flatten(1, 2)[:, :tokens], values.flatten(1, 2)[:, :tokens]

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """All blocks' K and V of a layer, ``[N, H, P, D]`` each."""
        return self._sides[2 * layer], self._sides[2 * layer + 1]

    def _in_order(self, by_kind: Iterable[Tensor]) -> list[Tensor]:
        """Layer 0's K and V, layer 1's, and so on, of tensors whose first dimension is the sides of a kind."""
        rows = {kind: iter(sides) for kind, sides in zip(self._rooms, by_kind, strict=True)}
        return [next(rows[kind]) for kind in self.kinds]


class Pooled(Source):
    """A chunk in a pool. Its blocks are given back when nobody refers to it: no tier, and no batch.

    Raises:
        StoreFullError: so many blocks are not free.
    """

    def __init__(self, pool: BlockPool, record: Record, brought: Sequence[Tensor]) -> None:
        super().__init__("gpu", record)
        self.codec, self.unrotated = "raw", False  # whatever the record's was
        self._pool = pool
        blocks = pool.allocate(pool.blocks_for(self.tokens))
        weakref.finalize(self, pool.release, blocks).atexit = False
        self.kept = pool.kept
        # In memory that a device copies from without anybody waiting.
        slots = allocate(8 * len(blocks) * BLOCK_TOKENS)[0].view(torch.int64).view(-1, BLOCK_TOKENS)
        starts = torch.tensor(blocks, device="cpu")[:, None] * BLOCK_TOKENS
        torch.add(starts, torch.arange(BLOCK_TOKENS, device="cpu"), out=slots)
        self.slots: Tensor | None = slots.flatten()[: self.tokens]
        there = self.slots.to(pool.device, non_blocking=True)
        self._blocks = there[::BLOCK_TOKENS] // BLOCK_TOKENS
        pool.write(there, brought)

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V ``[H, T, D]`` of a layer, on the device."""
        return self._pool.read(self._blocks, self.tokens, layer)

    def parts(self, layer: int) -> Parts:
        """The layer's whole pool, in which ``slots`` are the chunk's."""
        keys, values = self._pool.layer(layer)
        return {"": keys}, {"": values}


def kinds_of(record: Record) -> tuple[Kind, ...]:
    """What must be equal in all chunks of a pool: of layer 0's K and V, layer 1's, and so on."""
    pairs = zip(record.shapes, record.dtypes, strict=True)
    return tuple((heads, dim, dtype) for pair, dtype in pairs for heads, _, dim in pair)
