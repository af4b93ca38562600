"""4 bits a number."""

from __future__ import annotations

from torch import Tensor

from ragkv.errors import ArgumentError
from ragkv.store.codecs.grouped import Grouped


class Int4(Grouped):
    """See :class:`Grouped`: a quarter of the bytes of bf16, and a few more for the groups. Groups are even."""

    name = "int4"
    bits = 4

    def __init__(self, group: int = 32) -> None:
        super().__init__(group)
        if group % 2:
            raise ArgumentError(f"group must be even, got {group}")

    def pack(self, integers: Tensor) -> Tensor:
        """Two numbers a byte."""
        return integers[..., ::2] | integers[..., 1::2] << 4

    def unpack(self, packed: Tensor) -> Tensor:
        """The integers of :meth:`pack`, as a line."""
        heads, lines, count = packed.shape
        integers = packed.new_empty(heads, lines, count, 2)
        integers[..., 0] = packed & 15
        integers[..., 1] = packed >> 4
        return integers.flatten(2)
