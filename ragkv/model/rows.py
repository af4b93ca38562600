"""What is run: some tokens of one prompt. S of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ragkv.model.attending import Masses
from ragkv.model.cache import FusedCache
from ragkv.model.kernel_attention import Scores
from ragkv.model.masks import LayerMasks


@dataclass(eq=False)
class Rows:
    """Some tokens of one prompt, to be run together.

    Attributes:
        ids: ``[S]``, on the model's device.
        positions: ``[S]``.
        cache: of the prompt. It appends their keys and values, or writes them to their slots while it is ``writing``.
        masks: which keys of the prompt they see; ``None`` for rows right behind what the cache holds.
        wanted: how many of the last rows' logits are wanted.
        limited: as for :meth:`ragkv.model.decoder.Decoder.fusion_attention`.
        masses: takes what they attend to; its ``slots`` are theirs.
        scores: takes what they attend to, summed; ``masks`` are spans then.
        first: position of the first of rows that follow each other, where the host knows it.
        attention: the attention implementation that ran.
        ran: how: ``"graph"``, ``"fixed"`` or ``"eager"``, see :class:`ragkv.model.graphs.Graphs`; and why, where something failed.
    """

    ids: Tensor
    positions: Tensor
    cache: FusedCache
    masks: LayerMasks | None = None
    wanted: int = 1
    limited: bool = False
    masses: Masses | None = None
    scores: Scores | None = None
    first: int | None = None
    attention: str = ""
    ran: str = "eager"

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def held(self) -> int:
        """Tokens that the cache holds."""
        return self.cache.layers[0].length
