"""CacheCraft: of what a chunk was computed as behind others, what fits best is taken, and mended as far as it does not fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import torch

from ragkv.chunk import Attended
from ragkv.errors import MethodError
from ragkv.fusion.view import Check, Selection, Variant, View
from ragkv.methods.base import Method, check_share

# After which shares of the layers it is looked whether the question's attention has settled, and for how many it must have.
_CHECKED, _RUNNING = (1 / 3, 1 / 2, 2 / 3), 3


@dataclass(frozen=True)
class CacheCraft(Method):
    """Take the variant of each chunk that needs least mending, and compute what it needs (Cache-Craft, arXiv:2502.15734).

    A chunk's KV as its document was read are one variant; with ``paths=`` of an engine, what prompts computed of it behind
    other chunks are further ones. Of each it is known how much its tokens attended to the chunks in front. Where a variant has
    the impact ``CCI`` (:class:`~ragkv.chunk.Attended`), the share ``beta`` of what it attended to in front stands in front here
    too (eq. 6), and the share ``gamma`` of pairs of these stands in another order (eq. 7), so much of it is computed (CFO, eq. 12):
    ``alpha * CCI * (1 - beta * (1 - gamma))``. These are the tokens that attended most to what stood in front, of equal ones the
    most sensitive (:mod:`ragkv.library.sensitivity`).

    The paper leaves open what holds of a chunk that was read behind no other: nothing of what stands in front here was seen, so
    ``beta`` is 0, and sensitivity alone says which tokens depend on it. Where variants need the same, the one that saw more of
    what stands in front is taken.

    Once the question's attention has settled on some chunks, the others need no mending in the layers behind. When that is, is
    ours to say: when a chunk had less than the share ``stop`` of the most attended one's in three layers running, looked at
    after a third, half and two thirds of the layers.

    Attributes:
        alpha: how much is computed; more than 0.
        stop: 0 to 1; at 0 all layers are mended.
    """

    alpha: float = 0.5
    stop: float = 0.0

    looks: ClassVar[bool] = False
    needs_attended: ClassVar[bool] = True
    needs_sensitivity: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not 0 < self.alpha < math.inf:
            raise MethodError(f"CacheCraft: alpha must be more than 0, got {self.alpha!r}")
        check_share(self, "stop", self.stop)

    def expected_budget(self, view: View) -> float:
        """That of chunks that were read behind no others."""
        layout = view.layout
        return min(1.0, self.alpha / 2) * len(layout.inexact) / max(1, layout.chunk_tokens)

    def select(self, view: View) -> Selection:
        """Of each chunk that is not exact where it stands, the tokens that the best variant needs."""
        layout, front = view.layout, list[str]()
        tokens, taken, saved = list[torch.Tensor](), list[Variant](), list[int]()
        for placed, variants in zip(layout.chunks, view.variants, strict=True):
            needs = [0 if placed.exact else self._needed(variant.attended, front) for variant in variants]
            best = min(range(len(variants)), key=lambda number: (needs[number], -_common(variants[number], front)))
            sensitive = view.sensitivity[placed.start - layout.chunks_start : placed.stop - layout.chunks_start].cpu()
            order = sensitive.argsort(descending=True, stable=True)
            order = order[variants[best].attended.tokens[order].argsort(descending=True, stable=True)]
            tokens.append(placed.start + order[: needs[best]])
            taken.append(variants[best])
            saved.append(needs[0] - needs[best])
            front.append(placed.chunk.short)
        chosen = torch.cat([*tokens, torch.empty(0, dtype=torch.long, device="cpu")]).to(layout.ids.device)
        checks = {round(view.layers * share) for share in _CHECKED} if self.stop else ()
        return Selection(chosen, checks=sorted(checks), variants=taken, saved=saved)

    def narrow(self, check: Check) -> torch.Tensor:
        """Those of chunks that the question attends to, where its attention has settled."""
        looked = check.looked
        if looked is None or len(looked) < _RUNNING:
            return check.tokens
        last, device = looked[-_RUNNING:], check.tokens.device
        left = (last >= self.stop * last.amax(1, keepdim=True)).any(0).to(device)
        return check.tokens[left[check.layout.owners.to(device)[check.tokens]]]

    def _needed(self, attended: Attended, front: Sequence[str]) -> int:
        """How many tokens are computed of a chunk behind others (eq. 14)."""
        share = self.alpha * attended.impact * (1 - overlap(attended, front))
        return math.ceil(min(share, 1.0) * len(attended.tokens))


def overlap(attended: Attended, front: Sequence[str]) -> float:
    """``beta * (1 - gamma)``: how far what a chunk attended to stands in front of it here, in order (eq. 6 to 8)."""
    if not attended.front:
        return float(not front)
    places = {name: place for place, name in enumerate(front)}
    masses = dict(zip(attended.front, attended.masses, strict=True))
    common = [name for name in masses if name in places]
    whole = sum(masses.values())
    beta = sum(masses[name] for name in common) / whole if whole else float(len(common) == len(masses))
    pairs = list(combinations((places[name] for name in common), 2))
    gamma = sum(first > second for first, second in pairs) / len(pairs) if pairs else 0.0
    return beta * (1 - gamma)


def _common(variant: Variant, front: Sequence[str]) -> int:
    return len(set(variant.attended.front) & set(front))
