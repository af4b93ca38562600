# ruff: noqa: D102 - methods without a docstring keep the contract of base.Codec
"""8-bit floating point numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from ragkv.errors import RecordError
from ragkv.store.codecs.base import Codec, Side

_LARGEST = 448.0  # of e4m3


class Fp8(Codec):
    """e4m3 with one scale per channel of K and per token of V: half the bytes of bf16.

    Numbers far smaller than the largest of their line keep more of their precision than with int8.
    """

    name = "fp8"

    def encode(self, tensor: Tensor, side: Side, depth: float = 0.0) -> dict[str, Tensor]:
        """See the base class: ``""`` holds the numbers, ``scale`` one a channel or token.

        Raises:
            StoreError: a number is not finite.
        """
        numbers = tensor.float()
        scale = self.finite(numbers.abs().amax(1 if side == "k" else 2, keepdim=True)) / _LARGEST
        scale = torch.where(scale > 0, scale, torch.ones((), device="cpu"))
        return {"": (numbers / scale).to(torch.float8_e4m3fn), "scale": scale}

    def check(self, parts: dict[str, Tensor], shape: tuple[int, int, int], dtype: torch.dtype, side: Side) -> None:
        numbers, scale = parts[""], parts.get("scale")
        wanted = (shape[0], 1, shape[2]) if side == "k" else (shape[0], shape[1], 1)
        if scale is None or tuple(numbers.shape) != tuple(shape) or tuple(scale.shape) != wanted:
            raise RecordError(f"the parts do not make up {shape} numbers")
        if numbers.dtype != torch.float8_e4m3fn or scale.dtype != torch.float32:
            raise RecordError(f"e4m3 and float32 were stored, the record has {numbers.dtype} and {scale.dtype}")

    def decode(self, parts: dict[str, Tensor], shape: tuple[int, int, int], dtype: torch.dtype, side: Side) -> Tensor:
        self.check(parts, shape, dtype, side)
        return (parts[""].float() * parts["scale"]).to(dtype)
