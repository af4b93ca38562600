"""CacheBlend: the tokens whose keys and values deviate most are computed."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ragkv.errors import MethodError
from ragkv.fusion.view import Check, Selection, View
from ragkv.methods.base import Method, check_number, check_share

_SIGNALS = ("key", "value", "both")


@dataclass(frozen=True)
class CacheBlend(Method):
    """Compute all tokens up to a check layer, go on with those of high KV deviation (CacheBlend, arXiv:2405.16444).

    The deviation of a token is the squared distance of its fresh and stored KV at the check layer, over heads and dimensions.
    Layers before the check run on all tokens and the check layer on all tokens as far as its keys and values, so that a ratio of
    0.15 is charged 0.20 on 32 layers. The paper's own code scores values, a well-known serving layer scores keys.

    Attributes:
        ratio: share of the reusable tokens computed behind the check layer, 0 to 1; 0.15 in the paper.
        check_layer: the layer whose KV are compared, >= 1: layer 0's depend on the token alone and never deviate. 1 in the paper;
            if not given, the one that :attr:`ragkv.View.check_layer` finds for the model.
        signal: deviation of ``"key"``, of ``"value"``, or of ``"both"``, each then scaled to a sum of 1.
        gradual: the paper's gradual filtering (section 4.3): shares kept at the check layer and at the layers behind it, not
            rising, in place of the one selection by ``ratio``.
        threshold: keep the tokens whose deviation exceeds this many times the mean, in place of ``ratio``.
    """

    ratio: float = 0.15
    check_layer: int | None = None
    signal: str = "value"
    gradual: tuple[float, ...] = ()
    threshold: float | None = None

    def __post_init__(self) -> None:
        check_share(self, "ratio", self.ratio)
        if not isinstance(self.gradual, tuple | list):
            raise MethodError(f"CacheBlend: gradual must be shares that do not rise, got {self.gradual!r}")
        for share in self.gradual:
            check_share(self, "gradual", share)
        if list(self.gradual) != sorted(self.gradual, reverse=True):
            raise MethodError(f"CacheBlend: gradual shares must not rise, got {self.gradual}")
        if self.check_layer is not None:
            check_number(self, "check_layer", self.check_layer, 1, " (layer 0 never deviates)")
        if self.signal not in _SIGNALS:
            raise MethodError(f"CacheBlend: signal must be one of {', '.join(_SIGNALS)}, got {self.signal!r}")
        if not (self.threshold is None or (isinstance(self.threshold, int | float) and self.threshold >= 0)):
            raise MethodError(f"CacheBlend: threshold must be >= 0, got {self.threshold!r}")
        if self.threshold is not None and self.gradual:
            raise MethodError("CacheBlend: give threshold or gradual, not both")

    def expected_budget(self, view: View) -> float:
        """All tokens up to the check layer, and the ratio of them behind it."""
        layout, layers = view.layout, view.layers
        if not self._chooses or not len(layout.inexact):
            return 0.0
        shares = self.gradual or (self.ratio,)
        first = (view.check_layer if self.check_layer is None else self.check_layer) + 1
        behind = max(0, layers - first)
        return (min(first, layers) + sum([*shares, *[shares[-1]] * layers][:behind])) / layers

    @property
    def _chooses(self) -> bool:
        return self.threshold is not None or bool(self.gradual) or self.ratio > 0

    def select(self, view: View) -> Tensor | Selection:
        """All tokens up to the check layers; none where every chunk is exact already or nothing is to be kept."""
        layout = view.layout
        if not self._chooses or not len(layout.inexact):
            return layout.reusable[:0]
        first = view.check_layer if self.check_layer is None else self.check_layer
        if first >= view.layers:
            raise MethodError(f"CacheBlend: check_layer {first} of a model with {view.layers} layers")
        checks = range(first, min(view.layers, first + max(1, len(self.gradual))))
        method = replace(self, check_layer=first)
        return Selection(layout.reusable, checks=checks, method=method, whole=frozenset())

    def narrow(self, check: Check) -> Tensor:
        """The tokens that deviate most."""
        score = self._score(check)
        if self.threshold is not None:
            return check.tokens[score > self.threshold * score.mean()]
        assert self.check_layer is not None  # since select
        share = self.gradual[check.layer - self.check_layer] if self.gradual else self.ratio
        wanted = min(len(score), round(share * check.layout.chunk_tokens))
        return check.tokens[torch.topk(score, wanted).indices]

    def _score(self, check: Check) -> Tensor:
        if self.signal == "key":
            return check.key_deviation()
        if self.signal == "value":
            return check.value_deviation()
        keys, values = check.key_deviation(), check.value_deviation()
        tiny = torch.finfo(torch.float32).tiny
        return keys / keys.sum().clamp_min(tiny) + values / values.sum().clamp_min(tiny)
