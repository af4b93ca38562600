"""Quantised differences between neighbouring tokens, entropy-coded (CacheGen, arXiv:2310.07240, section 5.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from ragkv.errors import RecordError, StoreError
from ragkv.store.codecs.base import Codec, Side
from ragkv.store.codecs.lossless import decompressed, zstd

_LARGEST = 127


class CacheGen(Codec):
    """Groups of tokens: the first is the anchor, the others are stored as their difference from it.

    Both are counted in steps of a share of the standard deviation, of a channel for K and of a token for V, and the counts are
    compressed with zstd, whose Huffman coding is the entropy coder. Steps are finer in early layers, which matter more.
    CacheGen codes arithmetically, with a table for each channel and layer, on a GPU; anchors have 8 bits there. Needs
    ``zstandard``.

    On the models that ragkv measures itself on, differences take 0.2 to 0.4 bits *more* than the tokens themselves:
    ``group_tokens=1`` stores those, and is the default (docs/store.md has the figures).

    Args:
        bins: steps in standard deviations, for as many equal parts of the layers, first layers first.
        group_tokens: tokens that share an anchor, 10 in the paper; 1 for no differences.
        level: zstd's.
    """

    name = "cachegen"
    before_rotation = True

    def __init__(self, bins: tuple[float, ...] = (0.2, 0.3, 0.4), group_tokens: int = 1, level: int = 1) -> None:
        if not bins or min(bins) <= 0 or group_tokens < 1:
            raise StoreError(f"cachegen needs bins above 0 and groups of at least 1, got {bins} and {group_tokens}")
        self.bins: tuple[float, ...] = bins
        self.group_tokens: int = group_tokens
        self.level: int = level

    def encode(self, tensor: Tensor, side: Side, depth: float = 0.0) -> dict[str, Tensor]:
        """See the base class: ``""`` holds the compressed counts; ``center``, ``step`` a number a line; ``group`` its size.

        Raises:
            StoreError: a number is not finite.
        """
        numbers = self.finite(tensor.float())
        along = 1 if side == "k" else 2
        center = numbers.mean(along, keepdim=True).bfloat16()
        numbers = numbers - center.float()
        step = self._step(numbers, along, depth)
        first = _anchors(numbers.shape[1], self.group_tokens)
        others = (torch.arange(numbers.shape[1], device="cpu") != first)[:, None]
        anchors = ((numbers / step.float()).round() * step.float())[:, first]
        counts = ((numbers - anchors * others) / step.float()).round().clamp(-_LARGEST, _LARGEST).to(torch.int8)
        packed = zstd().ZstdCompressor(level=self.level).compress(counts.contiguous().numpy().data)
        return {
            "": torch.frombuffer(bytearray(packed), dtype=torch.uint8),
            "center": center,
            "step": step,
            "group": torch.tensor([self.group_tokens], dtype=torch.float32, device="cpu"),
        }

    def _step(self, numbers: Tensor, along: int, depth: float) -> Tensor:
        """A step a line, large enough for every count to fit into a byte."""
        share = self.bins[min(int(depth * len(self.bins)), len(self.bins) - 1)]
        reach = numbers.abs().amax(along, keepdim=True)
        if self.group_tokens > 1:  # a difference from an anchor on another line may be twice the largest number
            reach = 2 * (reach if along == 1 else reach.amax(1, keepdim=True).expand_as(reach))
        step = torch.maximum(share * numbers.std(along, keepdim=True, correction=0), 1.01 * reach / _LARGEST).bfloat16()
        return torch.where(step > 0, step, torch.ones((), dtype=torch.bfloat16, device="cpu"))

    def decode(self, parts: dict[str, Tensor], shape: tuple[int, int, int], dtype: torch.dtype, side: Side) -> Tensor:
        """See the base class."""
        heads, tokens, dim = shape
        wanted = (heads, 1, dim) if side == "k" else (heads, tokens, 1)
        try:
            center, step, group = parts["center"], parts["step"], int(parts["group"].item())
        except (KeyError, RuntimeError, ValueError, OverflowError) as error:
            raise RecordError(f"the parts do not make up {shape} numbers: {error}") from error
        if tuple(center.shape) != wanted or tuple(step.shape) != wanted or group < 1:
            raise RecordError(f"the parts do not make up {shape} numbers")
        counts = decompressed(parts[""], heads * tokens * dim).view(torch.int8).view(shape)
        numbers = counts.float() * step.float()
        if group > 1:
            first = _anchors(tokens, group)
            others = torch.arange(tokens, device="cpu") != first
            numbers += numbers[:, first] * others[:, None]
        return (numbers + center.float()).to(dtype)


def _anchors(tokens: int, group: int) -> Tensor:
    """For every token the first one of its group."""
    return torch.arange(tokens, device="cpu") // group * group
