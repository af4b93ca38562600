"""Calibrated: the method that a calibration chose, and the ladder that one goes down."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ragkv.errors import CalibrationError
from ragkv.fusion.view import Selection, View
from ragkv.methods.base import Method
from ragkv.methods.relevant_tokens import RelevantTokens
from ragkv.methods.reuse import Reuse

#: What is tried where nothing else is said, from the dearest to the cheapest.
LADDER: tuple[Method, ...] = (*map(RelevantTokens, (0.5, 0.3, 0.2, 0.1, 0.05)), Reuse())


@dataclass(frozen=True)
class Calibrated(Method):
    """Whatever :meth:`ragkv.Engine.calibrate` chose for this model and template; ``method="calibrated"`` is short for it.

    What was chosen is kept beside the KV; the report names it. Where model or template have changed since, every prompt is a full
    prefill, which loses nothing, and report and log say what differs.
    """

    needs_sensitivity: ClassVar[bool] = True  # most of the ladder does

    def select(self, view: View) -> Selection:
        """Nothing: what was chosen stands in its place.

        Raises:
            CalibrationError: outside an engine, which puts it there.
        """
        raise CalibrationError(
            "a calibration's choice is known to an engine alone: give it method='calibrated', in no other method"
        )


@dataclass(frozen=True)
class Chosen(Method):
    """What stands in the place of :class:`Calibrated` in one prompt.

    Attributes:
        method: puts it together.
        void: what has changed since the calibration.
    """

    method: Method
    void: str = ""

    @property
    def _parts(self) -> tuple[Method, ...]:
        return (self.method,)

    def spares(self, view: View) -> frozenset[int]:
        """Those that the chosen method does."""
        return self.method.spares(view)

    def select(self, view: View) -> Selection:
        """What the chosen method selects; it also decides further."""
        selection = Selection.of(self.method.select(view), self.method)
        why = f", void: another {self.void}" if self.void else ""
        return replace(selection, name=f"Calibrated({selection.name}{why})")
