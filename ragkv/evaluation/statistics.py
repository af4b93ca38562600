"""Means with paired bootstrap intervals, medians, and the Pareto front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000


class Estimate(NamedTuple):
    """A mean with its 95 % interval; ``n`` cases went into it."""

    mean: float
    low: float
    high: float
    n: int


class Resampling:
    """Draws of cases with replacement, the same for every arm, so that differences are paired.

    Rows of one case (its orders of chunks) are drawn together: they are no independent cases.

    Args:
        cases: ids of all cases.
        seed: of the draws.
    """

    def __init__(self, cases: Sequence[str], seed: int):
        self._index = {case: number for number, case in enumerate(cases)}
        even = np.full(len(cases), 1 / max(1, len(cases)))
        self._weights = np.random.default_rng(seed).multinomial(len(cases), even, size=RESAMPLES)  # [R, cases]

    def estimate(self, values: Mapping[str, Sequence[float]]) -> Estimate | None:
        """The mean over all rows, and its interval; ``None`` where there are none.

        Args:
            values: the rows of each case.
        """
        sums, counts = np.zeros(len(self._index)), np.zeros(len(self._index))
        for case, rows in values.items():
            sums[self._index[case]], counts[self._index[case]] = sum(rows), len(rows)
        if not counts.any():
            return None
        drawn = self._weights @ counts
        means = (self._weights @ sums)[drawn > 0] / drawn[drawn > 0]
        low, high = np.quantile(means, [0.025, 0.975])
        return Estimate(float(sums.sum() / counts.sum()), float(low), float(high), int(np.count_nonzero(counts)))


def difference(arm: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Row by row, what an arm has more than another; cases that both have."""
    return {
        case: [a - b for a, b in zip(rows, other[case], strict=True)]
        for case, rows in arm.items()
        if len(other.get(case, ())) == len(rows)
    }


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, quality) that no other point beats in one without losing in the other, by rising cost."""
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front
