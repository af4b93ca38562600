"""Where a batch copies layers to: a prompt's K and V."""

from __future__ import annotations

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

    def fill(self, start: int, keys: Tensor, values: Tensor) -> None:
        """Copies a chunk's layer to the tokens from ``start`` on."""
        stop = start + keys.shape[1]
        self._check(self._keys, keys.shape[0], stop, keys.shape[2], keys.dtype)
        self._check(self._values, values.shape[0], stop, values.shape[2], values.dtype)
        self._keys[:, start:stop].copy_(keys)
        self._values[:, start:stop].copy_(values)

    def memory(self, start: int, keys: Part, values: Part) -> tuple[tuple[int, Any], tuple[int, Any]]:
        """For both parts their place in the payload, and the memory for them as uint8 ``[H, T, bytes of a token]``."""
        heads, tokens, dim = keys.shape
        self._check(self._keys, heads, start + tokens, dim, keys.dtype)
        heads, tokens, dim = values.shape
        self._check(self._values, heads, start + tokens, dim, values.dtype)
        if self._bytes is None:
            raise StoreError("the target's tokens do not lie one after the other in CPU memory")
        mine, own = self._bytes
        return (keys.start, mine[:, start : start + tokens]), (values.start, own[:, start : start + tokens])

    def _check(self, target: Tensor, heads: int, stop: int, dim: int, dtype: torch.dtype) -> None:
        shape = target.shape
        if shape[0] != heads or shape[1] < stop or shape[2] != dim or target.dtype != dtype:
            raise StoreError(
                f"the chunk needs {dtype} [{heads}, at least {stop}, {dim}], the target is {target.dtype} {tuple(shape)}"
            )


def _plain(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.stride()[1:] == (tensor.shape[2], 1)
