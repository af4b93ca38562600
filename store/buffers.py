"""Memory for payloads: recycled, because a page touched for the first time costs more than copying into it."""

from __future__ import annotations

import logging
import math
import mmap
import re
import threading
import weakref
from bisect import bisect_left
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ragkv.forks import anew_in_forks

logger: logging.Logger = logging.getLogger("ragkv.store")

# Smaller ones are left to the allocator, which recycles them itself.
_LARGE_BYTES = 1 << 20
_SPARE_BYTES = 256 << 20
_WASTE = 8  # a recycled buffer may be larger than asked for by one part in this many


class _Spares:
    """Maps whose tensors are all gone, by size."""

    def __init__(self) -> None:
        self.anew()

    def anew(self) -> None:
        """In a child: another thread may have held the lock, and it is not there."""
        # Reentrant: a tensor may be collected, and come here, while this very thread holds the lock.
        self._lock = threading.RLock()
        self._maps: list[tuple[int, mmap.mmap]] = []
        self._total = 0

    def take(self, size: int) -> mmap.mmap | None:
        """A map of at least ``size`` bytes and not much more."""
        with self._lock:
            at = bisect_left(self._maps, size, key=lambda item: item[0])
            if at == len(self._maps) or self._maps[at][0] > size + size // _WASTE:
                return None
            length, spare = self._maps.pop(at)
            self._total -= length
            return spare

    def give(self, spare: mmap.mmap) -> None:
        """Keeps a map for later, if not too many are kept."""
        with self._lock:
            length = len(spare)
            if self._total + length <= _SPARE_BYTES:
                self._maps.insert(bisect_left(self._maps, length, key=lambda item: item[0]), (length, spare))
                self._total += length


_spares: _Spares = anew_in_forks(_Spares())


def allocate(size: int) -> tuple[Tensor, int]:
    """uint8 ``[size]``, not cleared, and the bytes that its memory takes; pinned where this process computes on a GPU.

    The memory is used again once no tensor refers to it, be it a view of a view, and no copy from or to it is under way: of what is
    pinned PyTorch knows that by the block, which is why each has one of its own.
    """
    if _pins():
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True, device="cpu"), taken(size)
        except RuntimeError as error:  # a host has less of it than memory
            logger.warning("%d bytes are not pinned, copies to the GPU will wait: %s", size, str(error))
    if size < _LARGE_BYTES:
        return torch.empty(size, dtype=torch.uint8, device="cpu"), size
    region = _spares.take(size) or _map(size)
    array: Any = np.frombuffer(region, dtype=np.uint8, count=size)
    # The tensor's storage holds the array: this runs when the last view has gone.
    weakref.finalize(array, _spares.give, region).atexit = False
    return torch.from_numpy(array), size


def taken(size: int) -> int:
    """Bytes that the memory of so many takes: PyTorch rounds pinned memory up to powers of two, up to the size that it is told."""
    return 1 << (size - 1).bit_length() if 0 < size <= _rounded_bytes() and _pins() else size


def _rounded_bytes() -> float:
    """The largest that is rounded, by PYTORCH_ALLOC_CONF; PyTorch has no public way to ask."""
    settings: str = getattr(torch._C, "_accelerator_getAllocatorSettings", str)()
    limits = re.findall(r"pinned_max_(?:round_threshold|cached_size)_mb:\s*(\d+)", settings)
    return min((int(limit) << 20 for limit in limits), default=math.inf)


def _pins() -> bool:
    """Whether it is of use. Else pinning would make a context on a GPU that nobody uses, or raise, as it does in a forked child."""
    return torch.cuda.is_initialized()


def _map(size: int) -> mmap.mmap:
    region = mmap.mmap(-1, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        region.madvise(mmap.MADV_HUGEPAGE)
    return region
