"""What every codec is: a tensor as named parts, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ragkv.errors import StoreError

Side = Literal["k", "v"]


class Codec(ABC):
    """Encodes one layer's K or V ``[H, T, D]`` into named parts that a record stores, and decodes them.

    The main part has the empty name. Parts are tensors of the dtypes that records know.
    """

    name: ClassVar[str]
    #: Whether K is better encoded as it was before rotary embedding, which mixes its channels.
    before_rotation: ClassVar[bool] = False
    #: Whether it encodes what lies on a GPU as well, without waiting.
    anywhere: ClassVar[bool] = False
    #: Whether decoding gives back the very numbers.
    exact: ClassVar[bool] = False

    def finite(self, numbers: Tensor) -> Tensor:
        """Numbers of which none is infinite or none at all.

        Raises:
            StoreError: one is.
        """
        if not bool(torch.isfinite(numbers).all()):
            raise StoreError(f"the codec {self.name!r} needs finite numbers: store them with 'raw' or 'lossless'")
        return numbers

    @abstractmethod
    def encode(self, tensor: Tensor, side: Side, depth: float = 0.0) -> dict[str, Tensor]:
        """The parts of ``tensor`` ``[H, T, D]``, which lies on the CPU unless :attr:`anywhere`.

        Args:
            tensor: one layer's K or V.
            side: which of them: they may be treated differently.
            depth: where the layer stands, from 0 for the first to less than 1: early ones may be kept better.
        """

    def check(self, parts: dict[str, Tensor], shape: tuple[int, int, int], dtype: torch.dtype, side: Side) -> None:  # noqa: B027
        """Looks at parts that kernels read as they are; arguments as of :meth:`decode`.

        Raises:
            RecordError: they are not what :meth:`encode` makes for this shape.
        """

    @abstractmethod
    def decode(self, parts: dict[str, Tensor], shape: tuple[int, int, int], dtype: torch.dtype, side: Side) -> Tensor:
        """The tensor ``[H, T, D]`` of ``dtype``; it may share memory with the parts.

        Raises:
            RecordError: the parts are not what :meth:`encode` makes for this shape.
        """
