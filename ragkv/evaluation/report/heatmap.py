"""One prompt's tokens: how far their KV are off, what the question looks at, what methods recompute. N tokens of the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

LEVELS = 8
"""Depths of colour, 0 is none."""

#: Neighbours of one level: first token, how many, level.
Run = tuple[int, int, int]


def heats(tokens: dict[str, Any]) -> dict[str, list[int]]:
    """What a token's colour can show, and the level ``[N]`` of every token, in the order of the classes ``h0``, ``h1``, ..."""
    values = {f"deviation, read {_read(context)}": held for context, held in tokens["deviation"].items()}
    most = _cap([value for held in values.values() for value in held])
    found = {name: _levels(held, most) for name, held in values.items()}
    if tokens["attention"] is not None:
        inside = tokens["attention"][tokens["chunks"][0][0] : tokens["chunks"][-1][1]]
        found["question's attention"] = _levels(tokens["attention"], _cap(inside))
    return found


def strips(tokens: dict[str, Any]) -> list[tuple[str, str, list[Run]]]:
    """A strip for each thing that is known of the tokens: its name, its kind (``"heat"`` or ``"mark"``), its runs."""
    heat = [(name, "heat", list(_runs(levels))) for name, levels in heats(tokens).items()]
    mark = [(arm, "mark", [(row, 1, LEVELS - 1) for row in rows]) for arm, rows in tokens["recomputed"].items()]
    return heat + mark


def text(tokens: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The prompt as it reads: every token, the classes of all its levels, and its figures in words."""
    marked = set(next(iter(tokens["recomputed"].values()), ()))
    levels = list(zip(*heats(tokens).values(), strict=True))
    for position, token in enumerate(tokens["tokens"]):
        classes = [f"h{index}-{level}" for index, level in enumerate(levels[position]) if level]
        words = [f"deviation {_read(name)} {held[position]:.2f}" for name, held in tokens["deviation"].items()]
        if tokens["attention"] is not None:
            words.append(f"attention {tokens['attention'][position]:.2%}")
        yield token, " ".join(classes + ["fresh"] * (position in marked)), f"token {position}: {', '.join(words)}"


def _read(context: str) -> str:
    return "alone" if context == "alone" else "in its document"


def _cap(values: Sequence[float]) -> float:
    """The value of the deepest colour: one token in fifty is as deep or deeper."""
    ordered = sorted(values)
    return ordered[int(0.98 * (len(ordered) - 1))] or 1.0


def _levels(values: Sequence[float], most: float) -> list[int]:
    return [min(LEVELS - 1, int(LEVELS * value / most)) for value in values]


def _runs(levels: Sequence[int]) -> Iterator[Run]:
    start = 0
    for level, run in groupby(levels):
        count = len(list(run))
        if level:
            yield start, count, level
        start += count
