"""LegoLink: the first tokens of every chunk are computed."""

from dataclasses import dataclass
from typing import ClassVar

from ragkv.fusion.view import Selection, View
from ragkv.methods.base import Method, check_number


@dataclass(frozen=True)
class LegoLink(Method):
    """Recompute the first k tokens of every chunk that is not exact where it stands, in all layers (EPIC, arXiv:2410.15332).

    A chunk's first tokens took the place of attention sinks when the chunk was prefilled behind little. The paper spares the
    first chunk, which stands right behind the prefix; here every exact chunk is spared, which is the same for chunks read alone.

    Attributes:
        k: tokens of a chunk, >= 0; 16 or 32 in the paper. With 0 only the shared prefix links the chunks.
    """

    k: int = 16

    def __post_init__(self) -> None:
        check_number(self, "k", self.k, 0, " tokens")

    looks: ClassVar[bool] = False

    def expected_budget(self, view: View) -> float:
        """The share of the chunk tokens that it selects."""
        return len(self.select(view).tokens) / max(1, view.layout.chunk_tokens)

    def select(self, view: View) -> Selection:
        """The first k tokens of the chunks that are not exact."""
        layout = view.layout
        open_ones = layout.inexact_chunks
        whole = frozenset(number for number, placed in open_ones.items() if len(placed.chunk) <= self.k)
        return Selection(layout.span(*open_ones.values(), first=self.k), whole=whole)
