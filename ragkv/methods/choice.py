"""What several methods do: take the tokens of the highest scores."""

from __future__ import annotations

import torch
from torch import Tensor

from ragkv.layout import Layout


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
