"""QuestionAware: the tokens that the question looks at are computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ragkv.errors import MethodError
from ragkv.fusion.layout import Layout
from ragkv.methods.base import Method
from ragkv.methods.choice import check_share, highest

if TYPE_CHECKING:
    from ragkv.fusion.scene import Scene

_QUERIES = ("all", "last")


@dataclass(frozen=True)
class QuestionAware(Method):
    """Run the question over the stored chunks, then compute the tokens it attends to, in all layers (ProphetKV, arXiv:2602.02579).

    The attention is the model's own, over keys at their places in this prompt and from the question's final position
    (InfoFlow KV, arXiv:2603.05353), averaged over heads, layers and the suffix's tokens; no matrix of it is made where
    :func:`ragkv.kernels.question_scores` computes it. Weak, so the paper, for chunks of
    less than 256 tokens. The budget counts the tokens recomputed; the look itself is in the report's ``select`` time.

    With ``sees`` below 1, what a recomputed token attends to is limited too, to what the question attends to most, beside the
    prefix and its own chunk. The idea is RelaxKV's (arXiv:2609.33503); there targets and context are chosen for each layer, here
    once for all.

    Attributes:
        ratio: share of the reusable tokens computed, 0 to 1; 0.2 in the paper.
        queries: average over ``"all"`` suffix tokens, as in the paper, or take the ``"last"`` one's attention, where the answer
            begins.
        sees: share of the reusable tokens that recomputed ones may see, 0 to 1; at 1 all that stand in front of them.
    """

    ratio: float = 0.2
    queries: str = "all"
    sees: float = 1.0

    looks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share(self, "ratio", self.ratio)
        check_share(self, "sees", self.sees)
        if self.queries not in _QUERIES:
            raise MethodError(f"QuestionAware: queries must be one of {', '.join(_QUERIES)}, got {self.queries!r}")

    def start(self, layout: Layout) -> Tensor:
        """Those that may be chosen."""
        return layout.inexact

    def survey(self, scene: Scene) -> Tensor:
        """Those of them that the question attends to most."""
        candidates = self.start(scene.layout)
        if not len(candidates) or not self.ratio:
            return candidates[:0]
        return highest(scene.attention(self.queries).mean(0), candidates, self.ratio, scene.layout)

    def context(self, scene: Scene) -> Tensor | None:
        """The tokens that the question attends to most, where ``sees`` is below 1."""
        if self.sees == 1 or not self.ratio:
            return None
        return highest(scene.attention(self.queries).mean(0), scene.layout.reusable, self.sees, scene.layout)
