# ruff: noqa: D102 - methods without a docstring keep the contract of base.Codec
"""Tensors as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from ragkv.errors import RecordError
from ragkv.store.codecs.base import Codec, Side


class Raw(Codec):
    """Stores the tensor's own bytes; decoding is a view."""

    name = "raw"
    anywhere = True
    exact = True

    def encode(self, tensor: Tensor, side: Side, depth: float = 0.0) -> dict[str, Tensor]:
        return {"": tensor}

    def check(self, parts: dict[str, Tensor], shape: tuple[int, int, int], dtype: torch.dtype, side: Side) -> None:
        tensor = parts[""]
        if tensor.shape != shape or tensor.dtype != dtype:
            raise RecordError(
                f"a raw part must be {dtype} {tuple(shape)}, the record has {tensor.dtype} {tuple(tensor.shape)}"
            )

    def decode(self, parts: dict[str, Tensor], shape: tuple[int, int, int], dtype: torch.dtype, side: Side) -> Tensor:
        self.check(parts, shape, dtype, side)
        return parts[""]
