"""What chunks attend to in those in front of them, taken while they are computed (Cache-Craft, arXiv:2502.15734)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ragkv.chunk import Attended, Chunk
from ragkv.model.attending import Masses
from ragkv.model.decoder import Decoder


class Seen:
    """Chunks that stand one behind the other, and what their tokens attend to.

    Args:
        decoder: of the model.
        chunks: in order.
        start: slot of the first one's first token.
        behind: tokens behind the last one.

    Attributes:
        masses: takes it.
    """

    def __init__(self, decoder: Decoder, chunks: Sequence[Chunk], start: int, behind: int = 0):
        lengths = torch.tensor([start, *map(len, chunks), behind], device="cpu")
        owners = torch.repeat_interleave(torch.arange(len(lengths), device="cpu") - 1, lengths).to(decoder.device)
        self.masses: Masses = Masses(owners, len(chunks))
        self._decoder, self._chunks = decoder, chunks
        self._starts = lengths.cumsum(0).tolist()

    def by(self, start: int, tokens: int) -> Masses:
        """What takes what so many tokens from a slot on attend to: those that the model runs next."""
        self.masses.slots = torch.arange(start, start + tokens, device=self._decoder.device)
        return self.masses

    def attended(self, number: int, rows: Tensor | None = None, before: Attended | None = None) -> Attended:
        """What a chunk attends to.

        Args:
            number: of the chunk.
            rows: its tokens that were computed, by their numbers in it; all if not given.
            before: what the others attended to when they were computed.

        Raises:
            MethodError: not all of its layers showed what they attend to.
        """
        chunk, start = self._chunks[number], self._starts[number]
        rows = torch.arange(len(chunk), device="cpu") if rows is None else rows
        seen = self.masses.mean(len(self._decoder.layers), slice(start, start + len(chunk))).cpu()[rows]
        tokens = torch.zeros(len(chunk), dtype=torch.float32, device="cpu") if before is None else before.tokens.clone()
        tokens[rows] = seen[:, :number].sum(1)
        sums, front = seen.sum(0).tolist(), self._chunks[:number]
        there = sum(mass / len(other) for mass, other in zip(sums, front, strict=False))
        return Attended(
            tuple(other.short for other in front),
            tuple(sums[:number]),
            _impact(there, sums[number] / len(chunk)),
            tokens,
        )


def shows(decoder: Decoder) -> bool:
    """Whether a model shows what it attends to."""
    masses, cache = Masses(torch.zeros(2, dtype=torch.long, device=decoder.device), 1), decoder.cache(2)
    masses.slots = torch.arange(2, device=decoder.device)
    decoder.read(decoder.random_ids(2), cache, 0, masses)
    return masses.seen == len(decoder.layers)


def _impact(there: float, here: float) -> float:
    """CCI (eq. 11): of attention to a key in front, against one in the chunk itself."""
    return 1 / (1 + math.exp(-there / here)) if here else 1.0 if there else 0.5
