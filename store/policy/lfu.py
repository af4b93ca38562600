"""Least frequently used."""

from __future__ import annotations

from ragkv.store.policy.base import Policy, Usage

_TICKS = float(1 << 40)


class LFU(Policy):
    """The entry with the fewest uses goes first; among equals the one whose last use is longest ago."""

    name = "lfu"
    uses_costs = False

    def priority(self, key: bytes, usage: Usage, clock: float) -> float:
        """See the class."""
        return usage.frequency + usage.tick / _TICKS
