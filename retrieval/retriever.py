"""Embedder, index and catalogue as one: documents in, the nearest passages out."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ragkv.errors import (
    DocumentError,
    OfOneProcess,
    RagKVError,
    RetrievalError,
    checked_namespace,
    half_a_pair,
    instance,
    no_question,
)
from ragkv.retrieval.catalogue import Catalogue
from ragkv.retrieval.changes import checked_vectors
from ragkv.retrieval.copies import Indexes
from ragkv.retrieval.embedder import Embedder, offline_embedder
from ragkv.retrieval.found import Hits, Readings
from ragkv.retrieval.hit import Hit
from ragkv.retrieval.index import VectorIndex
from ragkv.retrieval.options import Retrieval
from ragkv.retrieval.records import Change, Reading, checked_document
from ragkv.retrieval.search import Search
from ragkv.retrieval.segments import SegmentedIndex
from ragkv.retrieval.snapshot import Snapshot

#: Told what would be found without the reranker, while that works.
First = Callable[[list[Hit]], object]

# A reranker that takes less is not worth telling of.
_WORTH_S = 1e-3

_LOG = logging.getLogger("ragkv.retrieval")
_EMBEDDER = "a ragkv.retrieval.Embedder, as SentenceTransformerEmbedder('name or path')"


class Retriever(OfOneProcess, instead="open its folder where it is needed, Retriever.open(path)"):
    """Finds passages by meaning. The catalogue is the truth; the index is a copy that follows it.

    When it is made, the index is read from the file beside the catalogue if that is whole and of the catalogue's
    state, and is else filled from the stored vectors: nothing is embedded again. Before each search it takes in what
    other processes have changed. Threads may share one object.

    Args:
        embedder: turns texts into vectors.
        index: searches them; empty, and of the embedder's dimension.
        catalogue: holds documents, passages and vectors. It is closed with the retriever.

    Raises:
        IncompatibleFolderError: the catalogue's vectors were made by another embedder.
        RetrievalError: the index has another dimension.
    """

    def __init__(self, embedder: Embedder, index: VectorIndex, catalogue: Catalogue) -> None:
        instance("embedder", embedder, Embedder, _EMBEDDER)
        instance("index", index, VectorIndex, "a ragkv.retrieval.VectorIndex, as FaissIndex(embedder.dimension)")
        instance("catalogue", catalogue, Catalogue, "a ragkv.retrieval.Catalogue, as Catalogue('documents/')")
        if index.dimension != embedder.dimension:
            raise RetrievalError(
                f"the index has dimension {index.dimension}, the embedder {embedder.name!r} {embedder.dimension}"
            )
        catalogue.require("embedder", embedder.fingerprint, embedder.name)
        self.embedder = embedder
        self.index = index
        self.catalogue = catalogue
        self._closed = False
        self._second_s = 0.0  # the reranker's, last time
        self._indexes = Indexes(catalogue, index)

    @classmethod
    def open(
        cls, path: str | os.PathLike[str] | None = None, embedder: Embedder | None = None, *, readonly: bool = False
    ) -> Retriever:
        """A retriever over a folder, with faiss, and with the offline embedder where none is given.

        Args:
            path: the folder, made if it is not there; None keeps nothing.
            embedder: turns texts into vectors.
            readonly: open the folder for reading only; it must be there.
        """
        embedder = offline_embedder() if embedder is None else embedder
        instance("embedder", embedder, Embedder, _EMBEDDER)
        catalogue = Catalogue(path, readonly=readonly)
        try:
            index = SegmentedIndex(embedder.dimension, None if catalogue.readonly else catalogue.path)
            return cls(embedder, index, catalogue)
        except BaseException:
            catalogue.close()
            raise

    def add(
        self,
        source: str,
        passages: list[str],
        metadata: dict[str, Any] | None = None,
        *,
        spans: Sequence[tuple[int, int]] = (),
        origin: str = "",
        pages: Sequence[int] = (),
        headings: Sequence[str] = (),
        file: str = "",
        reading: Reading | None = None,
        namespace: str = "",
    ) -> Change:
        """Adds a document, or replaces the one of the same source and namespace; embeds only texts that none of its documents has.

        Args:
            source, passages, metadata, spans, origin, pages, headings, file, reading: as of :meth:`Catalogue.put`.
            namespace: it is found only by those who search within it.

        Raises:
            DocumentError: the document cannot be stored as it is.
            RetrievalError: the embedder gave something else than a vector a text.
            StoreFullError: the disk is full; nothing was changed.
        """
        stands: dict[str, Any] = {"spans": spans, "pages": pages, "headings": headings}
        more: dict[str, Any] = {"origin": origin, "file": file, "reading": reading, "namespace": namespace}
        return self._indexes.apply(self.catalogue.put(source, passages, self._embed, metadata, **stands, **more))

    def add_many(
        self, documents: Iterable[tuple[str, list[str], dict[str, Any] | None]], namespace: str = ""
    ) -> list[Change]:
        """Adds documents, each as (source, passages, metadata), with one call of the embedder for all of them.

        Each document is one transaction, and none is begun where one of them cannot be stored as it is.
        """
        checked = [checked_document(*document) for document in _triples(documents)]
        checked_namespace(namespace)
        texts = dict.fromkeys(text for _, passages, _ in checked for text in passages)
        with self.catalogue.snapshot() as view:
            missing = [text for text in texts if not view.has_text(text, namespace)]
        vectors = dict(zip(missing, self._embed(missing), strict=True))

        def embed(texts: list[str]) -> NDArray[np.float32]:
            return np.stack([vectors[text] if text in vectors else self._embed([text])[0] for text in texts])

        return [
            self._indexes.apply(self.catalogue.put(source, texts, embed, extra, namespace=namespace))
            for source, texts, extra in checked
        ]

    def remove(self, source: str, namespace: str = "") -> Change:
        """Removes a document of a namespace with its passages and vectors.

        Raises:
            DocumentError: there is no such document.
        """
        return self._indexes.apply(self.catalogue.remove(source, namespace))

    def search(
        self,
        query: str,
        top_k: int | None = None,
        *,
        namespace: str = "",
        order: str = "retrieved",
        **options: Any,
    ) -> list[Hit]:
        """The passages for a question, all of one state of the catalogue.

        Args:
            query: a question, not blank.
            top_k: how many, at least 1; 5 by default. Fewer come back where there are fewer.
            namespace: whose documents.
            order: as of :class:`~ragkv.retrieval.Retrieval`; here the best come first, if nothing else is said.
            **options: of :class:`~ragkv.retrieval.Retrieval`: ``neighbours``, ``hybrid``, ``where``, ``hops``, ...

        Raises:
            RetrievalError: the question is blank, an option is out of range, or the embedder gave no vector.
            UnknownArgumentError: there is no such option.
        """
        retrieval = Retrieval.of(top_k=top_k, order=order, **options)
        return self.find(query, retrieval, namespace=namespace, distinct=False)

    def find(
        self,
        query: str,
        retrieval: Retrieval,
        *,
        namespace: str = "",
        readings: Readings | None = None,
        tokens: Callable[[Reading], Sequence[int]] | None = None,
        distinct: bool = True,
        first: First | None = None,
    ) -> list[Hit]:
        """As :meth:`search`, for a model: in the order of a prompt, and no text twice.

        Args:
            query: a question, not blank.
            retrieval: how.
            namespace: whose documents.
            readings: says how a model reads a document, for the hits; asked once for each.
            tokens: says how many tokens each passage of a reading has; without both ``max_context_tokens`` is refused.
            distinct: of passages of equal text give one, with the others in :attr:`Hit.copies`.
            first: told what would be found without the reranker, before that begins, if the last one took a millisecond or more.
        """
        if not isinstance(query, str) or not query.strip():
            raise RetrievalError(no_question(query))
        if half_a_pair(query):
            raise RetrievalError(f"a question must be valid Unicode, got half a surrogate pair: {query!a:.80}")
        checked_namespace(namespace)
        if retrieval.max_context_tokens is not None and (readings is None or tokens is None):
            raise RetrievalError("max_context_tokens needs a model that counts them: RAG.retrieve() has one")
        vector = self.embedder.encode_query(query)
        with self.catalogue.snapshot() as view:
            hits = Hits(view, retrieval, readings, tokens)

            def tell(found: dict[int, float]) -> None:
                assert first is not None
                with suppress(RagKVError):  # of what may not be found in the end
                    first(hits(found, {}))

            told = tell if first is not None and self._second_s >= _WORTH_S else None
            search = Search(retrieval, namespace, self.embedder, self._indexes, distinct, told)
            found = search(view, query, vector)
            self._second_s = search.second_s or self._second_s
            return hits(found, search.copies)

    def nearest(self, view: Snapshot, vector: NDArray[np.float32], k: int, among: list[int] | None = None) -> list[int]:
        """The ids of the k passages of a snapshot that are nearest to a vector, float32 ``[d]``; best first.

        Args:
            view: all is of its state.
            vector: of a text, or a mean of several.
            k: at least 1.
            among: ids of passages that may be found; ``None`` for all.
        """
        return list(self._indexes.search(view, "", vector, k, False, among)[0])

    def save(self) -> None:
        """Writes the index beside the catalogue, so that the next start need not fill it; :meth:`close` does so."""
        self._indexes.save()

    def close(self) -> None:
        """Saves the index, or warns that it cannot, and closes the catalogue. Closing twice is no error."""
        if self._closed:
            return
        self._closed = True
        try:
            self.save()
        except RetrievalError as error:  # a disk that is full, say: nothing is lost with it
            _LOG.warning("%s; the next start fills it again", error)
        finally:
            self._indexes.words.close()
            self.catalogue.close()

    def __enter__(self) -> Retriever:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _embed(self, texts: list[str]) -> NDArray[np.float32]:
        if not texts:
            return np.empty((0, self.embedder.dimension), np.float32)
        return checked_vectors(self.embedder.encode_documents(texts), len(texts), self.embedder.dimension)


def _triples(documents: Any) -> list[tuple[Any, Any, Any]]:
    triples = list(documents) if isinstance(documents, Iterable) else [documents]
    for triple in triples:
        if not isinstance(triple, tuple | list) or len(triple) != 3:
            raise DocumentError(f"documents must be a list of (source, passages, metadata), got {triple!r:.80}")
    return [(source, passages, metadata) for source, passages, metadata in triples]
