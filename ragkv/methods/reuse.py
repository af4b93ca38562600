"""Reuse: nothing but the suffix is computed."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ragkv.fusion.view import View
from ragkv.methods.base import Method


@dataclass(frozen=True)
class Reuse(Method):
    """Take every chunk as stored, rotated to its place (0 % recompute).

    Exact for a document's chunks, all of them in order right behind the prefix. Elsewhere a chunk knows its own document and
    nothing of the other chunks. It is also what models trained for block attention need (Block-Attention, arXiv:2409.15355).
    """

    looks: ClassVar[bool] = False

    def select(self, view: View) -> Tensor:
        """None."""
        return view.layout.reusable[:0]
