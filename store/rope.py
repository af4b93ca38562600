"""Keys before rotary embedding: some codecs store K so, because its channels keep their scale there (KIVI, KVQuant).

H kv heads, T tokens, D head_dim, R rotated dimensions of a head (R <= D).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ragkv.errors import ArgumentTypeError


class RotationLike(Protocol):
    """What a caller says of one layer, as :class:`ragkv.kernels.Rotation` does."""

    @property
    def inv_freq(self) -> Tensor:
        """``[R / 2]`` fp32, radians per position of each pair."""

    @property
    def interleaved(self) -> bool:
        """Pairs are ``(2i, 2i + 1)``; otherwise ``(i, i + R / 2)``."""


@dataclass(frozen=True)
class Rope:
    """How rotary embedding turns one layer's keys (RoFormer, arXiv:2104.09864).

    Attributes:
        inv_freq: radians per position of each pair, as little-endian fp32.
        interleaved: see :class:`RotationLike`.
    """

    inv_freq: bytes
    interleaved: bool

    @classmethod
    def of(cls, rotation: RotationLike) -> Rope:
        """The same, as a value."""
        return cls(rotation.inv_freq.detach().cpu().numpy().astype("<f4").tobytes(), bool(rotation.interleaved))

    @property
    def rotary_dim(self) -> int:
        """R."""
        return len(self.inv_freq) // 2

    def turned(self, keys: Tensor, base: int, *, back: bool = False) -> Tensor:
        """Keys turned on from position 0 to where they stand, or back from there.

        Args:
            keys: ``[H, T, D]``.
            base: position of the first token.
            back: from their positions to 0.

        Returns:
            ``[H, T, D]`` in fp32.
        """
        cos, sin = _tables(self, base, keys.shape[1])
        sin = -sin if back else sin
        half, dim = self.rotary_dim // 2, self.rotary_dim
        even, odd = (slice(0, dim, 2), slice(1, dim, 2)) if self.interleaved else (slice(0, half), slice(half, dim))
        out = keys.to(torch.float32, copy=True)
        x, y = out[..., even].clone(), out[..., odd].clone()
        out[..., even] = x * cos - y * sin
        out[..., odd] = y * cos + x * sin
        return out


@lru_cache(maxsize=16)
def _tables(rope: Rope, base: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[T, R / 2]`` of the positions' angles, which models round to fp32."""
    positions = torch.arange(base, base + tokens, dtype=torch.float32, device="cpu")
    angles = (positions[:, None] * torch.from_numpy(np.frombuffer(rope.inv_freq, "<f4").copy())).double()
    return angles.cos().float(), angles.sin().float()


def ropes_of(rotations: Sequence[RotationLike | None]) -> tuple[Rope | None, ...]:
    """The same, as values; empty where no layer turns its keys."""
    try:
        # Layers share them, and each that lies on a GPU is waited for.
        each = list(rotations)
        distinct = {id(one): one for one in each if one is not None}
        known = {number: Rope.of(one) for number, one in distinct.items()}
        ropes = tuple(known.get(id(one)) for one in each)
    except (TypeError, AttributeError) as error:
        raise ArgumentTypeError(
            f"rotations must be a Rotation or None for each layer, got {rotations!r:.80}"
        ) from error
    return ropes if any(ropes) else ()


def fit(ropes: Sequence[Rope | None], dims: Sequence[int]) -> bool:
    """Whether there is one for each layer whose keys have these head_dims."""
    return len(ropes) == len(dims) and all(
        rope is None or rope.rotary_dim <= dim for rope, dim in zip(ropes, dims, strict=True)
    )


def to_text(ropes: Sequence[Rope | None]) -> str:
    """``[[layers of one kind, pairs are interleaved, frequencies in base64]...]``; no frequencies where keys do not turn."""
    runs = [(rope, len(list(equal))) for rope, equal in groupby(ropes)]
    return json.dumps(
        [
            [count, rope.interleaved, base64.b64encode(rope.inv_freq).decode()] if rope else [count, False, ""]
            for rope, count in runs
        ],
        separators=(",", ":"),
    )


@lru_cache(maxsize=16)
def from_text(text: str) -> tuple[Rope | None, ...]:
    """Reads :func:`to_text`.

    Raises:
        ValueError, TypeError: it is none.
    """
    ropes: list[Rope | None] = []
    for count, interleaved, frequencies in json.loads(text):
        data = base64.b64decode(frequencies, validate=True)
        if not 0 < count <= (1 << 16) - len(ropes) or len(data) % 4:
            raise ValueError(f"{count} layers with {len(data)} bytes of frequencies")
        ropes += [Rope(data, bool(interleaved)) if data else None] * count
    return tuple(ropes)
