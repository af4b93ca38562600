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

    What is not independent is drawn together: rows of one case (its orders of chunks), and cases about one document. Where all are
    about one, cases are drawn: the interval then says nothing of other documents.

    Args:
        cases: ids of all cases.
        seed: of the draws.
        documents: by case, what names the document that it is about; a case that is not there has one of its own.
    """

    def __init__(self, cases: Sequence[str], seed: int, documents: Mapping[str, str] | None = None):
        about = [(documents or {}).get(case, case) for case in cases]
        numbers = {document: number for number, document in enumerate(dict.fromkeys(about))}
        self._index = {case: numbers[document] for case, document in zip(cases, about, strict=True)}
        self._size = len(numbers)
        even = np.full(self._size, 1 / max(1, self._size))
        self._weights = np.random.default_rng(seed).multinomial(self._size, even, size=RESAMPLES)  # [R, documents]
        self._of_cases = Resampling(cases, seed) if documents else None

    def estimate(self, values: Mapping[str, Sequence[float]]) -> Estimate | None:
        """The mean over all rows, and its interval; ``None`` where there are none.

        Args:
            values: the rows of each case.
        """
        sums, counts = np.zeros(self._size), np.zeros(self._size)
        for case, rows in values.items():
            sums[self._index[case]] += sum(rows)
            counts[self._index[case]] += len(rows)
        if not counts.any():
            return None
        if self._of_cases is not None and np.count_nonzero(counts) == 1:
            return self._of_cases.estimate(values)
        drawn = self._weights @ counts
        means = (self._weights @ sums)[drawn > 0] / drawn[drawn > 0]
        low, high = np.quantile(means, [0.025, 0.975])
        return Estimate(float(sums.sum() / counts.sum()), float(low), float(high), sum(map(bool, values.values())))


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
