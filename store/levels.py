"""Which codec each tier keeps chunks in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from ragkv.errors import StoreError
from ragkv.store.codecs import Codec, Raw
from ragkv.store.encode import encode, recoded
from ragkv.store.payload import Payload
from ragkv.store.record import Record
from ragkv.store.rope import Rope
from ragkv.store.terms import Item, Terms
from ragkv.store.tier import Offer

_LONGEST_KEY = 494  # LMDB's 511, less what stands in front of it in the books


@dataclass(frozen=True)
class Levels:
    """Codecs by tier: numbers may be kept better where there is less of them to read.

    Attributes:
        below: of the lowest tier.
        memory: of CPU memory; None for what decoding the lowest tier gives.
    """

    below: Codec
    memory: Codec | None = None

    def offers(
        self, items: Sequence[Item], space: str, ropes: tuple[Rope | None, ...], namespace: str, lifetime_s: float
    ) -> tuple[list[Offer], list[Offer]]:
        """Chunks for the lowest tier, and for those above.

        Raises:
            StoreError: one is no KV, or its key none.
        """
        below: list[Offer] = []
        above: list[Offer] = []
        for item in items:
            if not isinstance(item.key, bytes) or not 0 < len(item.key) <= _LONGEST_KEY:
                raise StoreError(f"a key is 1 to {_LONGEST_KEY} bytes, as chunk_key makes them, got {item.key!r:.80}")
            encoded = partial(encode, item.kv, space=space, label=item.label, ropes=ropes)
            terms = Terms(namespace, lifetime_s, item.cost_s)
            lowest = encoded(codec=self.below)
            upper = lowest if self.memory is None or self._alike else encoded(codec=self.memory)
            below.append(Offer(item.key, *lowest, terms))
            above.append(Offer(item.key, *upper, terms, ready=self.memory is not None))
        return below, above

    def for_memory(self, record: Record, payload: Payload) -> tuple[Record, Payload]:
        """A chunk of whatever codec as CPU memory keeps it; itself where it is so already."""
        codec = self.memory or Raw()
        if record.codec == codec.name and (self._alike or record.codec != self.below.name):
            return record, payload
        return recoded(record, payload, codec)

    @property
    def _alike(self) -> bool:
        """Whether what is encoded for the lowest tier is so for memory: by the same codec with the same settings."""
        memory = self.memory or Raw()
        return memory.name == self.below.name and vars(memory) == vars(self.below)
