"""Integers for groups of numbers: what the codecs int8 and int4 share."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ragkv.errors import RecordError, StoreError
from ragkv.store.codecs.base import Codec, Side

_HALF_MAX = 6e4


class Grouped(Codec):
    """Asymmetric quantisation in groups: ``number = low + step x integer``, as in KIVI (arXiv:2402.02750).

    K is quantised per channel, over groups of tokens, because its outliers keep to channels; V per token, over groups
    of channels. K is taken before rotation where the store is told how it turns.

    Args:
        group: numbers that share a step and a lowest value.
    """

    before_rotation = True
    bits: ClassVar[int]

    def __init__(self, group: int = 64) -> None:
        self.group = group

    def encode(self, tensor: Tensor, side: Side, depth: float = 0.0) -> dict[str, Tensor]:
        """See the base class: ``""`` holds the integers, ``step`` and ``low`` a number a group.

        Raises:
            StoreError: a number is not finite.
        """
        grouped = _group(tensor.float(), side, self.group)  # [H, lines, groups, group]
        low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
        if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
            raise StoreError(f"the codec {self.name!r} needs finite numbers: store them with 'raw' or 'lossless'")
        step = ((high - low) / (2**self.bits - 1)).clamp(min=torch.finfo(torch.float32).tiny)
        low, step = _small(low), _small(step)
        # Rounded to half precision a step may be zero: then every number of the group is its lowest.
        scaled = torch.where(step > 0, (grouped - low.float()) / step.float(), torch.zeros((), device="cpu"))
        integers = scaled.round().clamp(0, 2**self.bits - 1).to(torch.uint8)
        return {"": self.pack(integers.flatten(2)), "step": step.squeeze(-1), "low": low.squeeze(-1)}

    def decode(self, parts: dict[str, Tensor], shape: tuple[int, int, int], dtype: torch.dtype, side: Side) -> Tensor:
        """See the base class."""
        heads, tokens, dim = shape
        lines, length = (dim, tokens) if side == "k" else (tokens, dim)
        try:
            step, low = parts["step"], parts["low"]
            groups = step.shape[2]
            integers = self.unpack(parts[""]).view(heads, lines, groups, -1)
            if (groups - 1) * integers.shape[3] >= length or groups * integers.shape[3] < length:
                raise ValueError(f"{groups} groups of {integers.shape[3]} for {length} numbers")
            line = (integers.float() * step.float().unsqueeze(-1) + low.float().unsqueeze(-1)).flatten(2)[..., :length]
        except (KeyError, ValueError, RuntimeError, IndexError, ZeroDivisionError) as error:
            raise RecordError(f"the parts do not make up {shape} numbers: {error}") from error
        return (line.transpose(1, 2) if side == "k" else line).contiguous().to(dtype)

    def pack(self, integers: Tensor) -> Tensor:
        """Integers ``[H, lines, numbers]`` as they are stored."""
        return integers

    def unpack(self, packed: Tensor) -> Tensor:
        """The integers of :meth:`pack`."""
        return packed


def _group(tensor: Tensor, side: Side, group: int) -> Tensor:
    """``[H, D, groups of tokens, group]`` for K, ``[H, T, groups of channels, group]`` for V.

    A line shorter than a group is a group; the last one is filled up with its last number.
    """
    lines = tensor.transpose(1, 2) if side == "k" else tensor
    length = lines.shape[2]
    size = min(group, length + length % 2)
    missing = -length % size
    filled = torch.cat([lines, lines[..., -1:].expand(-1, -1, missing)], -1) if missing else lines
    return filled.reshape(filled.shape[0], filled.shape[1], -1, size)


def _small(numbers: Tensor) -> Tensor:
    """In half precision, where they fit into it."""
    return numbers.half() if float(numbers.abs().max()) < _HALF_MAX else numbers
