"""SensitiveTokens: what depends on the text in front of its document is computed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ragkv.layout import Layout
from ragkv.methods.base import Method
from ragkv.methods.choice import check_share, highest

if TYPE_CHECKING:
    from ragkv.depth import Depth
    from ragkv.scene import Scene

#: What counts for a token that the question does not look at, as a share of the mean attention: the text that leads to a value, or
#: the second fact of a chain.
_UNASKED = 0.3


@dataclass(frozen=True)
class SensitiveTokens(Method):
    """Compute, in all layers, the tokens whose values change most when another text stands in front of their document.

    A method of this library. A token is as sensitive as it proved to be when its document was read, once behind the anchor
    alone and once behind a foreign text (:mod:`ragkv.sensitivity`). Reading costs twice as much; at query time nothing is run to
    choose, so that the budget charged is the ratio. CacheBlend (arXiv:2405.16444) measures what deviates at query time, in
    layers that it has to run on all tokens for it.

    Spared are chunks that are exact where they stand, chunks without text of another document in front of them, and chunks whose
    own document's earlier text does not stand right in front of them in this prompt: computed afresh, they would lose what it told
    them, or take it from the text that came between.

    Where more is sensitive than may be computed, the question decides (``asked``): a token's sensitivity counts by the attention
    that the prompt's last token pays to it, over the chunks as they are stored (ProphetKV, arXiv:2602.02579, averages over all of
    the question's). The look runs the suffix once more; it is in the report's ``select`` time, and left out where everything
    sensitive may be computed.

    Attributes:
        ratio: the most that is computed, as a share of the reusable tokens, 0 to 1. At 1 nothing is spared: exact.
        asked: let the question decide. A model that does not show its attention runs without; the report names the method that ran.
    """

    ratio: float = 0.1
    asked: bool = True

    looks: ClassVar[bool] = True
    measured: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share(self, "ratio", self.ratio)

    def pick(self, layout: Layout, depth: Depth) -> SensitiveTokens:
        """Itself, without the question where the model does not show its attention."""
        return self if depth.shows_attention or not self.asked else replace(self, asked=False)

    def start(self, layout: Layout) -> Tensor:
        """Those that may be chosen."""
        if self.ratio == 1:
            return layout.inexact
        chunks = [placed for placed in layout.chunks if placed.behind_another and placed.rooted and not placed.exact]
        return layout.span(*chunks)

    def survey(self, scene: Scene) -> Tensor:
        """The most sensitive ones among them, by the question's attention."""
        layout, candidates, scores = scene.layout, self.start(scene.layout), scene.sensitivity()
        if self.asked and 0 < round(self.ratio * len(layout.reusable)) < len(candidates):
            seen = scene.attention("last").mean(0)
            scores = scores * (seen / seen.mean() + _UNASKED)
        return highest(scores, candidates, self.ratio, layout)
