"""Auto: picks a method for each prompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from ragkv.fusion.layout import Layout
from ragkv.methods.base import Method
from ragkv.methods.full_prefill import FullPrefill
from ragkv.methods.reuse import Reuse
from ragkv.methods.sensitive_tokens import SensitiveTokens

if TYPE_CHECKING:
    from ragkv.library.depth import Depth


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
    def measured(self) -> bool:
        """Whether the repair needs sensitivities."""
        return self.repair.measured

    def pick(self, layout: Layout, depth: Depth) -> Method:
        """The method for this prompt."""
        return self._picked(layout).pick(layout, depth)

    def start(self, layout: Layout) -> Tensor:
        """What the picked method starts with."""
        return self._picked(layout).start(layout)

    def _picked(self, layout: Layout) -> Method:
        if not len(layout.behind_another):
            return Reuse()
        if len(layout.reusable) <= len(layout.suffix):
            return FullPrefill()
        return self.repair
