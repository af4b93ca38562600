"""What every codec is: a tensor as named parts, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

Side = Literal["k", "v"]


class Codec(ABC):
    """Encodes one layer's K or V ``[H, T, D]`` into named parts that a record stores, and decodes them.

    The main part has the empty name. Parts are tensors of the dtypes that records know.
    """

    name: ClassVar[str]

    @abstractmethod
    def encode(self, tensor: Tensor, side: Side) -> dict[str, Tensor]:
        """The parts of ``tensor`` ``[H, T, D]`` on CPU; K and V may be treated differently."""

    @abstractmethod
    def decode(self, parts: dict[str, Tensor], shape: tuple[int, int, int], dtype: torch.dtype, side: Side) -> Tensor:
        """The tensor ``[H, T, D]`` of ``dtype``; it may share memory with the parts.

        Raises:
            RecordError: the parts are not what :meth:`encode` makes for this shape.
        """
