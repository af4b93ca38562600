"""Where everything stands in one prompt: prefix, chunks, suffix, and what is already exact.

A token's slot is its index in the prompt's ids, and where its keys and values lie in the cache. Its position is where it stands in
the text: what rope turns by, and what masks compare. The two are equal unless chunks were moved apart or share positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import torch
from torch import Tensor

from ragkv.chunk import Chunk, digest, marked
from ragkv.errors import PromptError, whole_number
from ragkv.kernels.upload import sent
from ragkv.lazy import lazy


@dataclass(frozen=True)
class Placed:
    """One chunk at its place in a prompt.

    Attributes:
        chunk: the chunk.
        start: slot of its first token.
        base: position of its first token when its KV was made.
        exact: it stands where and behind what its KV was made, so that nothing of it needs recomputing.
        continues: the chunk before it in the prompt is the one before it in its document.
        behind_another: some chunk in front of it in the prompt is of another document.
        rooted: all of its document that its KV were made behind stands right in front of it in the prompt too, in order, so that
            computing it afresh loses nothing of what its document told it, and nothing of another document comes between.
        shift: how far its tokens' positions are from their slots.
        path: key of KV that prompts computed of it (:mod:`ragkv.library.paths`); empty where there are none. Where it is exact, or
            the method says what it computed, they were behind just these tokens.
        whole: those are KV of all of its tokens; else of some, which take the place of what was read.
    """

    chunk: Chunk
    start: int
    base: int
    exact: bool
    continues: bool
    behind_another: bool = True
    rooted: bool = True
    shift: int = 0
    path: bytes = b""
    whole: bool = False

    @property
    def stop(self) -> int:
        """Slot behind its last token."""
        return self.start + len(self.chunk)

    @property
    def position(self) -> int:
        """Position of its first token."""
        return self.start + self.shift


@dataclass(frozen=True, eq=False)
class Layout:
    """The prompt that a method decides about. N tokens in all, which methods name by their slots.

    Attributes:
        ids: ``[N]`` token ids, on the model's device.
        chunks: the chunks in prompt order.
        chunks_start: slot of the first chunk token; what stands before is the prefix.
        suffix_start: slot of the first suffix token; always computed afresh from here on.
        opening: tokens in front that other prompts begin with too: their KV are computed once and kept.
        held: tokens in front whose KV lie in the prompt's cache already, as those of an earlier conversation; never computed again.
        earlier: pieces of the prefix behind the opening that were computed before, ascending: first slot, the one behind the last,
            and the key of their KV (:mod:`ragkv.library.paths`).
        thrifty: what is exact where it was read is never computed, by no method, like what is exact under its path.
        mended: slots of the tokens that were recomputed here before, in chunks that are not exact, ascending.
        said: the ids once more, on the CPU, where they came from there.
    """

    ids: Tensor
    chunks: tuple[Placed, ...]
    chunks_start: int
    suffix_start: int
    opening: int = 0
    held: int = 0
    earlier: tuple[tuple[int, int, bytes], ...] = ()
    thrifty: bool = False
    mended: tuple[int, ...] = ()
    said: Tensor | None = None

    def listed(self, start: int = 0, stop: int | None = None) -> list[int]:
        """The ids in some slots, as numbers. Where they came from the CPU nothing waits for the device."""
        return (self.ids if self.said is None else self.said)[start:stop].tolist()

    @lazy
    def tokens(self) -> int:
        """N."""
        return len(self.ids)

    @property
    def chunk_tokens(self) -> int:
        """How many tokens the chunks have."""
        return self.suffix_start - self.chunks_start

    @property
    def suffix_tokens(self) -> int:
        """How many tokens the suffix has."""
        return self.tokens - self.suffix_start

    @property
    def lengths(self) -> list[int]:
        """Tokens of the prefix, of each chunk and of the suffix."""
        return [self.chunks_start, *(len(placed.chunk) for placed in self.chunks), self.suffix_tokens]

    @lazy
    def even(self) -> bool:
        """Whether every token's position is its slot."""
        return not any(placed.shift for placed in self.chunks)

    @property
    def ascending(self) -> bool:
        """Whether positions rise with the slots, so that no token sees one that stands behind it in the prompt."""
        shifts = [0, *(placed.shift for placed in self.chunks)]
        return shifts == sorted(shifts)

    @lazy
    def end(self) -> int:
        """The position behind its last token."""
        return self._suffix_position + self.suffix_tokens

    @property
    def _suffix_position(self) -> int:
        return max((placed.position + len(placed.chunk) for placed in self.chunks), default=self.suffix_start)

    @lazy
    def positions(self) -> Tensor:
        """``[N]`` where each token stands in the text; the suffix stands behind all else."""
        at = torch.arange(self.tokens, device=self.ids.device if self.even else "cpu")
        if self.even:
            return at
        for placed in self.chunks:
            at[placed.start : placed.stop] += placed.shift
        at[self.suffix_start :] += self._suffix_position - self.suffix_start
        return sent(at, self.ids.device)

    @property
    def reusable(self) -> Tensor:
        """``[R]`` all chunk tokens, ascending: those that a method may leave as stored."""
        return torch.arange(self.chunks_start, self.suffix_start, device=self.ids.device)

    @property
    def inexact_chunks(self) -> dict[int, Placed]:
        """The chunks that are not exact where they stand, by their numbers."""
        return {number: placed for number, placed in enumerate(self.chunks) if not placed.exact}

    @property
    def inexact(self) -> Tensor:
        """Their tokens, ascending."""
        return self.span(*self.inexact_chunks.values())

    def settles(self, placed: Placed) -> bool:
        """Whether a chunk is exact where it stands, and is not computed, whatever the method says."""
        return placed.exact and (self.thrifty or bool(placed.path))

    @property
    def settled(self) -> Tensor:
        """The chunk tokens that need no computing, whatever the method says."""
        exact = self.span(*[placed for placed in self.chunks if self.settles(placed)])
        return torch.cat([exact, sent(torch.tensor(self.mended, dtype=torch.long, device="cpu"), exact.device)])

    @property
    def behind_another(self) -> Tensor:
        """Those of ``inexact`` that stand behind some text of another document, ascending: what that text may bear upon."""
        return self.span(*[placed for placed in self.chunks if placed.behind_another and not placed.exact])

    @property
    def suffix(self) -> Tensor:
        """The suffix's tokens, ascending."""
        return torch.arange(self.suffix_start, self.tokens, device=self.ids.device)

    @property
    def owners(self) -> Tensor:
        """``[N]`` the number of the chunk that each token belongs to: -1 in the prefix, one more than the last in the suffix."""
        numbers, lengths = (
            torch.arange(-1, len(self.chunks) + 1, device="cpu"),
            torch.tensor(self.lengths, device="cpu"),
        )
        numbers = torch.repeat_interleave(numbers, lengths, output_size=self.tokens)
        return sent(numbers, self.ids.device)

    def span(self, *chunks: Placed, first: int | None = None) -> Tensor:
        """The given chunks' tokens, ascending; of each one its first ``first`` tokens only, if given."""
        lengths = np.array(
            [len(p.chunk) if first is None else min(len(p.chunk), first) for p in chunks], dtype=np.int64
        )
        ends = lengths.cumsum()
        shifts = np.array([placed.start for placed in chunks], dtype=np.int64) - (ends - lengths)
        return sent(torch.from_numpy(np.arange(lengths.sum()) + np.repeat(shifts, lengths)), self.ids.device)


