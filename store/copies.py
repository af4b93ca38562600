"""Copies in memory of what is stored below: offered, forgotten, and dropped once another process has removed what they are of."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from ragkv.errors import StoreFullError
from ragkv.store.disk import DiskTier
from ragkv.store.memory import MemoryTier
from ragkv.store.terms import Terms
from ragkv.store.tier import Offer, Tier

logger: logging.Logger = logging.getLogger("ragkv.store")


class Copies:
    """What the tiers above home hold. None of it is needed."""

    def __init__(self, above: Sequence[MemoryTier], home: MemoryTier | DiskTier, lock: threading.RLock) -> None:
        self._above, self._home, self._lock = above, home, lock
        self._known_removals = home.removed()[0]

    def offer(self, offer: Offer, origin: Tier, above: Sequence[Tier]) -> None:
        """Offers what a tier has to some above it. Whatever fails, a warning is enough."""
        for tier in above:
            try:
                self._offer(offer, origin, tier)
            except StoreFullError as error:
                logger.debug("%s is not kept in %s: %s", offer.key.hex(), tier.name, str(error))
            except Exception as error:
                logger.warning("%s is not kept in %s: %s", offer.key.hex(), tier.name, repr(error))

    def _offer(self, offer: Offer, origin: Tier, tier: Tier) -> None:
        with self._lock:
            there = self._there(offer, origin)
            if there is None or not tier.wants(there):
                return
        # What takes long is done of what is wanted alone, and not under the lock.
        prepared = tier.prepare(there)
        with self._lock:
            # Asked again: what is removed from below after this is removed from above after this.
            there = self._there(offer, origin)
            if there is not None:
                tier.admit([prepared._replace(terms=there.terms, usage=there.usage, put_s=there.put_s)])

    def _there(self, offer: Offer, origin: Tier) -> Offer | None:
        """The offer with what is known of it; None where it is gone, or something else was put in its place."""
        row, put_s = origin.known(offer.key), self._put_s(offer.key)
        if row is None or (put_s and offer.put_s and put_s != offer.put_s):
            return None
        return offer._replace(terms=Terms(lifetime_s=row.terms(origin.now()).lifetime_s), usage=row.usage, put_s=put_s)

    def forget(self, keys: Sequence[bytes]) -> None:
        """Something else stands under these keys below, or nothing."""
        with self._lock:
            for tier in self._above:
                tier.remove(keys)

    def catch_up(self) -> None:
        """Drops what another process has removed or replaced, and what was computed of it; what home has as it is here stays."""
        if not any(tier.counts()[0] for tier in self._above):
            return
        removals, gone = self._home.removed(self._known_removals)
        if gone or gone is None:
            with self._lock:
                for tier in self._above:
                    held = tier.find(tier.stored() if gone is None else [*gone, *tier.computed_of(gone)])
                    tier.remove([key for key, copy in held.items() if not copy.put_s or copy.put_s != self._put_s(key)])
        self._known_removals = removals

    def _put_s(self, key: bytes) -> float | None:
        """When what home has under a key was put; None where there is nothing."""
        row = self._home.known(key)
        return None if row is None else row.created_s
