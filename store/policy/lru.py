"""Least recently used."""

from __future__ import annotations

from ragkv.store.policy.base import Policy, Usage


class LRU(Policy):
    """The entry whose last use is longest ago goes first."""

    name = "lru"
    uses_costs = False

    def priority(self, key: bytes, usage: Usage, clock: float) -> float:
        """See the class."""
        return float(usage.tick)
