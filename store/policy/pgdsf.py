"""Prefix-aware greedy dual size frequency, the policy of RAGCache (arXiv:2404.12457, section 5.1)."""

from __future__ import annotations

from ragkv.store.policy.base import Policy, Usage


class PGDSF(Policy):
    """``clock + frequency x mean cost / size``, with the cost averaged over the times the entry was computed.

    What took long to compute per byte and is asked for often stays. Entries whose cost was never measured are
    given one second, so that they compare by frequency and size.
    """

    name = "pgdsf"

    def priority(self, key: bytes, usage: Usage, clock: float) -> float:
        """See the class."""
        return clock + usage.frequency * (usage.cost_s or 1.0) / usage.size_bytes
