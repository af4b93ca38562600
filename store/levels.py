"""Which codec each tier keeps chunks in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ragkv.store.codecs import Codec, Raw
from ragkv.store.encode import encode
from ragkv.store.layout import Payload
from ragkv.store.record import Record
from ragkv.store.rope import Rope
from ragkv.store.terms import Item, Terms
from ragkv.store.tier import Offer

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

    def offers(
        self, items: Sequence[Item], space: str, ropes: tuple[Rope | None, ...], namespace: str, lifetime_s: float
    ) -> tuple[list[Offer], list[Offer]]:
        """Chunks for the lowest tier, and for those above, see :meth:`encode`."""
        below: list[Offer] = []
        above: list[Offer] = []
        for item in items:
            terms = Terms(namespace, lifetime_s, item.cost_s)
            for offers, encoded in zip((below, above), self.encode(item, space, ropes), strict=True):
                offers.append(Offer(item.key, *encoded, terms))
        return below, above

    def for_memory(self, record: Record, payload: Payload) -> Encoded:
        """A chunk of whatever codec as CPU memory keeps it; itself where it is so already."""
        codec = self.memory or Raw()
        if record.codec == codec.name:
            return record, payload
        kv = record.decode(payload)
        return encode(kv, codec=codec, space=record.space, label=record.label, ropes=record.ropes)
