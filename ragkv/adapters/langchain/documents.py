"""Passages that were found as LangChain's documents, and documents as passages to hand over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from langchain_core.documents import Document

from ragkv.adapters.found import FoundPassages
from ragkv.adapters.passages import REFERENCE, Passage, metadata_of, only_passage, reference
from ragkv.errors import ArgumentTypeError
from ragkv.rag import RAG
from ragkv.retrieval import Hit

#: What documents of the vector store are called in their folder, in front of their ids.
ADDED = "langchain:"


def document_of(hit: Hit) -> Document:
    """A passage that was found; its metadata are its document's, with source, page, heading, score and :data:`REFERENCE`."""
    metadata = {**metadata_of(hit), "score": hit.score, REFERENCE: reference(hit)}
    return Document(id=f"{hit.source}#{hit.position}", page_content=hit.text, metadata=metadata)


def remember(rag: RAG, hits: Iterable[Hit]) -> None:
    """Let a chat model find in its messages what was found."""
    FoundPassages.of(rag.engine).leave(Passage(hit.text, hit.source, reference(hit)) for hit in hits)


def passages_of(documents: Any) -> list[Passage]:
    """What a retriever found, to be handed over.

    Raises:
        ArgumentTypeError: it is no list.
    """
    if isinstance(documents, str | bytes | Mapping) or not isinstance(documents, Iterable):
        raise ArgumentTypeError(f"a retriever must give a list of documents, got {documents!r:.80}")
    return [_passage(number, document) for number, document in enumerate(documents)]


def _passage(number: int, document: Any) -> Passage:
    metadata, name = getattr(document, "metadata", None) or {}, getattr(document, "id", None)
    said = metadata.get(REFERENCE)
    if said is None and name:  # the vector store's documents come back as they went in: their ids say where they are
        said = only_passage(f"{ADDED}{name}")
    called = f"document {number + 1} ({name or metadata.get('source') or 'without id'})"
    return Passage(getattr(document, "page_content", None), called, said)
