"""SensitiveTokens: what depends on the text in front of its document is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ragkv.errors import MethodError
from ragkv.fusion.layout import Placed
from ragkv.fusion.view import Selection, View
from ragkv.methods.base import Method, check_share, highest_of


@dataclass(frozen=True)
class SensitiveTokens(Method):
    """Compute, in all layers, the tokens whose values change most when another text stands in front of their document.

    A method of this library. A token is as sensitive as it proved to be when its document was read, once behind the anchor
    alone and once behind a foreign text (:mod:`ragkv.library.sensitivity`). Reading costs twice as much; at query time nothing
    is run to choose, so that the budget charged is the ratio. CacheBlend (arXiv:2405.16444) measures what deviates at query
    time, in layers that it has to run on all tokens for it.

    Spared are chunks that are exact where they stand; with ``keep_document`` also those without text of another document in front
    of them, and those whose own document's earlier text does not stand right in front of them in this prompt: computed afresh,
    they would lose what it told them, or take it from the text that came between.

    Attributes:
        ratio: the most that is computed, as a share of the reusable tokens, 0 to 1. At 1 nothing is spared: exact.
        keep_document: whether chunks are spared for what their document told them. Without it the prompt comes nearer to its own
            full prefill, with it nearer to one of the whole documents.
    """

    ratio: float = 0.1
    keep_document: bool = False

    needs_sensitivity: ClassVar[bool] = True
    looks: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_share(self, "ratio", self.ratio)
        if not isinstance(self.keep_document, bool):
            raise MethodError(f"{type(self).__name__}: keep_document must be true or false, got {self.keep_document!r}")

    def expected_budget(self, view: View) -> float:
        """The ratio, or as much as is not spared."""
        return min(
            self.ratio,
            sum(len(placed.chunk) for placed in self._open(view).values()) / max(1, view.layout.chunk_tokens),
        )

    def select(self, view: View) -> Selection:
        """The tokens of the highest scores among those that are not spared."""
        return self._highest(view)

    def _highest(self, view: View) -> Selection:
        layout, chunks = view.layout, self._open(view)
        if not chunks or self.ratio == 1:
            return Selection(layout.span(*chunks.values()), whole=frozenset(chunks))
        reusable = layout.chunk_tokens
        spared = sum(len(layout.chunks[number].chunk) for number in view.spared)
        return highest_of(self.scores(view), chunks, self.ratio * (reusable - spared) / reusable, layout)

    def scores(self, view: View) -> Tensor:
        """``[R]`` what decides: the sensitivity."""
        return view.sensitivity

    def _open(self, view: View) -> dict[int, Placed]:
        """The chunks whose tokens are not spared, by their numbers."""
        return {
            number: placed
            for number, placed in view.layout.inexact_chunks.items()
            if number not in view.spared
            and (self.ratio == 1 or not self.keep_document or (placed.behind_another and placed.rooted))
        }
