"""Greedy dual size frequency (Cherkasova, HPL-98-69R1)."""

from __future__ import annotations

from ragkv.store.policy.base import Policy, Usage


class GDSF(Policy):
    """``clock + frequency x cost / size`` with the same cost for every entry, which makes hits the aim."""

    name = "gdsf"
    uses_costs = False

    def priority(self, key: bytes, usage: Usage, clock: float) -> float:
        """See the class."""
        return clock + usage.frequency / usage.size_bytes
