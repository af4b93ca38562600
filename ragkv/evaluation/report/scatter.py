"""Quality against cost: where every arm stands in one picture, with the Pareto front."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10, sqrt
from types import SimpleNamespace
from typing import Any

from ragkv.evaluation.report.series import CONTROLS, LINES, Look, by_series, comparable
from ragkv.evaluation.statistics import pareto
from ragkv.evaluation.summary import Metric

#: A plot in pixels: the whole picture, and the edges of the field within.
FRAME = SimpleNamespace(width=960, height=440, left=56, right=810, top=16, bottom=392)


@dataclass(frozen=True)
class Axis:
    """What is drawn to the right.

    Attributes:
        name: of the plot.
        title: above it.
        label: below the axis.
        cost: of an arm, by its name in the summary.
        bend: applied to costs before they are drawn.
        ticks: of the largest cost.
        form: a cost in words.
    """

    name: str
    title: str
    label: str
    cost: str
    bend: Callable[[float], float]
    ticks: Callable[[float], Sequence[float]]
    form: str


def _even(most: float) -> list[float]:
    step = 10 ** floor(log10(most or 1))
    step *= next(factor for factor in (0.1, 0.2, 0.5, 1.0, 2.0) if most / (step * factor) <= 8)
    return [step * number for number in range(ceil(most / step) + 1)]


BUDGET = Axis(
    "budget",
    "Quality against charged budget",
    "charged budget: chunk tokens computed afresh, over all layers (square-root scale)",
    "budget",
    sqrt,
    lambda most: [0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0],
    "{:.0%}",
)
TTFT = Axis(
    "ttft",
    "Quality against time to first token",
    "time to first token, KV in memory (median, ms)",
    "ttft_ms",
    float,
    _even,
    "{:,.3g}",
)


@dataclass(frozen=True)
class Point:
    """One arm in the picture: what it is, its cost and score, where they are, and the ends of its interval."""

    arm: dict[str, Any]
    look: Look
    cost: float
    score: float
    x: float
    y: float
    low: float
    high: float


def plot(
    arms: Sequence[dict[str, Any]], looks: dict[str, Look], metric: Metric, slice_: str, axis: Axis
) -> dict[str, Any]:
    """One plot, as places in pixels and texts.

    Args:
        arms: of the run's summary.
        looks: of the arms.
        metric: upwards; better is higher in the picture, also where lower values are better.
        slice_: the rows that count.
        axis: to the right.
    """
    scores = {arm["name"]: arm["scores"][slice_][metric.name] for arm in arms if metric.name in arm["scores"][slice_]}
    drawn = [arm for arm in arms if arm["name"] in scores and arm["name"] not in LINES]
    low, high, rows = _range([scores[arm["name"]][0] for arm in drawn], metric)
    columns = axis.ticks(max((arm["cost"][axis.cost] for arm in drawn), default=1.0))

    def x(cost: float) -> float:
        return FRAME.left + (FRAME.right - FRAME.left) * axis.bend(max(0.0, cost)) / (axis.bend(max(columns)) or 1.0)

    def y(score: float) -> float:
        share = (min(max(score, low), high) - low) / (high - low)
        return FRAME.bottom - (FRAME.bottom - FRAME.top) * (share if metric.higher_is_better else 1 - share)

    def point(arm: dict[str, Any]) -> Point:
        cost, (mean, least, most, _) = arm["cost"][axis.cost], scores[arm["name"]]
        return Point(arm, looks[arm["name"]], cost, mean, x(cost), y(mean), y(least), y(most))

    points = {arm["name"]: point(arm) for arm in drawn}
    real = [
        points[arm["name"]] for arm in comparable(drawn, metric, slice_) if looks[arm["name"]].family not in CONTROLS
    ]
    front = [real[index] for index in pareto([(point.cost, metric.merit(point.score)) for point in real])]
    sweeps = [[points[arm["name"]] for arm in series] for series in by_series(drawn, looks).values()]
    lines = [(name, held[0]) for name, held in scores.items() if name in LINES]
    return {
        "slice": slice_,
        "rows": [(y(score), metric.shown(score)) for score in rows],
        "columns": [(x(cost), axis.form.format(cost)) for cost in columns],
        "lines": [(y(score), f"{name} {metric.shown(score)}") for name, score in lines if low <= score <= high],
        "outside": ", ".join(f"{name} {metric.shown(score)}" for name, score in lines if not low <= score <= high),
        "front": front,
        "series": [sorted(sweep, key=lambda point: point.cost) for sweep in sweeps],
        "points": list(points.values()),
        "labels": _labels(front, points.values()),
    }


def _labels(front: Sequence[Point], points: Iterable[Point]) -> list[tuple[float, float, str]]:
    """Names of the front's points, each where no other name and no point stands."""
    names: list[tuple[float, float, str]] = []
    placed = [(point.x - 6, 12.0, point.y + 4) for point in points]
    for point in front:
        width = 6.2 * len(point.arm["name"])
        left = min(point.x + 8, FRAME.right - width)
        heights = [point.y + step for step in (-9, 16, -23, 30, -37, 44, 58, 72)]
        y = next((at for at in heights if at > FRAME.top + 8 and _free(placed, left, width, at)), heights[0])
        placed.append((left, width, y))
        names.append((left, y, point.arm["name"]))
    return names


def _free(placed: Sequence[tuple[float, float, float]], left: float, width: float, y: float) -> bool:
    return all(abs(y - other) > 13 or left > at + wide or at > left + width for at, wide, other in placed)


def _range(scores: Sequence[float], metric: Metric) -> tuple[float, float, list[float]]:
    """Least and largest score drawn, and the ticks between."""
    least, most = min(scores, default=0.0), max(scores, default=1.0)
    if metric.share:
        low = 0.0 if least < 0.4 else floor(least * 10 - 0.3) / 10
        step = 0.2 if low < 0.4 else 0.1
        return low, 1.0, [low + step * number for number in range(round((1 - low) / step) + 1)]
    ticks = _even(most)
    return 0.0, max(ticks) or 1.0, ticks
