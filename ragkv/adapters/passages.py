"""Passages that a framework hands over become the engine's chunks: what all adapters share. Knows no framework."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ragkv.chunk import Chunk
from ragkv.engine import Engine
from ragkv.errors import ArgumentTypeError, PromptError, instance, listable
from ragkv.finding import Finder
from ragkv.library.catalogued import CataloguedDocuments
from ragkv.library.documents import Documents
from ragkv.rag import RAG
from ragkv.retrieval import Hit

logger: logging.Logger = logging.getLogger(__name__)

#: Where a passage's metadata keep its :func:`reference`.
REFERENCE = "ragkv"


class Passage(NamedTuple):
    """A passage that a framework hands over.

    Attributes:
        text: what it says.
        name: what it is called in messages.
        reference: of :func:`reference`, if it has one; anything else counts as none.
    """

    text: Any
    name: str = "a passage"
    reference: Any = None


class HandedOver(NamedTuple):
    """What became of passages.

    Attributes:
        chunks: in the order of the passages.
        numbers: of each chunk, the number of its passage.
        left_out: by its number, why a passage has no chunk.
    """

    chunks: list[Chunk]
    numbers: list[int]
    left_out: dict[int, str]


def reference(hit: Hit) -> dict[str, Any]:
    """Where a passage stands, as JSON can hold it: the id of its document, and its place among the document's passages."""
    return {"document": hit.document_id, "passage": hit.position}


def metadata_of(hit: Hit) -> dict[str, Any]:
    """What frameworks are told of a passage: its source, page and heading where it has any, the sources of those of the same text
    that it stands for, and its document's metadata.
    """
    copies = [copy.source for copy in hit.copies]
    where = {"source": hit.source, "page": hit.page, "heading": hit.heading or None, "copies": copies or None}
    return {**{name: value for name, value in where.items() if value is not None}, **hit.metadata}


def engine_of(rag: RAG | Engine) -> Engine:
    """The engine that answers.

    Raises:
        ArgumentTypeError: it is neither.
    """
    instance("rag", rag, RAG | Engine, "a ragkv.RAG or a ragkv.Engine")
    return rag.engine if isinstance(rag, RAG) else rag


def all_of(given: Any, kind: type, must: str) -> list[Any]:
    """What is to be handed over, as a list: an iterator gives it only once.

    Args:
        given: any number of them.
        kind: of each.
        must: what they must be, for the error.

    Raises:
        ArgumentTypeError: it cannot be gone through, or there is something else in it.
    """
    if not listable(given):
        raise ArgumentTypeError(f"{must}, got {given!r:.80}")
    items = list(given)
    for item in items:
        if not isinstance(item, kind):
            raise ArgumentTypeError(f"{must}, got {item!r:.80} among them")
    return items


def documents_of(engine: Engine, options: Mapping[str, Any]) -> Documents:
    """Where the passages of an answer stand.

    Args:
        engine: answers.
        options: of :meth:`ragkv.Engine.generate`, ``system``, ``namespace`` and ``past`` among them.
    """
    return engine.prompting.documents_for(options.get("system"), options.get("namespace"), options.get("past"))


def hand_over(engine: Engine, passages: Iterable[Passage], documents: Documents | None = None) -> HandedOver:
    """Passages as chunks; nothing is read yet.

    One with a reference is a chunk in the context of its document, and is not tokenised, where a folder of the engine's has
    just this text in this place: ids and KV are the engine's own, whoever wrote the reference. All others stand alone. What
    the store lacks is read when the prompt is made, and kept.

    Args:
        engine: whose chunks they become.
        passages: in the order of the prompt. One that is no text, or blank, or too long for the model, is left out with a warning.
        documents: where they are read, with a system message or in a namespace (:func:`documents_of`); the engine's own by default.

    Raises:
        PromptError: there are passages, and all of them had to be left out.
    """
    given = list(passages)
    known = known_chunks(engine, given, documents)
    chunks, numbers, left_out = list[Chunk](), list[int](), dict[int, str]()
    for number, passage in enumerate(given):
        try:
            chunk = known.get(number) or _alone(engine, passage.text)
        except PromptError as error:
            left_out[number] = str(error)
        else:
            chunks.append(chunk)
            numbers.append(number)
    said = "; ".join(f"{given[number].name}: {reason}" for number, reason in left_out.items())
    if left_out and not chunks:
        raise PromptError(f"none of the {len(given)} passages can be given to the model: {said}")
    if left_out:
        logger.warning("left out of the prompt: %s", said)
    return HandedOver(chunks, numbers, left_out)


def known_chunks(engine: Engine, passages: Sequence[Passage], documents: Documents | None = None) -> dict[int, Chunk]:
    """The chunks of those passages that a folder of the engine's has in the place of their reference, by number."""
    places = {number: _place(passage) for number, passage in enumerate(passages)}
    wanted = {number: place for number, place in places.items() if place is not None}
    chunks: dict[int, Chunk] = {}
    for folder in [records for records in engine.documents.records if isinstance(records, CataloguedDocuments)]:
        read = Finder(folder.retriever, engine.documents).catalogued(documents)
        hits = read.at({number: place for number, place in wanted.items() if number not in chunks})
        found = zip(hits, read.chunks(list(hits.values())), strict=True)
        chunks |= {number: chunk for number, chunk in found if engine.documents.fits(chunk)}
    return chunks


def _alone(engine: Engine, text: Any) -> Chunk:
    if not isinstance(text, str) or not text.strip():
        raise PromptError(f"it must have text that is not blank, got {text!r:.60}")
    return engine.documents.passage(text)


def _place(passage: Passage) -> tuple[str, int, str] | None:
    """Document, passage and text, where the reference may be one."""
    if not isinstance(passage.reference, Mapping) or not isinstance(passage.text, str):
        return None
    document, number = passage.reference.get("document"), passage.reference.get("passage")
    if not isinstance(document, str) or not isinstance(number, int) or isinstance(number, bool):
        return None
    return document, number, passage.text
