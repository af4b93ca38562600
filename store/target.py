"""Where a batch copies layers to: a prompt's K and V."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ragkv.errors import StoreError
from ragkv.store.layout import Part


class Target:
    """One layer's K and V of a whole prompt, ``[H, N, D]`` each; heads may lie apart from each other.

    Attributes:
        plain: whether the tokens of each head lie one after the other in CPU memory.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values = keys, values
        self.plain = _plain(keys) and _plain(values)
        self._bytes = (keys.view(torch.uint8).numpy(), values.view(torch.uint8).numpy()) if self.plain else None
        self._kinds = [(*tensor.shape, tensor.dtype) for tensor in (keys, values)]

    def fill(self, start: int, keys: Tensor, values: Tensor) -> None:
        """Copies a chunk's layer to the tokens from ``start`` on."""
        stop = start + keys.shape[1]
        _check(self._kinds[0], keys.shape, keys.dtype, start)
        _check(self._kinds[1], values.shape, values.dtype, start)
        self._keys[:, start:stop].copy_(keys)
        self._values[:, start:stop].copy_(values)

    def memory(self, start: int, keys: Part, values: Part) -> list[tuple[int, Any]]:
        """For both parts their place in the payload, and the memory for them as uint8 ``[H, T, bytes of a token]``."""
        _check(self._kinds[0], keys.shape, keys.dtype, start)
        _check(self._kinds[1], values.shape, values.dtype, start)
        if self._bytes is None:
            raise StoreError("the target's tokens do not lie one after the other in CPU memory")
        tokens = slice(start, start + keys.shape[1])
        return [(keys.start, self._bytes[0][:, tokens]), (values.start, self._bytes[1][:, tokens])]


def _check(kind: tuple[Any, ...], shape: Sequence[int], dtype: torch.dtype, start: int) -> None:
    """Raises StoreError where a chunk's tensor does not fit into a prompt's, of this shape and dtype, at ``start``."""
    heads, tokens, dim, own = kind
    if heads != shape[0] or tokens < start + shape[1] or dim != shape[2] or own != dtype or start < 0:
        raise StoreError(
            f"the chunk needs {dtype} [{shape[0]}, at least {start + shape[1]}, {shape[2]}], the target is {own} "
            f"{[heads, tokens, dim]}"
        )


def _plain(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.stride()[1:] == (tensor.shape[2], 1)
