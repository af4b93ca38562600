"""What a method is: which tokens of a prompt are computed afresh, and in which layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ragkv.layout import Layout

if TYPE_CHECKING:
    from ragkv.fusion import Check


class Method(ABC):
    """Chooses the reusable tokens that are computed afresh. The suffix always is, by every method.

    A method says where to start, and may narrow the set before some layers. It keeps no state between prompts: a frozen
    dataclass whose fields are its knobs, checked in ``__post_init__``.
    """

    @abstractmethod
    def start(self, layout: Layout) -> Tensor:
        """Positions of the chunk tokens to compute from layer 0 on, a subset of ``layout.reusable``."""

    def checks(self, layers: int) -> Sequence[int]:
        """The layers, of ``layers`` in all, at which :meth:`narrow` is asked; none by default."""
        return ()

    def narrow(self, check: Check) -> Tensor:
        """The positions to go on with from ``check.layer`` on, a subset of ``check.positions``."""
        return check.positions
