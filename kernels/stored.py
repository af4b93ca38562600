"""Keys or values as the store holds them, and where they shall go: what ``place`` reads.

H kv heads, T tokens, D head_dim, P tokens of a block, G groups of a line, E numbers of a group, R rotated dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

#: How numbers are stored; the names are those of ``ragkv.store.codecs``.
CodecName = Literal["raw", "int8", "int4", "fp8"]
Side = Literal["k", "v"]


@dataclass(frozen=True, eq=False)
class Stored:
    """One layer's K or V of one chunk. Made by :meth:`raw`, :meth:`paged` or :meth:`encoded`.

    Attributes:
        numbers: ``raw``: ``[H, T, D]``, or with ``slots`` a pool ``[blocks, H, P, D]``; ``fp8``: ``[H, T, D]`` e4m3; ``int8`` and
            ``int4``: uint8 lines, ``[H, D, G E]`` for K (a line is a channel), ``[H, T, G E]`` for V (a line is a token); int4
            packs two numbers a byte, the even one in the low half.
        shape: ``(H, T, D)``.
        codec: how the numbers are stored.
        side: K or V, which the codecs treat differently.
        scale: ``fp8``: fp32, ``[H, 1, D]`` for K, ``[H, T, 1]`` for V; ``int8`` and ``int4``: the steps ``[H, lines, G]``, fp16
            or fp32.
        low: ``int8`` and ``int4``: the number that 0 stands for, ``[H, lines, G]``, fp16 or fp32.
        slots: ``[T]`` int64, where each token lies in the pool, see :func:`slots_of`.
    """

    numbers: Tensor
    shape: tuple[int, int, int]
    codec: CodecName = "raw"
    side: Side = "v"
    scale: Tensor | None = None
    low: Tensor | None = None
    slots: Tensor | None = None

    @classmethod
    def raw(cls, numbers: Tensor) -> Stored:
        """Numbers ``[H, T, D]`` as they are."""
        heads, tokens, dim = numbers.shape
        return cls(numbers, (heads, tokens, dim))

    @classmethod
    def paged(cls, pool: Tensor, slots: Tensor) -> Stored:
        """Tokens of a pool ``[blocks, H, P, D]``, those of several chunks if need be: where each lies ``[T]``."""
        return cls(pool, (pool.shape[1], slots.shape[0], pool.shape[3]), slots=slots)

    @classmethod
    def encoded(cls, codec: CodecName, parts: Mapping[str, Tensor], shape: tuple[int, int, int], side: Side) -> Stored:
        """The named parts that a codec of ``ragkv.store.codecs`` makes of a tensor ``[H, T, D]``."""
        if codec == "raw":  # K and V are of a kind then
            return cls.raw(parts[""])
        scale = parts.get("scale") if codec == "fp8" else parts.get("step")
        return cls(parts[""], shape, codec, side, scale, parts.get("low"))

    @property
    def parts(self) -> list[Tensor]:
        """The tensors that it consists of, slots apart."""
        return [part for part in (self.numbers, self.scale, self.low) if part is not None]

    @property
    def lines(self) -> tuple[int, int]:
        """``int8`` and ``int4``: how many lines a head has and how many numbers one holds, without those that fill it up."""
        _, tokens, dim = self.shape
        return (dim, tokens) if self.side == "k" else (tokens, dim)

    @property
    def group(self) -> int:
        """``int8`` and ``int4``: E; 0 where there are no groups."""
        if self.codec not in ("int8", "int4") or self.scale is None or not self.scale.shape[-1]:
            return 0
        return self.numbers.shape[-1] * (2 if self.codec == "int4" else 1) // self.scale.shape[-1]


def slots_of(blocks: Tensor, block_tokens: int, tokens: int) -> Tensor:
    """Where the tokens of a list of blocks lie: block x P + place in the block.

    Args:
        blocks: ``[ceil(T / P)]`` integers.
        block_tokens: P.
        tokens: T.

    Returns:
        ``[T]`` int64.
    """
    places = torch.arange(block_tokens, device=blocks.device)
    return (blocks.long()[:, None] * block_tokens + places).flatten()[:tokens]


@dataclass(frozen=True, eq=False)
class Piece:
    """One chunk's K or V of one layer (or several chunks', side by side in a pool and in the prompt), and where it goes.

    Attributes:
        out: ``[H, T, D]``, written; a strided view of the prompt's cache.
        stored: what goes there.
        cos: ``[T, R / 2]`` fp32, from :func:`~ragkv.kernels.rotation_tables`; ``None`` where nothing turns.
        sin: ``[T, R / 2]`` fp32.
        interleaved: which dimensions form a pair, see :class:`~ragkv.kernels.Rotation`.
    """

    out: Tensor
    stored: Stored
    cos: Tensor | None = None
    sin: Tensor | None = None
    interleaved: bool = False
