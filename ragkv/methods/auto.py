"""Auto: picks a method for each prompt."""

from __future__ import annotations

from dataclasses import dataclass, field

from ragkv.fusion.layout import Layout
from ragkv.fusion.view import Selection, View
from ragkv.methods.base import Method
from ragkv.methods.full_prefill import FullPrefill
from ragkv.methods.reuse import Reuse
from ragkv.methods.sensitive_tokens import SensitiveTokens


@dataclass(frozen=True)
class Auto(Method):
    """Pick by what stands in the prompt; the report names what was picked. ``method="auto"`` is short for it.

    Every chunk exact where it stands, or all of one document: :class:`Reuse`. No more chunk tokens than suffix tokens:
    :class:`FullPrefill`, for there is nothing to gain. Else ``repair``.

    Attributes:
        repair: the method for prompts that put chunks where they were not made.
    """

    repair: Method = field(default_factory=SensitiveTokens)

    @property
    def needs_sensitivity(self) -> bool:
        """Whether the repair does."""
        return self.repair.needs_sensitivity

    def select(self, view: View) -> Selection:
        """What the method for this prompt selects; it also decides further."""
        picked = self._picked(view.layout)
        return Selection.of(picked.select(view), picked)

    def _picked(self, layout: Layout) -> Method:
        if not len(layout.behind_another):
            return Reuse()
        if len(layout.reusable) <= len(layout.suffix):
            return FullPrefill()
        return self.repair
