"""What a prefill costs: a grid of measured times, and what lies between (RAGCache, arXiv:2404.12457, section 5.1)."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ragkv.errors import RecordError, StoreError


@dataclass(frozen=True)
class CostProfile:
    """Seconds that a prefill takes, by the tokens that are cached before it and those that are new.

    Attributes:
        cached: token counts, rising.
        new: token counts, rising.
        seconds: ``seconds[i][j]`` for ``cached[i]`` and ``new[j]`` tokens.
    """

    cached: tuple[int, ...]
    new: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        for name, counts in (("cached", self.cached), ("new", self.new)):
            if not counts or any(a >= b for a, b in pairwise(counts)) or counts[0] < 0:
                raise StoreError(f"{name} must be rising token counts, got {counts}")
        if len(self.seconds) != len(self.cached) or any(len(row) != len(self.new) for row in self.seconds):
            raise StoreError(f"seconds must be {len(self.cached)} rows of {len(self.new)}")

    def __call__(self, cached: int, new: int) -> float:
        """Seconds for ``new`` tokens behind ``cached`` ones: bilinear inside the grid, and on along its last cells.

        Never negative.
        """
        row, across = _cell(self.cached, cached)
        column, down = _cell(self.new, new)
        total = 0.0
        for i, weight in ((row, 1 - across), (row + 1, across)):
            for j, share in ((column, 1 - down), (column + 1, down)):
                if weight * share:
                    total += weight * share * self.seconds[i][j]
        return max(total, 0.0)

    def to_bytes(self) -> bytes:
        """The profile as JSON, for :meth:`TieredStore.meta_put`."""
        return json.dumps({"cached": self.cached, "new": self.new, "seconds": self.seconds}).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> CostProfile:
        """Reads :meth:`to_bytes`.

        Raises:
            RecordError: it is none.
        """
        try:
            facts = json.loads(data)
            rows = tuple(tuple(float(value) for value in row) for row in facts["seconds"])
            return cls(tuple(map(int, facts["cached"])), tuple(map(int, facts["new"])), rows)
        except (ValueError, KeyError, TypeError, StoreError) as error:
            raise RecordError(f"a cost profile cannot be read: {error}") from error


def _cell(counts: Sequence[int], count: int) -> tuple[int, float]:
    """The cell that a count lies in, or is nearest to, and how far into it; beyond 1 and below 0 outside."""
    if len(counts) == 1:
        return 0, 0.0
    at = min(max(bisect_right(counts, count) - 1, 0), len(counts) - 2)
    return at, (count - counts[at]) / (counts[at + 1] - counts[at])
