"""8 bits a number."""

from __future__ import annotations

from ragkv.store.codecs.grouped import Grouped


class Int8(Grouped):
    """See :class:`Grouped`: half the bytes of bf16, and a few more for the groups."""

    name = "int8"
    bits = 8
