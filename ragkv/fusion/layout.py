"""Where everything stands in one prompt: prefix, chunks, suffix, and what is already exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ragkv.chunk import Chunk, digest, marked


@dataclass(frozen=True)
class Placed:
    """One chunk at its place in a prompt.

    Attributes:
        chunk: the chunk.
        start: position of its first token in the prompt.
        base: position of its first token when its KV was made.
        exact: it stands where and behind what its KV was made, so that nothing of it needs recomputing.
        continues: the chunk before it in the prompt is the one before it in its document.
        behind_another: some chunk in front of it in the prompt is of another document.
        rooted: all that its KV were made behind stands right in front of it in the prompt too, in order, so that computing it
            afresh loses nothing of what its document told it, and nothing of another document comes between.
    """

    chunk: Chunk
    start: int
    base: int
    exact: bool
    continues: bool
    behind_another: bool = True
    rooted: bool = True

    @property
    def stop(self) -> int:
        """Position behind its last token."""
        return self.start + len(self.chunk)


@dataclass(frozen=True, eq=False)
class Layout:
    """The prompt that a method decides about. N tokens in all.

    Attributes:
        ids: ``[N]`` token ids, on the model's device.
        chunks: the chunks in prompt order.
        chunks_start: position of the first chunk token; what stands before is the prefix.
        suffix_start: position of the first suffix token; always computed afresh from here on.
    """

    ids: Tensor
    chunks: tuple[Placed, ...]
    chunks_start: int
    suffix_start: int

    @property
    def tokens(self) -> int:
        """N."""
        return len(self.ids)

    @property
    def reusable(self) -> Tensor:
        """``[R]`` positions of all chunk tokens, ascending: those that a method may leave as stored."""
        return torch.arange(self.chunks_start, self.suffix_start, device=self.ids.device)

    @property
    def inexact(self) -> Tensor:
        """Positions of the tokens of all chunks that are not exact where they stand, ascending."""
        return self.span(*[placed for placed in self.chunks if not placed.exact])

    @property
    def behind_another(self) -> Tensor:
        """Those of ``inexact`` that stand behind some text of another document, ascending: what that text may bear upon."""
        return self.span(*[placed for placed in self.chunks if placed.behind_another and not placed.exact])

    @property
    def suffix(self) -> Tensor:
        """Positions of the suffix, ascending."""
        return torch.arange(self.suffix_start, self.tokens, device=self.ids.device)

    @property
    def owners(self) -> Tensor:
        """``[N]`` the number of the chunk that each position belongs to: -1 in the prefix, one more than the last in the suffix."""
        lengths = [
            self.chunks_start,
            *map(len, (placed.chunk for placed in self.chunks)),
            self.tokens - self.suffix_start,
        ]
        return torch.repeat_interleave(torch.arange(len(lengths)) - 1, torch.tensor(lengths)).to(self.ids.device)

    def span(self, *chunks: Placed, first: int | None = None) -> Tensor:
        """Positions of the given chunks' tokens, ascending; of each one's first ``first`` tokens only, if given."""
        pieces = [
            torch.arange(placed.start, placed.stop if first is None else min(placed.stop, placed.start + first))
            for placed in chunks
        ]
        return torch.cat([*pieces, torch.empty(0, dtype=torch.long)]).long().to(self.ids.device)


def lay_out(
    prefix: Sequence[int], anchor: Sequence[int], chunks: Sequence[Chunk], suffix: Sequence[int], device: torch.device
) -> Layout:
    """Give every segment of a prompt its place.

    Args:
        prefix: ids that the prompt begins with.
        anchor: ids that the chunks were prefilled behind; equal to ``prefix`` by default.
        chunks: in prompt order.
        suffix: ids of the question and what follows it.
        device: of the model.
    """
    at, context = len(prefix), b""
    behind_anchor = list(prefix) == list(anchor)
    placed: list[Placed] = []
    for number, chunk in enumerate(chunks):
        base = len(anchor) + chunk.offset
        exact = behind_anchor and base == at and chunk.context == context
        behind_another = any(_document(other) != _document(chunk) for other in chunks[:number])
        continues = number > 0 and _continues(chunk, chunks[number - 1])
        placed.append(Placed(chunk, at, base, exact, continues, behind_another, _rooted(chunk, chunks[:number])))
        at += len(chunk)
        context = digest(context, chunk.ids)
    ids = [*prefix, *(i for chunk in chunks for i in chunk.ids), *suffix]
    return Layout(torch.tensor(ids, dtype=torch.long, device=device), tuple(placed), len(prefix), at)


def _document(chunk: Chunk) -> str:
    """What tells a chunk's document from others; a passage that stands alone is one of its own."""
    return chunk.document or chunk.id


def _continues(chunk: Chunk, before: Chunk) -> bool:
    return bool(chunk.document) and (chunk.document, chunk.number) == (before.document, before.number + 1)


def _rooted(chunk: Chunk, before: Sequence[Chunk]) -> bool:
    """Whether what a chunk was read behind stands right in front of it."""
    first, tokens = len(before), 0
    while first and tokens < chunk.offset:
        first -= 1
        tokens += len(before[first])
    context = b""
    for other in before[first:]:
        context = digest(marked(context, other.mark), other.ids)
    return tokens == chunk.offset and marked(context, chunk.mark) == chunk.context
