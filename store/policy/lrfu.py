"""Least recently and frequently used (Lee et al., IEEE Transactions on Computers 50(12), 2001), with costs, sizes and a window."""

from __future__ import annotations

from math import log2

from ragkv.store.policy.base import Policy, Usage


class LRFU(Policy):
    """``clock + log2(heat x mean cost / size)``: uses count, the older the less, and what each saves per byte.

    All heats fade at one pace, half in six uses per entry, so that entries keep their order while they are not used. What was just
    used is given time to be used again, as in the window of W-TinyLFU (arXiv:1512.00727): little where what was evicted is seldom
    asked for soon, more where it often is, as in conversations. The figures are ours, chosen by simulation (docs/store.md).
    """

    name = "lrfu"
    half_life = 6.0

    def priority(self, key: bytes, usage: Usage, clock: float) -> float:
        """See the class."""
        return clock + log2(usage.heat * (usage.cost_s or 1.0) / usage.size_bytes)

    def window(self, returns: float) -> float:
        """See the class; in half-lives."""
        return 0.01 + 7 * returns**2
