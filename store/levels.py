"""Which codec each tier keeps chunks in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from ragkv.errors import StoreError
from ragkv.store.buffers import taken
from ragkv.store.codecs import Codec, Raw
from ragkv.store.encode import encode, on_cpu, recoded
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
            one = self.memory is None or self._alike
            kv = item.kv if one else on_cpu(item.kv)
            encoded = partial(encode, kv, space=space, label=item.label, ropes=ropes)
            terms = Terms(namespace, lifetime_s, item.cost_s)
            lowest = encoded(codec=self.below)
            upper = lowest if one or self.memory is None else encoded(codec=self.memory)
            below.append(Offer(item.key, *lowest, terms))
            exact = (self.memory or self.below).exact
            above.append(Offer(item.key, *upper, terms, kv=item.kv if exact else None, ready=self.memory is not None))
        return below, above

    def for_memory(self, record: Record, payload: Payload) -> tuple[Record, Payload]:
        """A chunk of whatever codec as CPU memory keeps it; itself where it is so already."""
        return (record, payload) if self._formed(record) else recoded(record, payload, self.memory or Raw())

    def bytes_in_memory(self, record: Record, payload: Payload) -> int | None:
        """What memory that :meth:`for_memory` gives takes; None where only encoding tells."""
        if self._formed(record):
            return payload.taken_bytes
        return taken(record.plain_bytes) if isinstance(self.memory or Raw(), Raw) else None

    def _formed(self, record: Record) -> bool:
        """Whether CPU memory keeps a record as it is."""
        return record.codec == (self.memory or Raw()).name and (self._alike or record.codec != self.below.name)

    @property
    def _alike(self) -> bool:
        """Whether what is encoded for the lowest tier is so for memory: by the same codec with the same settings."""
        memory = self.memory or Raw()
        return memory.name == self.below.name and vars(memory) == vars(self.below)
