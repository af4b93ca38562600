"""Belady's optimum (IBM Systems Journal 5(2), 1966): the bound that no policy passes, for comparison."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from ragkv.store.policy.base import Policy, Usage


class Belady(Policy):
    """The entry whose next use is furthest away goes first. It must be told the future.

    Optimal in hits for entries of one size; for mixed sizes a strong reference, not a bound.

    Args:
        stream: the keys of all requests to come, in order.

    Attributes:
        position: index into ``stream`` of the request that is being served; whoever serves sets it.
    """

    name = "belady"
    uses_costs = False

    def __init__(self, stream: Sequence[bytes]) -> None:
        self.position = 0
        self._end = len(stream)
        self._uses: dict[bytes, list[int]] = {}
        for index, key in enumerate(stream):
            self._uses.setdefault(key, []).append(index)

    def priority(self, key: bytes, usage: Usage, clock: float) -> float:
        """See the class: the end of the stream less the next use."""
        uses = self._uses.get(key, [])
        at = bisect_right(uses, self.position)
        return float(self._end - uses[at]) if at < len(uses) else 0.0
