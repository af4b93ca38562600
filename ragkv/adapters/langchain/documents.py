"""Passages that were found as LangChain's documents, and documents as passages to hand over."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from langchain_core.documents import Document

from ragkv.adapters.found import FoundPassages
from ragkv.adapters.langchain.members import added_here, as_added, references
from ragkv.adapters.passages import REFERENCE, Passage, metadata_of, reference
from ragkv.engine import Engine
from ragkv.rag import RAG
from ragkv.retrieval import Hit


def document_of(hit: Hit) -> Document:
    """A passage that was found; its metadata are its document's, with source, page, heading, score and :data:`REFERENCE`."""
    said = hit.metadata
    if added_here(hit.source):
        said = as_added(hit.source, hit.metadata, hit.position, hit.text).metadata
    metadata = {**metadata_of(replace(hit, metadata=said)), "score": hit.score, REFERENCE: reference(hit)}
    return Document(id=f"{hit.source}#{hit.position}", page_content=hit.text, metadata=metadata)


def remember(rag: RAG, hits: Iterable[Hit]) -> None:
    """Let a chat model find in its messages what was found."""
    FoundPassages.of(rag.engine).leave(Passage(hit.text, hit.source, reference(hit)) for hit in hits)


def passages_of(documents: Sequence[Any], engine: Engine, namespace: str) -> list[Passage]:
    """What a retriever found, to be handed over to an engine; what is no document among it, as one without text."""
    found = [
        (getattr(one, "page_content", None), getattr(one, "metadata", None) or {}, getattr(one, "id", None))
        for one in documents
    ]
    # The vector store's documents come back as they went in: their ids say where they are, and their texts where a compressor
    # of LangChain's has lost the ids.
    places = references(engine, namespace, [name for _, said, name in found if name and REFERENCE not in said])
    lately = FoundPassages.of(engine)
    return [
        Passage(
            text,
            f"document {number} ({name or said.get('source') or 'without id'})",
            said.get(REFERENCE, places.get(str(name)) if name else lately.reference(text)),
        )
        for number, (text, said, name) in enumerate(found, 1)
    ]
