"""Quality against cost: every arm in one picture, with the Pareto front."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10, sqrt
from typing import Any

from ragkv.evaluation.report.markup import Markup, join, tag
from ragkv.evaluation.report.series import CONTROLS, LINES, Look, value
from ragkv.evaluation.statistics import pareto
from ragkv.evaluation.summary import Metric

_WIDTH, _HEIGHT = 960, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 150, 16, 48


@dataclass(frozen=True)
class Axis:
    """What is drawn to the right.

    Attributes:
        name: of the plot.
        label: below the axis.
        cost: of an arm; ``None`` where it is not known.
        bend: applied to costs before they are drawn.
        ticks: of the largest cost.
        shown: a cost in words.
    """

    name: str
    label: str
    cost: Callable[[dict[str, Any]], float | None]
    bend: Callable[[float], float]
    ticks: Callable[[float], Sequence[float]]
    shown: Callable[[float], str]


def _even(most: float) -> list[float]:
    step = 10 ** floor(log10(most or 1))
    step *= next(factor for factor in (0.1, 0.2, 0.5, 1.0, 2.0) if most / (step * factor) <= 8)
    return [step * number for number in range(ceil(most / step) + 1)]


BUDGET = Axis(
    "budget",
    "charged budget: chunk tokens computed afresh, over all layers (square-root scale)",
    lambda arm: arm["cost"].get("budget"),
    sqrt,
    lambda most: [0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0],
    lambda budget: f"{budget:.0%}",
)
TTFT = Axis(
    "ttft",
    "time to first token, KV in memory (median, ms)",
    lambda arm: arm["cost"].get("ttft_ms"),
    lambda ms: ms,
    _even,
    lambda ms: f"{ms:,.3g}",
)


@dataclass(frozen=True)
class _Point:
    """One arm in the picture: where it is, and what it says of itself."""

    name: str
    cost: float
    score: float
    low: float
    high: float
    look: Look
    words: str


def scatter(summary: dict[str, Any], looks: dict[str, Look], metric: Metric, slice_: str, axis: Axis) -> Markup:
    """One plot as SVG.

    Args:
        summary: of the run.
        looks: of the arms.
        metric: upwards; better is higher in the picture, also where lower values are better.
        slice_: the rows that count.
        axis: to the right.
    """
    known = [arm for arm in summary["arms"] if value(arm, slice_, metric.name) is not None]
    lines = [arm for arm in known if arm["name"] in LINES]
    points = [_point(arm, looks, metric, slice_, axis) for arm in known if arm["name"] not in LINES]
    scores = [point.score for point in points]
    frame = _Frame(metric, axis, scores, max([point.cost for point in points], default=1.0))
    front = _front(points, metric)
    return tag(
        "svg",
        frame.grid(),
        *frame.lines([(arm["name"], value(arm, slice_, metric.name) or 0.0) for arm in lines]),
        frame.path("front", front, stepped=True),
        *[frame.path(f"series {of[0].look.colour}", of) for of in _by_series(points)],
        *[frame.point(point, point in front) for point in points],
        *frame.labels(front),
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=f"{metric.label} against {axis.label}, {slice_}",
        data_plot=axis.name,
        data_slice=slice_,
    )


def _point(arm: dict[str, Any], looks: dict[str, Look], metric: Metric, slice_: str, axis: Axis) -> _Point:
    mean, low, high, n = arm["scores"][slice_][metric.name]
    cost = axis.cost(arm) or 0.0
    words = (
        f"{arm['name']}\n{metric.label} {_score(metric, mean)} [{_score(metric, low)}, {_score(metric, high)}], n = {n}\n"
        f"charged budget {arm['cost']['budget']:.1%}, first token after {arm['cost']['ttft_ms']:.1f} ms"
    )
    return _Point(arm["name"], cost, mean, low, high, looks[arm["name"]], words)


def _score(metric: Metric, score: float) -> str:
    return f"{score:.1%}" if metric.share else f"{score:.3g}"


def _front(points: Sequence[_Point], metric: Metric) -> list[_Point]:
    real = [point for point in points if point.look.family not in CONTROLS]
    sign = 1 if metric.higher_is_better else -1
    return [real[index] for index in pareto([(point.cost, sign * point.score) for point in real])]


def _by_series(points: Sequence[_Point]) -> list[list[_Point]]:
    series: dict[tuple[str, str], list[_Point]] = {}
    for point in points:
        if "=" not in point.name.split(":")[0]:  # random controls at other arms' budgets are no sweep
            series.setdefault((point.look.family, point.look.context), []).append(point)
    return [sorted(of, key=lambda point: point.cost) for of in series.values() if len(of) > 1]


class _Frame:
    """Axes of one plot: where costs and scores are drawn."""

    def __init__(self, metric: Metric, axis: Axis, scores: Sequence[float], most: float):
        self.metric, self.axis = metric, axis
        self.costs = axis.ticks(most)
        self.low, self.high, self.scores = _range(scores, metric)

    def x(self, cost: float) -> float:
        span = self.axis.bend(max(self.costs)) or 1.0
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * self.axis.bend(max(0.0, cost)) / span

    def y(self, score: float) -> float:
        share = (min(max(score, self.low), self.high) - self.low) / (self.high - self.low)
        share = share if self.metric.higher_is_better else 1 - share
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * share

    def grid(self) -> Markup:
        bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
        rows = [
            join(
                tag("line", x1=_LEFT, x2=right, y1=self.y(score), y2=self.y(score), class_="grid"),
                tag("text", _tick(self.metric, score), x=_LEFT - 8, y=self.y(score) + 4, class_="tick end"),
            )
            for score in self.scores
        ]
        columns = [
            join(
                tag("line", x1=self.x(cost), x2=self.x(cost), y1=_TOP, y2=bottom, class_="grid"),
                tag("text", self.axis.shown(cost), x=self.x(cost), y=bottom + 18, class_="tick middle"),
            )
            for cost in self.costs
        ]
        middle = (_LEFT + right) / 2
        return tag("g", *rows, *columns, tag("text", self.axis.label, x=middle, y=_HEIGHT - 8, class_="axis middle"))

    def lines(self, prompts: Sequence[tuple[str, float]]) -> list[Markup]:
        """Prompts of another kind, as lines across; those outside the picture are named at its corner."""
        outside = [prompt for prompt in prompts if not self.low <= prompt[1] <= self.high]
        named = ", ".join(f"{name} {_tick(self.metric, score)}" for name, score in outside)
        drawn = [self._line(*prompt) for prompt in prompts if prompt not in outside]
        corner = tag("text", f"not in the picture: {named}", x=_LEFT + 8, y=_HEIGHT - _BOTTOM - 8, class_="note")
        return [*drawn, corner] if outside else drawn

    def _line(self, name: str, score: float) -> Markup:
        y = self.y(score)
        return tag(
            "g",
            tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="reference"),
            tag("text", f"{name} {_tick(self.metric, score)}", x=_WIDTH - _RIGHT + 6, y=y + 4, class_="note"),
        )

    def path(self, class_: str, points: Sequence[_Point], stepped: bool = False) -> Markup | None:
        if len(points) < 2:
            return None
        steps = [f"M{self.x(points[0].cost):.1f} {self.y(points[0].score):.1f}"]
        for point in points[1:]:
            x, y = self.x(point.cost), self.y(point.score)
            steps.append(f"H{x:.1f}V{y:.1f}" if stepped else f"L{x:.1f} {y:.1f}")
        return tag("path", d="".join(steps), class_=class_)

    def point(self, point: _Point, on_front: bool) -> Markup:
        x, y, filled = self.x(point.cost), self.y(point.score), point.look.context != "alone"
        bar = tag("line", x1=x, x2=x, y1=self.y(point.low), y2=self.y(point.high), class_="interval")
        shape = _mark(point.look.shape, x, y, "dot" if filled else "dot hollow")
        return tag(
            "g", tag("title", point.words), bar, shape, class_=f"arm {point.look.colour}{' best' if on_front else ''}"
        )

    def labels(self, points: Sequence[_Point]) -> list[Markup]:
        """Names of the front's points, each where no other stands."""
        placed: list[tuple[float, float, float]] = []
        found = []
        for point in points:
            width, x = 6.2 * len(point.name), self.x(point.cost)
            left = min(x + 8, _WIDTH - _RIGHT - width)
            heights = [self.y(point.score) + step for step in (-9, 16, -23, 30, -37, 44, 58, 72)]
            y = next((at for at in heights if at > _TOP + 8 and _free(placed, left, width, at)), heights[0])
            placed.append((left, width, y))
            found.append(tag("text", point.name, x=left, y=y, class_="label"))
        return found


def _mark(shape: str, x: float, y: float, class_: str) -> Markup:
    if shape == "circle":
        return tag("circle", cx=x, cy=y, r=5, class_=class_)
    turn = f"rotate(45 {x:.1f} {y:.1f})" if shape == "diamond" else None
    return tag("rect", x=x - 4.5, y=y - 4.5, width=9, height=9, transform=turn, class_=class_)


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


def _tick(metric: Metric, score: float) -> str:
    return f"{score:.0%}" if metric.share else f"{score:.3g}"
