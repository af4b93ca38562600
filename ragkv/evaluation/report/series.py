"""How arms look and read in every plot: one colour a family, filled where chunks were read in their document."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ragkv.evaluation.arms import FULL, FULL_DOCUMENTS
from ragkv.evaluation.summary import ALL, Metric

#: What a run's summary says of an arm.
Arm = dict[str, Any]

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
    def hollow(self) -> str:
        """A class for marks of chunks that were read alone."""
        return " hollow" if self.context == "alone" else ""


def looks(summary: dict[str, Any]) -> dict[str, Look]:
    """The look of every arm by name: colours are given out in order of appearance."""
    families = dict.fromkeys(family for family, _ in summary["families"].values())
    coloured = [family for family in families if family not in (*CONTROLS, *LINES, FULL)]
    number = {family: f"c{index % _COLOURS}" for index, family in enumerate(coloured)}
    number[FULL] = "ink"
    return {
        arm: Look(family, context, number.get(family, "grey")) for arm, (family, context) in summary["families"].items()
    }


def by_series(arms: Iterable[Arm], looks: dict[str, Look]) -> dict[tuple[str, str], list[Arm]]:
    """Arms by family and context. Random controls at other arms' budgets are no series."""
    series: dict[tuple[str, str], list[Arm]] = {}
    for arm in arms:
        if not arm["name"].startswith("random="):
            look = looks[arm["name"]]
            series.setdefault((look.family, look.context), []).append(arm)
    return series


def comparable(arms: Iterable[Arm], metric: Metric, slice_: str = ALL) -> list[Arm]:
    """The arms with a score that were refused nothing: others may have been spared just the hard cases. All, where each was."""
    scored = [arm for arm in arms if metric.name in arm["scores"][slice_]]
    return [arm for arm in scored if not arm["refused"]] or scored


def best(arms: Iterable[Arm], metric: Metric) -> Arm | None:
    """The arm that is best at a metric, the fastest of equals; ``None`` where none has a score."""
    return max(
        comparable(arms, metric),
        key=lambda arm: (metric.merit(arm["scores"][ALL][metric.name][0]), -arm["cost"]["ttft_ms"]),
        default=None,
    )
