"""What a method is: which tokens of a prompt are computed afresh, and in which layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ragkv.layout import Layout

if TYPE_CHECKING:
    from ragkv.fusion import Check
    from ragkv.scene import Scene


class Method(ABC):
    """Chooses the reusable tokens that are computed afresh. The suffix always is, by every method.

    A method says where to start, and may narrow the set before some layers. It keeps no state between prompts: a frozen
    dataclass whose fields are its knobs, checked in ``__post_init__``. Most decide by the layout alone, in :meth:`start`; one that
    has to look at the prompt first sets ``looks`` and has :meth:`survey`.

    Attributes:
        looks: the method chooses in :meth:`survey`, once stored KV can be placed.
        measured: it needs the sensitivity of the chunks' tokens, which is then measured when documents are read.
    """

    looks: ClassVar[bool] = False
    measured: ClassVar[bool] = False

    def pick(self, layout: Layout) -> Method:
        """The method that decides about this prompt: itself, unless it only chooses between others."""
        return self

    def survey(self, scene: Scene) -> Tensor:
        """Positions as of :meth:`start`, by a look at the prompt with its stored KV."""
        return self.start(scene.layout)

    @abstractmethod
    def start(self, layout: Layout) -> Tensor:
        """Positions of the chunk tokens to compute from layer 0 on, a subset of ``layout.reusable``."""

    def checks(self, layers: int) -> Sequence[int]:
        """The layers, of ``layers`` in all, at which :meth:`narrow` is asked; none by default."""
        return ()

    def narrow(self, check: Check) -> Tensor:
        """The positions to go on with from ``check.layer`` on, a subset of ``check.positions``."""
        return check.positions
