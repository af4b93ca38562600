"""QuestionAware: the tokens that the question looks at are computed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ragkv.errors import MethodError
from ragkv.fusion.view import AVERAGED, Selection, View
from ragkv.methods.base import Method, check_share, highest, highest_of


@dataclass(frozen=True)
class QuestionAware(Method):
    """Run the question over the stored chunks, then compute the tokens it attends to, in all layers (ProphetKV, arXiv:2602.02579).

    The attention is the model's own, over keys at their places in this prompt and from the question's final position
    (InfoFlow KV, arXiv:2603.05353), averaged over heads, layers and the suffix's tokens; no matrix of it is made where
    :func:`ragkv.kernels.scored_attention` computes it. Weak, so the paper, for chunks of
    less than 256 tokens. The budget counts the tokens recomputed; the look itself is in the report's ``select`` time.

    With ``sees`` below 1, what a recomputed token attends to is limited too, to what the question attends to most, beside the
    prefix and its own chunk. The idea is RelaxKV's (arXiv:2609.33503); there targets and context are chosen for each layer, here
    once for all.

    Attributes:
        ratio: share of the reusable tokens computed, 0 to 1; 0.2 in the paper.
        queries: average over ``"all"`` suffix tokens, as in the paper; take the ``"last"`` one's attention, where the answer
            begins; or the mean of ``"both"``.
        sees: share of the reusable tokens that recomputed ones may see, 0 to 1; at 1 all that stand in front of them.
    """

    runs_question: ClassVar[bool] = True

    ratio: float = 0.2
    queries: str = "all"
    sees: float = 1.0

    def __post_init__(self) -> None:
        check_share(self, "ratio", self.ratio)
        check_share(self, "sees", self.sees)
        if not isinstance(self.queries, str) or self.queries not in AVERAGED:
            raise MethodError(f"QuestionAware: queries must be one of {', '.join(AVERAGED)}, got {self.queries!r}")

    def select(self, view: View) -> Selection:
        """Of the tokens that are not exact where they stand, those that the question attends to most."""
        layout = view.layout
        if not len(layout.inexact) or not self.ratio:
            return Selection(layout.reusable[:0], whole=frozenset())
        attention = view.attention(self.queries).mean(0)
        context = None if self.sees == 1 else highest(attention, layout.reusable, self.sees, layout)
        return replace(highest_of(attention, layout.inexact_chunks, self.ratio, layout), context=context)
