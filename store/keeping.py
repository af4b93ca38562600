"""What is asked of the tier where chunks are kept, its home: pins, quotas, small facts, what its books say, and how it keeps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence

from ragkv.chunk import ChunkKV
from ragkv.errors import StoreError, checked_namespace
from ragkv.store.codecs import Codec, get_codec
from ragkv.store.keys import checked_keys
from ragkv.store.levels import Levels
from ragkv.store.pages import stored_size
from ragkv.store.policy import Policy
from ragkv.store.rope import RotationLike, ropes_of
from ragkv.store.terms import Item, checked_names
from ragkv.store.tiers import Tiers


class Keeping(ABC):
    """The part of a store that is about its home: the disk, or memory without one."""

    _tiers: Tiers
    _levels: Levels
    _policy: Policy

    @property
    @abstractmethod
    def _open(self) -> Tiers:
        """Its tiers, while it is open."""

    @property
    def budget_bytes(self) -> int:
        """What all chunks may take where they are kept: on disk, or in memory without one."""
        return self._tiers.home.budget_bytes

    @property
    def readonly(self) -> bool:
        """Whether its folder is open for reading only."""
        return self._tiers.home.readonly

    @property
    def codecs(self) -> tuple[Codec, Codec | None]:
        """How KV are encoded where they are kept, and in CPU memory; ``None``: there as decoding the former gives them."""
        return self._levels.below, self._levels.memory

    def stored_bytes(
        self, kv: ChunkKV, *, rotations: Sequence[RotationLike | None] = (), codec: str | Codec | None = None
    ) -> int:
        """Bytes that a chunk's KV would take where they are kept; with ``codec`` on disk, in that one. Stores nothing."""
        levels = self._levels if codec is None else Levels(get_codec(codec))
        offers, _ = levels.offers([Item(bytes(32), kv, 0.0, "")], "", ropes_of(rotations), "", math.inf)
        home = self._tiers.home
        return home.size(home.prepare(offers[0])) if codec is None else stored_size(offers[0])

    @property
    def uses_costs(self) -> bool:
        """Whether the eviction policy looks at what entries cost to compute."""
        return self._policy.uses_costs

    def pinned(self, keys: Iterable[bytes]) -> list[bytes]:
        """Those of the chunks that are stored and pinned now, each once and in order."""
        home = self._open.home
        found = {key: home.known(key) for key in checked_keys(keys)}
        return [key for key, row in found.items() if row is not None and row.pinned(home.now())]

    def beginning(self, beginnings: Collection[bytes]) -> dict[bytes, list[bytes]]:
        """The keys of what is kept, on disk or in memory without one, by what they begin with."""
        return self._open.home.beginning(checked_keys(beginnings))

    def worst(self, keys: Iterable[bytes]) -> bytes | None:
        """That of the stored chunks which the policy holds least valuable where they are kept; ``None`` where none is stored."""
        home = self._open.home
        rows = [(row.priority, key) for key in checked_keys(keys) if (row := home.known(key)) is not None]
        return min(rows, default=(0.0, None))[1]

    def computed_of(self, keys: Collection[bytes]) -> list[bytes]:
        """The keys of what prompts computed of chunks with these keys, and behind them (:mod:`ragkv.store.keys`)."""
        tiers, keys = self._open, checked_keys(keys)
        # Memory may have what home has evicted.
        return list({key: None for tier in (tiers.home, *tiers.above) for key in tier.computed_of(keys)})

    def pin(self, key: bytes, lifetime_s: float = math.inf) -> bool:
        """Keeps a chunk from being evicted, from disk or from memory without one, for some seconds; whether it is stored."""
        return self.pin_many([key], lifetime_s) == 1

    def pin_many(self, keys: Iterable[bytes], lifetime_s: float = math.inf) -> int:
        """Pins chunks, on disk in one transaction; how many are stored."""
        home = self._open.home
        if not isinstance(lifetime_s, int | float) or not lifetime_s > 0:
            raise StoreError(f"a pin lasts more than 0 seconds, got {lifetime_s}")
        return home.pin(checked_keys(keys), lifetime_s)

    def unpin(self, key: bytes) -> bool:
        """Ends a pin; whether the chunk is stored."""
        return self.unpin_many([key]) == 1

    def unpin_many(self, keys: Iterable[bytes]) -> int:
        """Ends pins, on disk in one transaction; how many of the chunks are stored."""
        return self._open.home.pin(checked_keys(keys), 0.0)

    def set_quota(self, namespace: str, quota_bytes: int | None) -> None:
        """Bounds what a namespace's chunks may take on disk (in memory without one); None for no bound. Durable.

        Beyond it, a put evicts entries of its own namespace. It takes effect with the next put.
        """
        home = self._open.home
        known = quota_bytes is None or (isinstance(quota_bytes, int | float) and 0 <= quota_bytes < math.inf)
        if not isinstance(namespace, str) or not namespace or not known:
            raise StoreError(f"a quota needs a namespace and at least 0 bytes, got {namespace!r} and {quota_bytes}")
        home.set_quota(checked_namespace(namespace), None if quota_bytes is None else int(quota_bytes))

    def meta_get(self, name: str) -> bytes | None:
        """A small fact that :meth:`meta_put` stored, or None."""
        return self._open.home.fact(*checked_names([name]))

    def meta_put(self, name: str, value: bytes) -> None:
        """Keeps a small fact beside the entries, durably where there is a path. It is never evicted."""
        self._open.put_many([], [], {name: value})

    def __len__(self) -> int:
        return self._open.home.counts()[0]
