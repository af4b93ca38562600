"""Which codec each tier keeps chunks in."""

from __future__ import annotations

from dataclasses import dataclass

from ragkv.store.codecs import Codec, Raw
from ragkv.store.encode import encode
from ragkv.store.layout import Payload
from ragkv.store.record import Record
from ragkv.store.rope import Rope
from ragkv.store.terms import Item

Encoded = tuple[Record, Payload]


@dataclass(frozen=True)
class Levels:
    """Codecs by tier: numbers may be kept better where there is less of them to read.

    Attributes:
        below: of the lowest tier.
        memory: of CPU memory; None for what decoding the lowest tier gives.
    """

    below: Codec
    memory: Codec | None = None

    def encode(self, item: Item, space: str, ropes: tuple[Rope | None, ...]) -> tuple[Encoded, Encoded]:
        """A chunk for the lowest tier, and for those above."""

        def encoded(codec: Codec) -> Encoded:
            return encode(item.kv, codec=codec, space=space, label=item.label, ropes=ropes)

        below = encoded(self.below)
        return below, below if self.memory is None or self.memory.name == self.below.name else encoded(self.memory)

    def for_memory(self, record: Record, payload: Payload) -> Encoded:
        """A chunk of whatever codec as CPU memory keeps it; itself where it is so already."""
        codec = self.memory or Raw()
        if record.codec == codec.name:
            return record, payload
        kv = record.decode(payload)
        return encode(kv, codec=codec, space=record.space, label=record.label, ropes=record.ropes)
