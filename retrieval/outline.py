"""Where pages and sections begin in a text, so that a passage can say where it stands."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from ragkv.retrieval.boundaries import headings

_BETWEEN = "\n\n"


class Outline(NamedTuple):
    """Pages and sections of a text.

    Attributes:
        pages: where each page, or slide, begins, in characters; none for a text without pages.
        sections: where each section begins, and the headings that it stands under, as ``"Harbours > Clearport"``.
    """

    pages: tuple[int, ...] = ()
    sections: tuple[tuple[int, str], ...] = ()

    def page(self, position: int) -> int | None:
        """The number of the page at a position, from 1."""
        return bisect_right(self.pages, position) or None

    def heading(self, position: int) -> str:
        """The headings that a position stands under; empty before the first one."""
        at = bisect_right(self.sections, position, key=lambda section: section[0])
        return self.sections[at - 1][1] if at else ""


#: Of a text that has neither.
NO_OUTLINE = Outline()


def joined(pages: Sequence[str]) -> tuple[str, tuple[int, ...]]:
    """Pages as one text, a blank line between them, and where each begins."""
    starts = accumulate((len(page) + len(_BETWEEN) for page in pages[:-1]), initial=0)
    return _BETWEEN.join(pages), tuple(starts)


def sections(text: str) -> tuple[tuple[int, str], ...]:
    """The sections of a Markdown text; headings with nothing between them begin one section."""
    found: list[tuple[int, str]] = []
    above: list[tuple[int, str]] = []
    end = 0
    for heading in headings(text):
        above = [(level, title) for level, title in above if level < heading.level]
        nested = bool(above) and not text[end : heading.start].strip()
        above.append((heading.level, heading.title))
        start = found.pop()[0] if nested else heading.start
        found.append((start, " > ".join(title for _, title in above if title)))
        end = heading.end
    return tuple(found)
