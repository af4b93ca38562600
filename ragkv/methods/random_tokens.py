"""Random: a control. Any other choice has to beat it at the same budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ragkv.chunk import digest
from ragkv.fusion.view import View
from ragkv.methods.base import Method, check_share


@dataclass(frozen=True)
class Random(Method):
    """Compute tokens drawn at random, in all layers: the control at equal budget.

    Attributes:
        ratio: share of the reusable tokens computed, 0 to 1.
        seed: the same seed and prompt give the same tokens.
    """

    ratio: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        check_share(self, "ratio", self.ratio)

    looks: ClassVar[bool] = False

    def select(self, view: View) -> Tensor:
        """Some of the tokens of chunks that are not exact."""
        layout, candidates = view.layout, view.layout.inexact
        seed = int.from_bytes(digest(str(self.seed), layout.listed())[:7], "little")
        seeded = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(candidates), generator=seeded, device="cpu")
        return candidates[order[: round(self.ratio * layout.chunk_tokens)].to(candidates.device)]
