"""The exact bytes in less room: byte planes, of which those that repeat are compressed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ragkv.errors import RecordError, StoreError
from ragkv.store.codecs.base import Codec, Side

# No record of ours repeats itself more than this: what claims more was made to use up memory.
_MOST_REPEATED, _SMALL = 1 << 16, 1 << 20


class Lossless(Codec):
    """Splits every number into its bytes and compresses the plane of the highest with zstd.

    The highest byte holds the sign and most of the exponent, which vary little within a layer; the others are close
    to noise and are stored as they are. Needs the package ``zstandard``.

    Args:
        level: zstd's; 1 is the fastest.
    """

    name = "lossless"
    exact = True

    def __init__(self, level: int = 1) -> None:
        self.level = level

    def encode(self, tensor: Tensor, side: Side, depth: float = 0.0) -> dict[str, Tensor]:
        """See the base class: ``""`` is the compressed plane, ``low`` the others, one after the other."""
        planes = tensor.contiguous().view(-1).view(torch.uint8).view(tensor.numel(), -1).t().contiguous()
        packed = zstd().ZstdCompressor(level=self.level).compress(planes[-1].numpy().data)
        return {"": torch.frombuffer(bytearray(packed), dtype=torch.uint8), "low": planes[:-1].reshape(-1)}

    def decode(self, parts: dict[str, Tensor], shape: tuple[int, int, int], dtype: torch.dtype, side: Side) -> Tensor:
        """See the base class."""
        count = shape[0] * shape[1] * shape[2]
        packed, low = parts[""], parts.get("low")
        if low is None or low.numel() != count * (dtype.itemsize - 1) or low.dtype != torch.uint8:
            raise RecordError(f"the byte planes do not make up {shape} numbers of {dtype}")
        high = decompressed(packed, count)
        joined = torch.empty(count, dtype.itemsize, dtype=torch.uint8, device="cpu")
        joined[:, :-1] = low.view(dtype.itemsize - 1, count).t()
        joined[:, -1] = high
        return joined.view(-1).view(dtype).view(shape)


def decompressed(packed: Tensor, count: int) -> Tensor:
    """So many bytes as a uint8 tensor, from what zstd made of them.

    Raises:
        RecordError: they are not as many, or are damaged.
    """
    if packed.dtype != torch.uint8:
        raise RecordError(f"what is compressed is bytes, got {packed.dtype}")
    data = packed.numpy().data
    try:
        # Before it is decompressed: it may claim more than there is memory.
        if zstd().frame_content_size(data) != count:
            raise RecordError(f"what is compressed is not {count} bytes")
        if count > _MOST_REPEATED * len(data) + _SMALL:
            raise RecordError(f"{len(data)} bytes cannot hold {count}")
        return torch.frombuffer(bytearray(zstd().ZstdDecompressor().decompress(data)), dtype=torch.uint8)
    except zstd().ZstdError as error:
        raise RecordError(f"what is compressed is damaged: {error}") from error


def zstd() -> Any:
    """The package ``zstandard``; StoreError where it is not installed."""
    try:
        import zstandard
    except ImportError as error:
        raise StoreError(
            "the codecs 'lossless' and 'cachegen' need zstandard. Install it with: pip install zstandard"
        ) from error
    return zstandard
