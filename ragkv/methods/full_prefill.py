"""Full prefill: every token is computed."""

from dataclasses import dataclass
from typing import ClassVar

from ragkv.fusion.view import Selection, View
from ragkv.methods.base import Method


@dataclass(frozen=True)
class FullPrefill(Method):
    """Compute the whole prompt, as a model without stored KV does. Exact; the yardstick of all others."""

    looks: ClassVar[bool] = False

    def expected_budget(self, view: View) -> float:
        """All of it."""
        return 1.0

    def spares(self, view: View) -> frozenset[int]:
        """All of them."""
        return frozenset(range(len(view.layout.chunks)))

    def select(self, view: View) -> Selection:
        """All of it."""
        return Selection(view.layout.reusable, whole=self.spares(view))
