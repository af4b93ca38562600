"""Where a text may be cut: headings, paragraphs and sentences of plain text and Markdown."""

# ruff: noqa: RUF001 - quotes and full stops of many scripts are meant

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple


class Rank(IntEnum):
    """How good a place is to cut at; a cut prefers the highest rank within reach."""

    CHARACTER = 0
    WORD = 1
    LINE = 2
    SENTENCE = 3
    PARAGRAPH = 4
    HEADING = 5


class Boundary(NamedTuple):
    """A place to cut: before the character at ``position``."""

    position: int
    rank: Rank


class Heading(NamedTuple):
    """A heading of Markdown: where its line begins and ends, its level from 1 to 6, and its text."""

    start: int
    end: int
    level: int
    title: str


_HEADING = re.compile(r" {0,3}(#{1,6})(?:\s|\Z)")
_HEADING_MARKS = re.compile(r"\A\s*#{1,6}|(?:\s#+)?\s*\Z")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
# Items of a list, rows of a table and quoted lines stand alone even without a full stop.
_ITEM = re.compile(r"\s*([-*+•|>]\s|\d{1,3}[.)]\s|\|)")
# A full stop with its closing quotes and the white space behind it, or an ideographic one with nothing behind it.
# The look behind lets a run of dots be tried once, not once from each of its dots.
_SENTENCE_END = re.compile(r"(?<![.!?…؟।])[.!?…؟।]++[\"'”’»)\]*_]*+\s+|(?<![。！？])[。！？]++[”’」』）]*+\s*")
_LAST_WORD = re.compile(r"[^\s(\[\"“‘']*\Z")
# fmt: off
_ABBREVIATIONS = frozenset((
    "a.m", "al", "approx", "apr", "aug", "bzw", "ca", "capt", "cf", "ch", "co", "col", "corp", "d.h", "dec", "dept", "dr",
    "e.g", "ed", "eds", "eq", "eqs", "est", "etc", "feb", "fig", "figs", "gen", "gov", "hon", "i.e", "inc", "jan", "jr",
    "jul", "jun", "lt", "ltd", "mar", "mr", "mrs", "ms", "no", "nos", "nov", "oct", "p", "p.m", "ph.d", "pp", "prof",
    "rep", "rev", "sec", "sen", "sep", "sept", "sgt", "sr", "st", "u.k", "u.n", "u.s", "usw", "vol", "vs", "z.b",
))
# fmt: on


def boundaries(text: str) -> Iterator[Boundary]:
    """The places to cut between sentences, paragraphs and sections, in order.

    A heading keeps the text that follows it, and a fenced block of code is cut between lines only. What lies between
    two boundaries is a sentence, an item, a heading or a line of code.

    Args:
        text: plain text or Markdown, line ends as ``\\n``.

    Yields:
        boundaries with increasing positions; the start of the text is not one of them.
    """
    fence = ""
    block_start = position = 0
    blank = heading = False
    for line in text.splitlines(keepends=True):
        rank = _line_rank(line, bool(fence), blank, heading)
        if rank is not None and position:
            yield from _sentences(text, block_start, position)
            yield Boundary(position, rank)
            block_start = position
        if line.isspace():
            blank = True
        else:
            heading = not fence and bool(_HEADING.match(line))
            fence, before = _fence_after(line, fence), fence
            blank = bool(before and not fence)
        position += len(line)
    yield from _sentences(text, block_start, position)


def headings(text: str) -> Iterator[Heading]:
    """The headings of a Markdown text, in order; none inside of fenced code."""
    fence, position = "", 0
    for line in text.splitlines(keepends=True):
        heading = None if fence else _HEADING.match(line)
        if heading:
            title = _HEADING_MARKS.sub("", line).strip()
            yield Heading(position, position + len(line), len(heading[1]), title)
        elif not line.isspace():
            fence = _fence_after(line, fence)
        position += len(line)


def _line_rank(line: str, in_fence: bool, blank: bool, heading: bool) -> Rank | None:
    """The rank of the boundary before a line; None where the line goes on with what stands before it.

    ``blank`` says that blank lines or the end of a fenced block stand before it, ``heading`` that the last line with
    text is a heading.
    """
    if line.isspace():
        return None
    if in_fence or heading:
        return Rank.LINE
    if _HEADING.match(line):
        return Rank.HEADING
    if blank:
        return Rank.PARAGRAPH
    if _ITEM.match(line) or _FENCE.match(line):
        return Rank.SENTENCE
    return None


def _fence_after(line: str, fence: str) -> str:
    """The mark of the fence that is open behind the line; empty when none is."""
    match = _FENCE.match(line)
    if match is None:
        return fence
    if not fence:
        return match[1]
    closes = match[1][0] == fence[0] and len(match[1]) >= len(fence) and not line[match.end() :].strip()
    return "" if closes else fence


def _sentences(text: str, start: int, end: int) -> Iterator[Boundary]:
    """Boundaries between the sentences of ``text[start:end]``."""
    for match in _SENTENCE_END.finditer(text, start, end):
        if match.end() < end and _ends_sentence(text, start, match):
            yield Boundary(match.end(), Rank.SENTENCE)


def _ends_sentence(text: str, start: int, match: re.Match[str]) -> bool:
    mark = text[match.start()]
    if mark in "。！？":
        return True
    # Small letters follow inside a sentence ('"Why?" he said', "so ... and"), or where all text is in small letters.
    if text[match.end()].islower() and len(match[0].rstrip()) > 1:
        return False
    if mark != "." or match[0].startswith(".."):
        return True
    word = _LAST_WORD.search(text, max(start, match.start() - 24), match.start())
    last = word[0] if word else ""
    # An initial ("J. R. Tolkien") or an abbreviation ("Dr. Who"): one cut too few is better than half a name.
    initial = len(last) == 1 and last.isupper()
    return not (initial or last.lower() in _ABBREVIATIONS)
