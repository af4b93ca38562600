"""Haystack's documents and our passages, one as the other."""

from __future__ import annotations

from haystack import Document

from ragkv.adapters.passages import REFERENCE, Passage, reference
from ragkv.retrieval import Hit


def document_of(hit: Hit) -> Document:
    """A passage as a document that refers to it; its metadata are those of the document that it is of."""
    meta = {"source": hit.source, **hit.metadata, REFERENCE: reference(hit)}
    return Document(id=f"{hit.document_id}:{hit.position}", content=hit.text, meta=meta, score=hit.score)


def passage_of(document: Document) -> Passage:
    """What a model is shown of a document that was found, with its reference if it has one."""
    return Passage(document.content, f"document {document.id}", (document.meta or {}).get(REFERENCE))
