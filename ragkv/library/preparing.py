"""What adding a document takes: its passages, and what the model reads of them. Nothing is read or stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ragkv.chunk import digest
from ragkv.errors import DocumentError
from ragkv.library.catalogued import CataloguedDocuments, Prepared
from ragkv.retrieval import TokenChunker
from ragkv.retrieval.outline import NO_OUTLINE, Outline
from ragkv.retrieval.records import checked_document, source_id


class Given(NamedTuple):
    """A text that is to be a document.

    Attributes:
        source: what it is called.
        text: all of it.
        metadata: anything that JSON can hold.
        outline: where its pages and sections begin.
        file: see :class:`~ragkv.retrieval.Document`.
    """

    source: str
    text: str
    metadata: dict[str, Any] | None = None
    outline: Outline = NO_OUTLINE
    file: str = ""


def unchanged(catalogued: CataloguedDocuments, source: str, file: str) -> Prepared | None:
    """What adding a file takes that was added before: its passages are known. ``None`` where anything differs.

    Args:
        catalogued: has it.
        source: what it is called.
        file: see :class:`~ragkv.retrieval.Document`.
    """
    listed, document, texts = catalogued.before(source)
    if listed is None or listed.file != file:
        return None
    document = document or catalogued.documents.cut(texts, listed.id, any_length=True)
    facts = {name: getattr(listed, name) for name in ("spans", "origin", "pages", "headings", "file")}
    return Prepared(source, texts, listed.metadata, facts, document, "unchanged")


def prepare(catalogued: CataloguedDocuments, given: Given, chunker: TokenChunker) -> Prepared:
    """What adding a document takes. Nothing is read or stored.

    Args:
        catalogued: perhaps has it.
        given: the document.
        chunker: cuts it, unless the very text was cut in the same way before, perhaps with another model's tokens.

    Raises:
        DocumentError: the text is blank or cannot be stored as it is.
    """
    source, text, metadata, outline, file = given
    checked_document(source, [text], metadata)
    origin = digest(text, chunker.settings).hex()
    listed, before, old = catalogued.before(source)
    cut = listed is not None and listed.origin == origin
    spans = listed.spans if listed is not None and cut else chunker.spans(text)
    passages = cut_text(source, text, spans)
    document = before if old == passages else None
    if document is None:
        document = catalogued.documents.cut(passages, source_id(source, catalogued.documents.namespace), any_length=cut)
    facts = {
        "spans": spans,
        "origin": origin,
        "pages": [outline.page(start) or 1 for start, _ in spans] if outline.pages else [],
        "headings": [outline.heading(start) for start, _ in spans] if outline.sections else [],
        "file": file,
    }
    kind = "unchanged" if old == passages else "changed" if listed is not None else "added"
    return Prepared(source, passages, metadata, facts, document, kind)


def cut_text(source: str, text: str, spans: Sequence[tuple[int, int]]) -> list[str]:
    """The passages of a document.

    Raises:
        DocumentError: there are none.
    """
    if not spans:
        raise DocumentError(f"{source}: no text in it")
    return [text[start:stop] for start, stop in spans]
