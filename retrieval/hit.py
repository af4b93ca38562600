"""What a search finds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ragkv.retrieval.records import Passage, Reading


@dataclass(frozen=True)
class Hit:
    """A passage that was found.

    Attributes:
        passage_id: its id in the catalogue.
        text: its text.
        score: inner product of its vector and the question's, or what a reranker said. A neighbour has that of its hit.
        source: the source of its document.
        document_id: the id of its document.
        position: its place among the passages of its document, from 0.
        metadata: of its document.
        span: where it stands in its document's text, if that is known.
        page: the page (of a presentation: the slide) that it begins on, from 1; None where there are none.
        heading: the headings that it stands under, ``"Harbours > Clearport"``; in a workbook its sheet; empty where there are none.
        rank: its place in what was found, from 1, whatever the order of the prompt; neighbours behind all that were found.
            0 for copies.
        copies: passages of the very same text that were found too, and are not in the prompt again: it stands for them.
        reading: how the model that asks reads its document, if that is kept.
    """

    passage_id: int
    text: str
    score: float
    source: str
    document_id: str
    position: int
    metadata: dict[str, Any]
    span: tuple[int, int] | None = None
    page: int | None = None
    heading: str = ""
    rank: int = 0
    copies: tuple[Hit, ...] = ()
    reading: Reading | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        passage: Passage,
        score: float,
        reading: Reading | None = None,
        copies: tuple[Hit, ...] = (),
        rank: int = 0,
    ) -> Hit:
        """A passage where it stands, as a hit."""
        document, at = passage.document, passage.position
        return cls(
            passage_id=passage.id,
            text=passage.text,
            score=score,
            source=document.source,
            document_id=document.id,
            position=at,
            metadata=document.metadata,
            span=document.spans[at] if document.spans else None,
            page=document.pages[at] if document.pages else None,
            heading=document.headings[at] if document.headings else "",
            rank=rank,
            copies=copies,
            reading=reading,
        )
