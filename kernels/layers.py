"""All layers at once: those of a prompt's cache, of a chunk, or of a pool. What placing them costs the host hardly grows with them.

L layers, H kv heads, T tokens, N tokens of the prompt, D head_dim, P tokens of a block, R rotated dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ragkv.kernels.stored import Stored
from ragkv.kernels.validation import check_pool, check_stored, require


class Layers:
    """K and V of every layer where they lie. Looked at once, and placed by any number of prompts.

    Made by itself of what codecs hold; by :meth:`raw` and :meth:`pool` of numbers.

    Args:
        pairs: K and V of each layer, all on one device; none is copied, so they must stay where they are.

    Attributes:
        pairs: as given.
        paged: it is a pool, whose tokens are named by their slots.
        device: where all of it lies.
        tokens: T, or those for which a pool has room.
        kinds: heads and dimensions of K and V in each layer.
        dtypes: of what is held as numbers.
        encoded: some of it is not held as numbers.
        described: what an implementation has found out of it.

    Raises:
        KernelError: a layer's parts do not fit together, or layers differ in tokens or device.
    """

    def __init__(self, pairs: Sequence[tuple[Stored, Stored]], paged: bool = False):
        self.pairs: tuple[tuple[Stored, Stored], ...] = tuple(pairs)
        every = [stored for pair in self.pairs for stored in pair]
        for stored in every:
            check_pool(stored) if paged else check_stored(stored)
        require(bool(every), "there must be a layer at least")
        alike = {(stored.shape[1], stored.numbers.device) for stored in every}
        require(len(alike) == 1, f"layers must be of the same tokens, on one device, got {alike}")
        self.paged: bool = paged
        self.tokens: int = every[0].shape[1]
        self.device: torch.device = every[0].numbers.device
        self.kinds: tuple[tuple[int, int], ...] = tuple((stored.shape[0], stored.shape[2]) for stored in every)
        self.dtypes: frozenset[torch.dtype] = frozenset(
            stored.numbers.dtype for stored in every if stored.codec == "raw"
        )
        self.encoded: bool = any(stored.codec != "raw" for stored in every)
        self.described: Any = None

    def pair(self, layer: int) -> tuple[Stored, Stored]:
        """K and V of a layer, where they are read."""
        return self.pairs[layer]

    def __getstate__(self) -> dict[str, Any]:
        """Copies lie elsewhere: addresses that were found stay behind."""
        return {**vars(self), "described": None}

    @classmethod
    def raw(cls, pairs: Sequence[tuple[Tensor, Tensor]]) -> Layers:
        """Numbers ``[H, T, D]`` as they are."""
        return cls([(Stored.raw(keys), Stored.raw(values)) for keys, values in pairs])

    @classmethod
    def pool(cls, pairs: Sequence[tuple[Tensor, Tensor]]) -> Layers:
        """Pools ``[blocks, H, P, D]``."""
        return cls([(_pooled(keys), _pooled(values)) for keys, values in pairs], paged=True)

    def __len__(self) -> int:
        return len(self.pairs)


class Brought(Layers):
    """The same layers as others, whose bytes are copied elsewhere; its ``pairs`` are theirs.

    Args:
        source: those that are copied, in the memory of the CPU; no pool.
        to: uint8, dense, where they are copied to.
        shifts: ``[L]`` by how many bytes each layer's addresses there are greater; multiples of 16.
    """

    def __init__(self, source: Layers, to: Tensor, shifts: NDArray[np.int64]):
        self.__dict__ |= vars(source)
        self.source: Layers = source
        self.to: Tensor = to
        self.shifts: NDArray[np.int64] = shifts
        self.device: torch.device = to.device

    def pair(self, layer: int) -> tuple[Stored, Stored]:
        """See :class:`Layers`."""
        (keys, values), shift = self.pairs[layer], int(self.shifts[layer])
        return self._there(keys, shift), self._there(values, shift)

    def _there(self, stored: Stored, shift: int) -> Stored:
        def moved(part: Tensor | None) -> Tensor | None:
            if part is None:
                return None
            start = part.data_ptr() + shift - self.to.data_ptr()
            return self.to.view(-1)[start : start + part.nbytes].view(part.dtype).view(part.shape)

        numbers = moved(stored.numbers)
        assert numbers is not None
        return replace(stored, numbers=numbers, scale=moved(stored.scale), low=moved(stored.low))


class Turn(NamedTuple):
    """How one layer's keys turn, all over a prompt.

    Attributes:
        cos: ``[N, R / 2]`` fp32 by slot, from :func:`~ragkv.kernels.rotation_tables`; to the last slot that turns at least.
        sin: ``[N, R / 2]`` fp32.
        interleaved: which dimensions form a pair, see :class:`~ragkv.kernels.Rotation`.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False


class Run(NamedTuple):
    """Tokens that lie side by side in the prompt, in all layers, and come from one place.

    Attributes:
        source: a chunk, or a pool; of numbers it may be the first tokens that are placed, of encoded ones all are.
        start: slot of the first token in the prompt.
        tokens: T.
        slots: ``[T]`` int64 on the CPU, where each token lies in the pool, see :func:`~ragkv.kernels.slots_of`.
        turns: how each layer's keys turn, ``None`` where they do not; ``None`` for all layers.
    """

    source: Layers
    start: int
    tokens: int
    slots: Tensor | None = None
    turns: Sequence[Turn | None] | None = None


def joined(runs: Sequence[Run]) -> list[Run]:
    """The same with those as one that follow each other in the prompt, out of the same pool, and turn in the same way."""
    made: list[list[Run]] = []
    for run in runs:
        before = made[-1][-1] if made else None
        follows = (
            before is not None
            and run.slots is not None
            and (before.source is run.source and before.turns is run.turns)
            and before.start + before.tokens == run.start
        )
        made[-1].append(run) if follows else made.append([run])
    return [group[0] if len(group) == 1 else _one(group) for group in made]


def _one(group: list[Run]) -> Run:
    slots = torch.cat([run.slots for run in group if run.slots is not None])
    return group[0]._replace(tokens=len(slots), slots=slots)


def _pooled(numbers: Tensor) -> Stored:
    blocks, heads, page, dim = numbers.shape
    return Stored(numbers, (heads, blocks * page, dim))
