"""How the scores of queries and keys become weights."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Scoring(NamedTuple):
    """What :func:`ragkv.kernels.selective_attention` takes by name, checked.

    Attributes:
        scale: of the scores.
        softcap: scores become ``softcap * tanh(scores / softcap)``, if it is given.
        sinks: ``[H]`` a score a head that takes part in the softmax and has no value, if there are any.
    """

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
