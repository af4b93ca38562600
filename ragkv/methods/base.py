"""What a method is: which tokens of a prompt are computed afresh, and in which layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ragkv.fusion.layout import Layout

if TYPE_CHECKING:
    from ragkv.fusion.fuse import Check
    from ragkv.fusion.scene import Scene
    from ragkv.library.depth import Depth


class Method(ABC):
    """Chooses the reusable tokens that are computed afresh. The suffix always is, by every method.

    A method says where to start, and may narrow the set before some layers. It keeps no state between prompts: a frozen
    dataclass whose fields are its knobs, checked in ``__post_init__``. Most decide by the layout alone, in :meth:`start`; one that
    has to look at the prompt first sets ``looks = True`` and has :meth:`survey`.
    """

    @property
    def looks(self) -> bool:
        """Whether the method chooses in :meth:`survey`, once stored KV can be placed."""
        return False

    @property
    def measured(self) -> bool:
        """Whether it needs the sensitivity of the chunks' tokens, which is then measured when documents are read."""
        return False

    def pick(self, layout: Layout, depth: Depth) -> Method:
        """The method that decides about this prompt: itself, unless it chooses between others or asks the model for a knob."""
        return self

    def survey(self, scene: Scene) -> Tensor:
        """Positions as of :meth:`start`, by a look at the prompt with its stored KV."""
        return self.start(scene.layout)

    def context(self, scene: Scene) -> Tensor | None:
        """What the tokens chosen by :meth:`survey` may see: positions of chunk tokens, besides the prefix and their own chunk.

        ``None``, the default: all that stands in front of them.
        """
        return None

    @abstractmethod
    def start(self, layout: Layout) -> Tensor:
        """Positions of the chunk tokens to compute from layer 0 on, a subset of ``layout.reusable``."""

    def checks(self, layers: int) -> Sequence[int]:
        """The layers, of ``layers`` in all, at which :meth:`narrow` is asked; none by default."""
        return ()

    def narrow(self, check: Check) -> Tensor:
        """The positions to go on with from ``check.layer`` on, a subset of ``check.positions``."""
        return check.positions
