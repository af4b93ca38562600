"""Full prefill: every token is computed."""

from dataclasses import dataclass

from torch import Tensor

from ragkv.fusion.view import View
from ragkv.methods.base import Method


@dataclass(frozen=True)
class FullPrefill(Method):
    """Compute the whole prompt, as a model without stored KV does. Exact; the yardstick of all others."""

    def select(self, view: View) -> Tensor:
        """All of it."""
        return view.layout.reusable
