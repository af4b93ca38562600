"""Where a batch copies layers to: a prompt's K and V."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ragkv.errors import StoreError
from ragkv.store.payload import Kind


class Target:
    """One layer's K and V of a whole prompt, ``[H, N, D]`` each; heads may lie apart from each other.

    Attributes:
        rows: K's and V's memory as uint8 ``[H, N x bytes of a token]``; None where the tokens of a head do not lie one
            after the other in CPU memory.
        kinds: shape and dtype of K and V.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values = keys, values
        self.rows: tuple[Any, Any] | None = (_rows(keys), _rows(values)) if _plain(keys) and _plain(values) else None
        self.kinds: tuple[Kind, Kind] = (_kind(keys), _kind(values))

    def fill(self, start: int, keys: Tensor, values: Tensor) -> None:
        """Copies a chunk's layer to the tokens from ``start`` on."""
        self.check((_kind(keys), _kind(values)), start)
        stop = start + keys.shape[1]
        self._keys[:, start:stop].copy_(keys, non_blocking=self._keys.is_cuda)
        self._values[:, start:stop].copy_(values, non_blocking=self._values.is_cuda)

    def check(self, kinds: tuple[Kind, Kind], start: int) -> None:
        """Raises StoreError where K and V ``[H, T, D]`` of these kinds do not fit in from token ``start`` on."""
        for ((heads, tokens, dim), own), (shape, dtype) in zip(self.kinds, kinds, strict=True):
            if heads != shape[0] or tokens < start + shape[1] or dim != shape[2] or own != dtype or start < 0:
                raise StoreError(
                    f"the chunk needs {dtype} [{shape[0]}, at least {start + shape[1]}, {shape[2]}], the target is {own} "
                    f"{[heads, tokens, dim]}"
                )


def _kind(tensor: Tensor) -> Kind:
    return tuple(tensor.shape), tensor.dtype


def _plain(tensor: Tensor) -> bool:
    return tensor.is_cpu and tensor.stride()[1:] == (tensor.shape[2], 1)


def _rows(tensor: Tensor) -> Any:
    return tensor.view(torch.uint8).numpy().reshape(len(tensor), -1)
