"""RelevantTokens: what depends on the text in front of its document, and is read by the question, is computed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from ragkv.errors import MethodError
from ragkv.fusion.view import Selection, View
from ragkv.methods.sensitive_tokens import SensitiveTokens


@dataclass(frozen=True)
class RelevantTokens(SensitiveTokens):
    """Compute, in all layers, the tokens that would change most what the question reads.

    A method of this library: the product of what :class:`~ragkv.QuestionAware` and :class:`~ragkv.SensitiveTokens` go by. The
    question reads a token's value weighted by its attention; so the attention, averaged over layers and heads, times the change of
    the value behind another text says how much of what is read is wrong as stored. The last token, where the answer begins, counts
    as much as all of the question's together. What SensitiveTokens spares is spared. Looking at the attention costs a pass of the
    question over the stored chunks. Of a model that does not show its attention the most sensitive tokens are computed.

    Attributes:
        ratio, keep_document: as of :class:`~ragkv.SensitiveTokens`.
    """

    looks: ClassVar[bool] = True
    runs_question: ClassVar[bool] = True

    def select(self, view: View) -> Selection:
        """As SensitiveTokens."""
        try:
            return self._highest(view)
        except MethodError as error:
            chosen = SensitiveTokens(self.ratio, self.keep_document)._highest(view)
            return replace(chosen, why=f"chosen by sensitivity alone: {error}")

    def scores(self, view: View) -> Tensor:
        """``[R]`` attention times the root of the squared change."""
        return view.attention("both").mean(0) * view.sensitivity.clamp_min(0).sqrt()
