"""Passages for a question, as the model reads them: found, put in order, and without those that are too long for it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ragkv.answering import AnswerStream
from ragkv.chunk import Chunk
from ragkv.errors import PromptTooLongError, RagKVError, RetrievalError
from ragkv.library.catalogued import CataloguedDocuments
from ragkv.library.documents import Documents
from ragkv.library.rates import to_fetch
from ragkv.library.watching import Tell, prefetched, told_of_hits
from ragkv.methods import FullPrefill, Method
from ragkv.report import Answer
from ragkv.retrieval import Hit, Retrieval, Retriever
from ragkv.store import Moved

logger: logging.Logger = logging.getLogger(__name__)


class Found(NamedTuple):
    """What was found for a question.

    Attributes:
        hits: the passages in the order of the prompt.
        chunks: theirs.
        left_out: passages that are longer than the model reads at once.
    """

    hits: list[Hit]
    chunks: list[Chunk]
    left_out: list[Hit]

    def ranks(self, placed: Sequence[Chunk]) -> str:
        """Where these passages stand among those of a prompt, from 1, the most relevant first: ``"3, 1, 2"``."""
        places = {chunk.ids: place for place, chunk in enumerate(placed, 1)}
        best_first = sorted(zip(self.hits, self.chunks, strict=True), key=lambda pair: pair[0].rank)
        return ", ".join(str(places[chunk.ids]) for _, chunk in best_first if chunk.ids in places)


@dataclass
class SourcedAnswer(Answer):
    """An answer with the passages that it was given.

    Attributes:
        sources: the passages in the order of the prompt; one stands for others of the same text (:attr:`Hit.copies`).
        left_out: passages that were found and are longer than the model reads at once, so that it did not see them.
    """

    sources: list[Hit] = field(default_factory=list)
    left_out: list[Hit] = field(default_factory=list)

    @classmethod
    def of(cls, answer: Answer, found: Found) -> SourcedAnswer:
        """An answer over what was found."""
        return cls(**vars(answer), sources=_shown(found.hits), left_out=_shown(found.left_out))


class Finder:
    """Finds passages.

    Args:
        retriever: searches.
        documents: of the engine.
    """

    def __init__(self, retriever: Retriever, documents: Documents):
        self._retriever, self._documents = retriever, documents
        self.catalogued()

    def catalogued(self, documents: Documents | None = None) -> CataloguedDocuments:
        """The catalogue's documents as the model reads them, in some namespace and behind some anchor; the engine's by default."""
        documents = documents or self._documents
        known = (kept for kept in documents.records if isinstance(kept, CataloguedDocuments))
        own = next((kept for kept in known if kept.retriever is self._retriever), None)
        return CataloguedDocuments(self._retriever, documents) if own is None else own

    def close(self) -> None:
        """The engine's documents know of the catalogue no more. Closing twice is fine."""
        for documents in self._documents.everywhere():
            self.catalogued(documents).close()

    def read(self, hits: list[Hit], documents: Documents | None = None, known: Method | None = None) -> Found:
        """Hits of :meth:`found`'s search with their chunks, and those that are too long for the model.

        Args:
            hits: in the order of the prompt.
            documents: as for :meth:`found`.
            known: put first what was computed before, by this method or exactly.
        """
        fits = self._documents.fits
        pairs = list(zip(hits, self.catalogued(documents).chunks(hits), strict=True))
        fitting = [pair for pair in pairs if fits(pair[1])]
        if known is not None:
            fitting = [fitting[number] for number in self._order([chunk for _, chunk in fitting], documents, known)]
        return Found(
            [hit for hit, _ in fitting],
            [chunk for _, chunk in fitting],
            [hit for hit, chunk in pairs if not fits(chunk)],
        )

    def found(
        self,
        text: str,
        retrieval: Retrieval,
        documents: Documents | None = None,
        first: Callable[[list[Hit]], object] | None = None,
        method: Method | None = None,
    ) -> Found:
        """Passages with their chunks, and those that are too long for the model: cut, that is, for one that reads more at once.

        Args:
            text: what to look for.
            retrieval: how.
            documents: in which namespace and behind which anchor they are read; the engine's by default.
            first: as for :meth:`ragkv.retrieval.Retriever.find`.
            method: that puts them together, where their order is to go by what it computed before.

        Raises:
            RagKVError: there are no documents.
            RetrievalError: there are, and none of their passages was found.
            PromptTooLongError: all passages found are too long for the model.
        """
        catalogued, namespace = self.catalogued(documents), (documents or self._documents).namespace
        hits = catalogued.search(text, retrieval, first)
        if not hits and self._retriever.catalogue.documents(namespace):
            narrowing = {name: getattr(retrieval, name) for name in ("where", "min_score", "max_context_tokens")}
            said = ", ".join(f"{name}={value!r}" for name, value in narrowing.items() if value is not None)
            raise RetrievalError(f"no passage was found with {said or retrieval}")
        if not hits:
            within = f" in namespace {namespace!r}" if namespace else ""
            raise RagKVError(f"there are no documents{within} yet: add some with add_texts() or add_files()")
        found = self.read(hits, documents, known(retrieval, method))
        if found.left_out:
            lengths = map(len, catalogued.chunks(found.left_out))
            names = ", ".join(
                f"passage {hit.position + 1} of {hit.source} ({tokens} tokens)"
                for hit, tokens in zip(found.left_out, lengths, strict=True)
            )
            said = f"longer than the {self._documents.document_tokens} tokens that this model reads at once: {names}"
            if not found.hits:
                raise PromptTooLongError(
                    f"all passages found are {said}; add the documents to a folder of this model's own"
                )
            logger.warning("left out of the prompt, %s", said)
        return found

    def _order(self, chunks: Sequence[Chunk], documents: Documents | None, method: Method) -> Sequence[int]:
        documents = documents or self._documents
        if documents.paths is None:
            return range(len(chunks))
        encoder = documents.encoder
        prefix = documents.anchor if encoder.template.anchor is None else encoder.prefix
        return documents.paths.order(documents, documents.reader, prefix, chunks, method)


def known(retrieval: Retrieval, method: Method | None) -> Method | None:
    """Whose work is to go first in a prompt; ``None`` where another order is asked for."""
    return (method or FullPrefill()) if retrieval.order == "cache" else None


def streamed(
    found: Found,
    documents: Documents,
    tell: Tell | None,
    begin: Callable[[], AnswerStream],
    moved: dict[bytes, Moved] | None = None,
) -> tuple[list[Hit], AnswerStream]:
    """The passages, and an answer over them that begins when its first piece is asked for; their KV are fetched meanwhile.

    Args:
        found: for the question.
        documents: that keep the KV.
        tell: told of what is read.
        begin: makes the stream.
        moved: what was fetched before.
    """
    moved = {} if moved is None else moved
    documents.store.prefetch(to_fetch(documents, list(documents.keys(found.chunks))), moved)
    with told_of_hits(tell, found.hits), prefetched(moved):
        pieces = begin()
    pieces.sources, pieces.left_out = _shown(found.hits), _shown(found.left_out)
    return pieces.sources, pieces


def _shown(hits: Sequence[Hit]) -> list[Hit]:
    """Hits as sources, without how the model reads their documents."""
    return [replace(hit, reading=None) for hit in hits]
