"""One prompt's tokens: how far their KV are off, what the question looks at, what methods recompute. N tokens of the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ragkv.evaluation.report.markup import Markup, join, tag

LEVELS = 8
"""Depths of colour, 0 is none."""

_WIDTH, _NAMES, _ROW = 960, 270, 20


def strips(tokens: dict[str, Any]) -> Markup:
    """All tokens of the prompt from left to right, a strip for each thing that is known of them."""
    count = len(tokens["tokens"])
    scale = (_WIDTH - _NAMES) / count
    heat = [(name, _runs(levels)) for name, levels in _heats(tokens).items()]
    marked = [(arm, [(row, row + 1, LEVELS - 1) for row in rows]) for arm, rows in tokens["recomputed"].items()]
    drawn = [
        _strip(name, runs, _ROW * number + 20, scale, kind)
        for number, (name, runs, kind) in enumerate(
            [(name, runs, "heat") for name, runs in heat] + [(name, runs, "mark") for name, runs in marked]
        )
    ]
    height = 20 + _ROW * len(drawn)
    edges = [
        join(
            tag("line", x1=_NAMES + scale * start, x2=_NAMES + scale * start, y1=14, y2=height, class_="edge"),
            tag("text", "answer", x=_NAMES + scale * start + 2, y=12, class_="note")
            if number in tokens["gold"]
            else None,
        )
        for number, (start, _) in enumerate(tokens["chunks"])
    ]
    return tag(
        "svg",
        *drawn,
        *edges,
        viewBox=f"0 0 {_WIDTH} {height + 6}",
        role="img",
        aria_label="tokens of one prompt: deviation, attention, recomputed",
        data_plot="tokens",
    )


def text(tokens: dict[str, Any]) -> Markup:
    """The prompt as it reads: every token in the colours of all its levels, the style sheet shows one at a time."""
    levels = _heats(tokens)
    classes = [f"h{index}" for index in range(len(levels))]
    marked = {row for rows in list(tokens["recomputed"].values())[:1] for row in rows}
    spans = []
    columns = list(zip(*levels.values(), strict=True))
    figures = _figures(tokens)
    for position, token in enumerate(tokens["tokens"]):
        names = [f"{class_}-{level}" for class_, level in zip(classes, columns[position], strict=True) if level]
        names += ["fresh"] if position in marked else []
        spans.append(tag("span", token, class_=" ".join(names) or None, title=figures[position]))
    return tag("div", *spans, class_="tokens")


def kinds(tokens: dict[str, Any]) -> list[str]:
    """What a token's colour can show, in the order of the classes ``h0``, ``h1``, ..."""
    return list(_heats(tokens))


def _heats(tokens: dict[str, Any]) -> dict[str, list[int]]:
    heats = {f"deviation, read {_read(context)}": values for context, values in tokens["deviation"].items()}
    most = _cap([value for values in heats.values() for value in values])
    found = {name: _levels(values, most) for name, values in heats.items()}
    if tokens["attention"] is not None:
        inside = tokens["attention"][tokens["chunks"][0][0] : tokens["chunks"][-1][1]]
        found["question's attention"] = _levels(tokens["attention"], _cap(inside))
    return found


def _read(context: str) -> str:
    return "alone" if context == "alone" else "in its document"


def _cap(values: Sequence[float]) -> float:
    """The value of the deepest colour: one token in fifty is as deep or deeper."""
    ordered = sorted(values)
    return ordered[int(0.98 * (len(ordered) - 1))] or 1.0


def _levels(values: Sequence[float], most: float) -> list[int]:
    return [min(LEVELS - 1, int(LEVELS * value / most)) for value in values]


def _runs(levels: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Neighbours of one level, as (start, end, level)."""
    start = 0
    for position in range(1, len(levels) + 1):
        if position == len(levels) or levels[position] != levels[start]:
            yield start, position, levels[start]
            start = position


def _strip(name: str, runs, top: float, scale: float, kind: str) -> Markup:
    rects = [
        tag(
            "rect",
            x=_NAMES + scale * start,
            y=top,
            width=scale * (end - start) + 0.15,
            height=_ROW - 4,
            class_=f"{kind}-{level}",
        )
        for start, end, level in runs
        if level
    ]
    ground = tag("rect", x=_NAMES, y=top, width=_WIDTH - _NAMES, height=_ROW - 4, class_="ground")
    return tag("g", tag("text", name, x=_NAMES - 8, y=top + 12, class_="note end"), ground, *rects)


def _figures(tokens: dict[str, Any]) -> list[str]:
    parts = [
        [f"deviation {_read(context)} {value:.2f}" for value in values]
        for context, values in tokens["deviation"].items()
    ]
    if tokens["attention"] is not None:
        parts.append([f"attention {value:.2%}" for value in tokens["attention"]])
    return [f"token {position}: {', '.join(held)}" for position, held in enumerate(zip(*parts, strict=True))]