def lay_out(
    prefix: Sequence[int],
    anchor: Sequence[int],
    chunks: Sequence[Chunk],
    suffix: Sequence[int],
    device: torch.device,
    starts: Sequence[int] | None = None,
    opening: Sequence[int] | None = None,
    held: int = 0,
) -> Layout:
    """Give every segment of a prompt its place.

    Args:
        prefix: ids that the prompt begins with.
        anchor: ids that the chunks were prefilled behind; equal to ``prefix`` by default.
        chunks: in prompt order.
        suffix: ids of the question and what follows it.
        device: of the model.
        starts: position of each chunk's first token, where chunks shall stand apart or share positions; by default each stands
            right behind the one before. The suffix stands behind all of them.
        opening: ids that other prompts begin with too; the prefix by default. What the two have in common is computed once.
        held: tokens in front whose KV lie in the prompt's cache.

    Raises:
        PromptError: not one start for each chunk, or one inside the prefix.
    """
    for start in starts or ():
        whole_number("each of starts", start)
    if starts is not None and (len(starts) != len(chunks) or min(starts, default=len(prefix)) < len(prefix)):
        raise PromptError(
            f"starts must name one position, {len(prefix)} (behind the prefix) or later, for each of the {len(chunks)} chunks; "
            f"got {list(starts)}"
        )
    at, context, hashed = len(prefix), b"", 0  # of the chunks in front, the first few
    behind_anchor = list(prefix) == list(anchor)
    placed: list[Placed] = []
    documents: set[str] = set()
    even = True  # so far
    for number, chunk in enumerate(chunks):
        shift = 0 if starts is None else starts[number] - at
        even = even and not shift
        alone = starts is None or min(starts[number + 1 :], default=at + len(chunk)) >= at + len(chunk)
        base = len(anchor) + chunk.offset
        exact = behind_anchor and even and alone and base == at
        if exact:
            for before in chunks[hashed:number]:
                same = before.context == context
                context = before.context_after if same else digest(context, before.numbers)
            hashed, exact = number, chunk.context == context
        document = chunk.document or chunk.id  # a passage that stands alone is a document of its own
        behind_another = len(documents) > (document in documents)
        continues = number > 0 and _continues(chunk, chunks[number - 1])
        placed.append(Placed(chunk, at, base, exact, continues, behind_another, _rooted(chunk, placed), shift))
        documents.add(document)
        at += len(chunk)
    front, behind = (np.asarray(ids, dtype=np.int64) for ids in (prefix, suffix))
    ids = torch.from_numpy(np.concatenate([front, *(chunk.numbers for chunk in chunks), behind], dtype=np.int64))
    common = len(prefix)
    if opening is not None and opening != prefix:
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prefix, opening, strict=False)))
    return Layout(sent(ids, device), tuple(placed), len(prefix), at, common, held, said=ids)


def _continues(chunk: Chunk, before: Chunk) -> bool:
    return bool(chunk.document) and (chunk.document, chunk.number) == (before.document, before.number + 1)


def _rooted(chunk: Chunk, before: Sequence[Placed]) -> bool:
    """Whether what a chunk was read behind stands right in front of it."""
    if chunk.offset == chunk.front:  # nothing of its own document
        return True
    if not before or not _continues(chunk, before[-1].chunk):
        return False
    last = before[-1].chunk
    if chunk.context == marked(last.context_after, chunk.mark):
        return before[-1].rooted
    first, tokens = len(before), 0  # a new window: its context is the end of the one before
    while first and tokens < chunk.offset:
        first -= 1
        tokens += len(before[first].chunk)
    context = b""
    for other in before[first:]:
        context = digest(marked(context, other.chunk.mark), other.chunk.numbers)
    return tokens == chunk.offset and marked(context, chunk.mark) == chunk.context
