# ruff: noqa: D102 - methods without a docstring keep the contract of base.Codec
"""Integers for groups of numbers: what the codecs int8 and int4 share."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ragkv.errors import RecordError, whole_number
from ragkv.store.codecs.base import Codec, Side

_HALF_MAX = 6e4
_DTYPES = {torch.float16, torch.float32}  # of steps and lowest numbers


class Grouped(Codec):
    """Asymmetric quantisation in groups: ``number = low + step x integer``, as in KIVI (arXiv:2402.02750).

    K is quantised per channel, over groups of tokens, because its outliers keep to channels; V per token, over groups
    of channels. K is taken before rotation where the store is told how it turns. No number errs by more than half of its group's
    step, but for what rounding to its dtype adds.

    Args:
        group: numbers that share a step and a lowest value. Where the last group of a line would have to be filled up by more than
            an eighth of it, all have fewer instead.

    Raises:
        ArgumentError, ArgumentTypeError: it is not a whole number above 0.
    """

    before_rotation = True
    bits: ClassVar[int]

    def __init__(self, group: int = 64) -> None:
        self.group: int = whole_number("group", group, 1)

    def encode(self, tensor: Tensor, side: Side, depth: float = 0.0) -> dict[str, Tensor]:
        """See the base class: ``""`` holds the integers, ``step`` and ``low`` a number a group.

        Raises:
            StoreError: a number is not finite.
        """
        grouped = _group(tensor.float(), side, self.group)  # [H, lines, groups, group]
        low, high = self.finite(grouped.amin(-1, keepdim=True)), self.finite(grouped.amax(-1, keepdim=True))
        low = -_small(-low)
        step = _small((high - low.float()) / (2**self.bits - 1))
        scaled = torch.where(step > 0, (grouped - low.float()) / step.float(), torch.zeros((), device="cpu"))
        integers = scaled.round().clamp(0, 2**self.bits - 1).to(torch.uint8)
        return {"": self.pack(integers.flatten(2)), "step": step.squeeze(-1), "low": low.squeeze(-1)}

    def check(self, parts: dict[str, Tensor], shape: tuple[int, int, int], dtype: torch.dtype, side: Side) -> None:
        (heads, _, _), (lines, length) = shape, _lines(shape, side)
        try:
            packed, step, low = parts[""], parts["step"], parts["low"]
            groups, held = step.shape[2], packed.shape[2] * 8 // self.bits
            if packed.dtype != torch.uint8 or not {step.dtype, low.dtype} <= _DTYPES or step.shape != low.shape:
                raise ValueError(f"{packed.dtype}, {step.dtype} {tuple(step.shape)}, {low.dtype} {tuple(low.shape)}")
            if not packed.shape[:2] == step.shape[:2] == (heads, lines):
                raise ValueError(f"lines {tuple(packed.shape[:2])} and {tuple(step.shape[:2])}, not {(heads, lines)}")
            if held % groups or not (groups - 1) * (held // groups) < length <= held:
                raise ValueError(f"{groups} groups in {held} for {length} numbers")
        except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
            raise RecordError(f"the parts do not make up {shape} numbers: {error}") from error

    def decode(self, parts: dict[str, Tensor], shape: tuple[int, int, int], dtype: torch.dtype, side: Side) -> Tensor:
        self.check(parts, shape, dtype, side)
        (lines, length), step, low = _lines(shape, side), parts["step"], parts["low"]
        integers = self.unpack(parts[""]).view(shape[0], lines, step.shape[2], -1)
        line = (integers.float() * step.float().unsqueeze(-1) + low.float().unsqueeze(-1)).flatten(2)[..., :length]
        return (line.transpose(1, 2) if side == "k" else line).contiguous().to(dtype)

    def pack(self, integers: Tensor) -> Tensor:
        """Integers ``[H, lines, numbers]`` as they are stored."""
        return integers

    def unpack(self, packed: Tensor) -> Tensor:
        """The integers of :meth:`pack`."""
        return packed


def _lines(shape: tuple[int, int, int], side: Side) -> tuple[int, int]:
    """How many lines a head has, and how many numbers each."""
    _, tokens, dim = shape
    return (dim, tokens) if side == "k" else (tokens, dim)


def _group(tensor: Tensor, side: Side, group: int) -> Tensor:
    """``[H, D, groups of tokens, group]`` for K, ``[H, T, groups of channels, group]`` for V.

    The last one is filled up with its last number.
    """
    lines = tensor.transpose(1, 2) if side == "k" else tensor
    length = lines.shape[2]
    size = group
    if -length % group > length / 8:
        size = -(-length // -(-length // group))  # of as many groups, the smallest
        size = min(size + size % 2, group)
    missing = -length % size
    filled = torch.cat([lines, lines[..., -1:].expand(-1, -1, missing)], -1) if missing else lines
    return filled.reshape(filled.shape[0], filled.shape[1], -1, size)


def _small(numbers: Tensor) -> Tensor:
    """In half precision, where they fit into it, and rounded up: so the integers reach from the lowest number to the highest."""
    if float(numbers.abs().max()) >= _HALF_MAX:
        return numbers
    nearest, above = numbers.half(), numbers + numbers.abs() * 2**-10 + 2**-24
    return torch.where(nearest.float() >= numbers, nearest, above.half())
