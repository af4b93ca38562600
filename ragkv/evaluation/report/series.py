"""How arms look and read in every plot: one colour a family, filled where chunks were read in their document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ragkv.evaluation.arms import FULL, FULL_DOCUMENTS

#: Classes of the style sheet, which has a colour for each in light and dark.
_COLOURS = 8
#: Families that nobody would serve with, controls and a bound: grey, and never on the front.
CONTROLS = ("no-rotation", "random", "oracle")
_SHAPES = {"random": "square", "oracle": "diamond"}
#: Arms whose prompt is another one than that of the retrieved chunks: lines to compare with, no points.
LINES = (FULL_DOCUMENTS, "gold-only", "no-context")


@dataclass(frozen=True)
class Look:
    """How an arm is drawn.

    Attributes:
        family: the name of its series.
        context: what its chunks were read behind.
        colour: a class of the style sheet.
    """

    family: str
    context: str
    colour: str

    @property
    def shape(self) -> str:
        """``"circle"``, ``"square"`` or ``"diamond"``."""
        return _SHAPES.get(self.family, "circle")

    @property
    def swatch(self) -> str:
        """Classes of its mark in legends and tables."""
        return f"swatch {self.shape} {self.colour}{' hollow' if self.context == 'alone' else ''}"


def looks(summary: dict[str, Any]) -> dict[str, Look]:
    """The look of every arm by name: colours are given out in order of appearance."""
    families = dict.fromkeys(family for family, _ in summary["families"].values())
    coloured = [family for family in families if family not in (*CONTROLS, *LINES, FULL)]
    number = {family: f"c{index % _COLOURS}" for index, family in enumerate(coloured)}
    number[FULL] = "ink"
    return {
        arm: Look(family, context, number.get(family, "grey")) for arm, (family, context) in summary["families"].items()
    }


def best_of_series(summary: dict[str, Any], metric: str, slice_: str) -> list[dict[str, Any]]:
    """Of every family and context the arm that is best at a metric, the cheapest of equals; in order of appearance."""
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for arm in summary["arms"]:
        key, score = tuple(summary["families"][arm["name"]]), value(arm, slice_, metric)
        if score is None or arm["name"].startswith("random="):
            continue
        held = best.get(key)
        if held is None or (score, -arm["cost"]["ttft_ms"]) > (value(held, slice_, metric), -held["cost"]["ttft_ms"]):
            best[key] = arm
    return list(best.values())


def value(arm: dict[str, Any], slice_: str, metric: str) -> float | None:
    """An arm's mean in a slice, or ``None``."""
    scores: Sequence[float] | None = arm["scores"].get(slice_, {}).get(metric)
    return None if scores is None else scores[0]
