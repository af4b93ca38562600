"""Cutting text into passages of at most so many of the language model's own tokens."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any, NamedTuple

from xxhash import xxh3_64_intdigest

from ragkv.errors import DocumentError, RetrievalError
from ragkv.retrieval.boundaries import Boundary, Rank, boundaries
from ragkv.tokenizer import PrivateTokenizer

_LINE = re.compile(r"(?<=\n)(?=[^\n])")
_WORD = re.compile(r"(?<=\S)(?=\s)")
# Texts that are tokenised in one call: enough to be fast, few enough to be small.
_BATCH = 4096


class _Unit(NamedTuple):
    """A part of the text that is not cut.

    Attributes:
        start: its first character.
        rank: of the boundary before it.
        key: a number that depends on the words of the piece alone.
        tokens: how many it has, counted alone.
    """

    start: int
    rank: Rank
    key: int
    tokens: int


class TokenChunker:
    """Cuts text into passages, without overlap, the same text always in the same way.

    A passage has at most ``chunk_tokens`` tokens when it is tokenised alone, with no special tokens: what looks like
    one is split as other text is. It is cut where structure is strongest within the second half of that room: before
    a heading (the second quarter counts too), else between paragraphs, else between sentences. A sentence that is too
    long is cut between lines, then words, then characters.

    Between equals a hash of the words behind the boundary decides, not the distance from the passage's start: so
    boundaries fall back in step soon after an edit, and the passages behind it are those that were there before. This
    is content-defined chunking (Muthitacharoen et al., "A Low-bandwidth Network File System", 2001) on sentences.

    White space at the two ends of a passage is dropped. Nothing else is: the passages are the text, in order.

    Args:
        tokenizer: a transformers tokenizer, fast or slow, or anything that is called as one is.
        chunk_tokens: the most tokens a passage may have, at least 8.

    Raises:
        RetrievalError: ``chunk_tokens`` is no whole number or is below 8.
    """

    def __init__(self, tokenizer: Any, chunk_tokens: int = 256) -> None:
        if isinstance(chunk_tokens, bool) or not isinstance(chunk_tokens, int) or chunk_tokens < 8:
            raise RetrievalError(f"chunk_tokens must be a whole number of at least 8, got {chunk_tokens!r}")
        if not callable(tokenizer):
            raise RetrievalError(f"tokenizer must be a transformers tokenizer, got {type(tokenizer).__name__}")
        self.tokenizer: Callable[..., object] = tokenizer
        self._private = PrivateTokenizer(tokenizer)
        self.chunk_tokens = chunk_tokens

    @property
    def settings(self) -> str:
        """What the cuts depend on besides the tokenizer; another version of the rules has another number."""
        return f"TokenChunker/1 chunk_tokens={self.chunk_tokens}"

    def split(self, text: str) -> list[str]:
        """The passages of a text, in order; none for a blank text.

        Args:
            text: plain text or Markdown.

        Raises:
            DocumentError: the text is no ``str``, is not valid Unicode, or has a character of more than
                ``chunk_tokens`` tokens.
        """
        return [text[start:stop] for start, stop in self.spans(text)]

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where the passages of :meth:`split` stand in the text: each ``text[start:stop]``, in characters, in order.

        Raises:
            DocumentError: as :meth:`split`.
        """
        if not isinstance(text, str):
            raise DocumentError(f"text must be a str, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DocumentError(f"the text is not valid Unicode: half a surrogate pair at {error.start}") from error
        pieces = list(self._pieces(text))
        totals = [0, *accumulate(piece.tokens for piece in pieces)]
        spans, first = [], 0
        while first < len(pieces):
            first, (start, stop) = self._next(text, pieces, totals, first)
            if start < stop:
                spans.append((start, stop))
        return spans

    def _next(self, text: str, pieces: list[_Unit], totals: list[int], first: int) -> tuple[int, tuple[int, int]]:
        """The piece behind the passage that begins with piece ``first``, and the passage's span."""
        room = self.chunk_tokens
        while True:
            last = _cut(pieces, totals, first, room)
            end = pieces[last].start if last < len(pieces) else len(text)
            start, stop = _stripped(text, pieces[first].start, end)
            # Pieces are counted alone; joined they may have a token more or less.
            excess = self._counts([text[start:stop]])[0] - self.chunk_tokens
            if excess <= 0 or last == first + 1:
                return last, (start, stop)
            room -= excess

    def _pieces(self, text: str) -> Iterator[_Unit]:
        marks = [Boundary(0, Rank.HEADING), *boundaries(text)]
        return self._measured(text, marks, len(text), (_lines, _words, _halves))

    def _measured(
        self, text: str, marks: list[Boundary], end: int, finer: tuple[Callable[[str], list[Boundary]], ...]
    ) -> Iterator[_Unit]:
        """The pieces between boundaries; one that is too long is cut by the first of ``finer``, and so on."""
        stops = [mark.position for mark in marks[1:]] + [end]
        parts = [text[mark.position : stop] for mark, stop in zip(marks, stops, strict=True)]
        # A passage is counted without the white space at its ends, and so is a piece that may become one.
        counts = self._counts([part.strip() for part in parts])
        for mark, part, count in zip(marks, parts, counts, strict=True):
            if count <= self.chunk_tokens:
                yield _Unit(mark.position, mark.rank, xxh3_64_intdigest(part.strip().encode()), count)
                continue
            if len(part.strip()) == 1:
                raise DocumentError(f"{part.strip()!r} alone has {count} tokens, chunk_tokens is {self.chunk_tokens}")
            inner = [Boundary(0, mark.rank), *finer[0](part)]
            deeper = finer[1:] or finer
            for piece in self._measured(part, inner, len(part), deeper):
                yield piece._replace(start=mark.position + piece.start)

    def _counts(self, texts: list[str]) -> list[int]:
        """Tokens of every text when it is tokenised alone, without special tokens."""
        batches = (texts[at : at + _BATCH] for at in range(0, len(texts), _BATCH))
        return [len(ids) for batch in batches for ids in self._private.plain(batch)]


def _stripped(text: str, start: int, end: int) -> tuple[int, int]:
    """The span without the white space at its two ends."""
    stop = start + len(text[start:end].rstrip())
    return stop - len(text[start:stop].lstrip()), stop


def _cut(pieces: list[_Unit], totals: list[int], first: int, room: int) -> int:
    """The piece before which the passage that begins with piece ``first`` ends."""
    begin, rest = totals[first], totals[-1] - totals[first]
    if rest <= room:
        return len(pieces)
    # A last passage of a few words is of no use: leave it a quarter of the room.
    most = min(room, rest - room // 4)
    beyond = max(bisect_right(totals, begin + most) - 1, first + 1)
    half = min(max(bisect_left(totals, begin + (room + 1) // 2), first + 1), beyond)
    quarter = min(max(bisect_left(totals, begin + (room + 3) // 4), first + 1), half)
    headings = [i for i in range(quarter, half) if pieces[i].rank == Rank.HEADING]
    best = max([*headings, *range(half, beyond + 1)], key=lambda i: (pieces[i].rank, pieces[i].key))
    if pieces[best].rank >= Rank.SENTENCE:
        return best
    return next((i for i in range(half - 1, first, -1) if pieces[i].rank >= Rank.SENTENCE), best)


def _lines(text: str) -> list[Boundary]:
    return [Boundary(match.start(), Rank.LINE) for match in _LINE.finditer(text)]


def _words(text: str) -> list[Boundary]:
    return [Boundary(match.start(), Rank.WORD) for match in _WORD.finditer(text)]


def _halves(text: str) -> list[Boundary]:
    return [Boundary(len(text) // 2, Rank.CHARACTER)]
