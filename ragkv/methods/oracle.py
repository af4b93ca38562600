"""Oracle: the tokens whose stored KV are furthest from a full prefill's. For measuring only."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ragkv.errors import MethodError
from ragkv.fusion.view import View
from ragkv.methods.base import Method, check_count, check_share, highest


@dataclass(frozen=True)
class Oracle(Method):
    """Compute, in all layers, the tokens that deviate most from a true full prefill: the bound of selection by deviation.

    It runs the full prefill that it is to spare, to know; the budget counts the tokens recomputed. Use it to tell what a better
    signal could bring, and what none can.

    Attributes:
        ratio: share of the reusable tokens computed, 0 to 1.
        layer: the layer at which the deviation is read; by default the mean over all layers but the first.
    """

    ratio: float = 0.15
    layer: int | None = None

    def __post_init__(self) -> None:
        check_share(self, "ratio", self.ratio)
        check_count(self, "layer", self.layer, 1, ">= 1 (layer 0 never deviates)")

    def select(self, view: View) -> Tensor:
        """Of the tokens that are not exact where they stand, those that deviate most."""
        deviation = view.deviation
        if self.layer is not None and self.layer >= len(deviation):
            raise MethodError(f"Oracle: layer {self.layer} of a model with {len(deviation)} layers")
        scores = deviation[1:].mean(0) if self.layer is None else deviation[self.layer]
        return highest(scores, view.layout.inexact, self.ratio, view.layout)
