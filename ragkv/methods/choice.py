"""What several methods do: check a share, take the tokens of the highest scores."""

from __future__ import annotations

import torch
from torch import Tensor

from ragkv.errors import MethodError
from ragkv.fusion.layout import Layout
from ragkv.methods.base import Method


def check_share(method: Method, name: str, share: float) -> None:
    """Refuse a share of the tokens that is none.

    Raises:
        MethodError: it lies outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise MethodError(f"{type(method).__name__}: {name} must lie in [0, 1], got {share}")


def highest(scores: Tensor, candidates: Tensor, ratio: float, layout: Layout) -> Tensor:
    """The positions of the highest scores.

    Args:
        scores: ``[R]``, one for each of ``layout.reusable``.
        candidates: positions to choose among.
        ratio: share of all R tokens to take; fewer where there are fewer candidates.
        layout: the prompt.
    """
    wanted = min(len(candidates), round(ratio * len(layout.reusable)))
    return candidates[torch.topk(scores[candidates - layout.chunks_start], wanted).indices]
