"""Haystack's documents and our passages, one as the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from haystack import Document
from haystack.utils.filters import document_matches_filter

from ragkv.adapters.passages import REFERENCE, Passage, metadata_of, reference
from ragkv.errors import ArgumentError, instance
from ragkv.retrieval import Document as Listed
from ragkv.retrieval import Hit

_NOT_META = {field.name for field in fields(Document)} - {"meta"}


def document_of(hit: Hit) -> Document:
    """A passage as a document that refers to it; its metadata are its document's, with source, page and heading."""
    meta = {**metadata_of(hit), REFERENCE: reference(hit)}
    return Document(id=f"{hit.document_id}:{hit.position}", content=hit.text, meta=meta, score=hit.score)


def passage_of(document: Document) -> Passage:
    """What a model is shown of a document that was found, with its reference if it has one."""
    return Passage(document.content, f"document {document.id}", (document.meta or {}).get(REFERENCE))


def fitting(filters: dict[str, Any]) -> Callable[[Listed], bool]:
    """Haystack's filters as a condition on the folder's documents: on their metadata, and ``source``.

    Raises:
        ArgumentError: they are on something else, a passage's text say; when it is asked: on the passages' pages or headings.
        ArgumentTypeError: they are no dict.
    """
    instance("filters", filters, Mapping, "a dict, as Haystack has it")
    names = _names(filters)
    wrong = sorted({name for name in names if name.partition(".")[0] in _NOT_META})
    if wrong:
        raise ArgumentError(f"filters must be on meta, as 'meta.source', got {', '.join(wrong)}")
    asked = {name.removeprefix("meta.") for name in names}

    def fits(listed: Listed) -> bool:
        for name, shown in (("page", listed.pages), ("heading", listed.headings)):
            if shown and name in asked and name not in listed.metadata:
                raise ArgumentError(
                    f"filters say which documents may be found: {name} is a passage's, as in {listed.source} "
                    f"(retrieval={{'where': {{'{name}': ...}}}} may name it)"
                )
        return document_matches_filter(filters, Document(meta={"source": listed.source, **listed.metadata}))

    return fits


def _names(filters: Any) -> list[str]:
    """The fields that filters look at."""
    if not isinstance(filters, Mapping):
        return []
    own = [filters["field"]] if isinstance(filters.get("field"), str) else []
    inner = filters.get("conditions")
    return [*own, *(name for each in inner for name in _names(each))] if isinstance(inner, list) else own
