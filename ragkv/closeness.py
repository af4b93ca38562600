"""How far a next-token distribution is from another. V words of the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor


def divergence(reference: Tensor, other: Tensor) -> float:
    """KL(reference || other) in nats of two next-token distributions, given as logits ``[1, V]``."""
    p, q = (logits.double().log_softmax(-1) for logits in (reference, other))
    # Clamped at 0: rounding may take the sum of two equal distributions a little below.
    return max(0.0, float((p.exp() * (p - q)).nan_to_num(0.0).sum()))


def same_top(reference: Tensor, other: Tensor) -> float:
    """1 if both logits ``[1, V]`` have their maximum at the same token."""
    return float(torch.equal(reference.argmax(-1), other.argmax(-1)))
