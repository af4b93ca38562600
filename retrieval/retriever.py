"""Embedder, index and catalogue as one: documents in, the nearest passages out."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ragkv.errors import DocumentError, RagKVError, RecordError, RetrievalError, instance, no_question
from ragkv.retrieval.catalogue import Catalogue
from ragkv.retrieval.copies import INDEX_FILE, WORDS_FILE
from ragkv.retrieval.embedder import Embedder, offline_embedder
from ragkv.retrieval.found import Hits, Readings
from ragkv.retrieval.hit import Hit
from ragkv.retrieval.index import VectorIndex
from ragkv.retrieval.options import Retrieval
from ragkv.retrieval.records import Change, Reading, checked_document
from ragkv.retrieval.search import Search
from ragkv.retrieval.segments import SegmentedIndex
from ragkv.retrieval.snapshot import Snapshot
from ragkv.retrieval.words import WordIndex

_LOG = logging.getLogger("ragkv.retrieval")

#: Told what would be found without the reranker, while that works.
First = Callable[[list[Hit]], object]

# A reranker that takes less is not worth telling of.
_WORTH_S = 1e-3

_EMBEDDER = "a ragkv.retrieval.Embedder, as SentenceTransformerEmbedder('name or path')"


class Retriever:
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
        self._lock = threading.RLock()
        self._words = WordIndex(None if catalogue.temporary or catalogue.readonly else catalogue.path / WORDS_FILE)
        self._closed = False
        self._second_s = 0.0  # the reranker's, last time
        self._saved = self._state = self._restored()
        with self._lock, catalogue.snapshot() as view:
            self._follow(view)

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
        embedder = embedder or offline_embedder()
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
            source: what the document is called: a path, a URL, any name.
            passages: its texts in order, none blank.
            metadata: anything that JSON can hold.
            spans, origin, pages, headings, file: see :class:`~ragkv.retrieval.Document`.
            reading: how a model reads it.
            namespace: it is found only by those who search within it.

        Raises:
            DocumentError: the document cannot be stored as it is.
            RetrievalError: the embedder gave something else than a vector a text.
            StoreFullError: the disk is full; nothing was changed.
        """
        more: dict[str, Any] = {
            "spans": spans,
            "origin": origin,
            "pages": pages,
            "headings": headings,
            "file": file,
            "reading": reading,
            "namespace": namespace,
        }
        return self._applied(self.catalogue.put(source, passages, self._embed, metadata, **more))

    def add_many(
        self, documents: Iterable[tuple[str, list[str], dict[str, Any] | None]], namespace: str = ""
    ) -> list[Change]:
        """Adds documents, each as (source, passages, metadata), with one call of the embedder for all of them.

        Each document is one transaction, and none is begun where one of them cannot be stored as it is.
        """
        checked = [checked_document(*document) for document in _triples(documents)]
        texts = dict.fromkeys(text for _, passages, _ in checked for text in passages)
        with self.catalogue.snapshot() as view:
            missing = [text for text in texts if not view.has_text(text, namespace)]
        vectors = dict(zip(missing, self._embed(missing), strict=True))

        def embed(texts: list[str]) -> NDArray[np.float32]:
            return np.stack([vectors[text] if text in vectors else self._embed([text])[0] for text in texts])

        return [
            self._applied(self.catalogue.put(source, texts, embed, extra, namespace=namespace))
            for source, texts, extra in checked
        ]

    def remove(self, source: str, namespace: str = "") -> Change:
        """Removes a document of a namespace with its passages and vectors.

        Raises:
            DocumentError: there is no such document.
        """
        return self._applied(self.catalogue.remove(source, namespace))

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
        if any("\ud800" <= letter <= "\udfff" for letter in query):
            raise RetrievalError(f"a question must be valid Unicode, got half a surrogate pair: {query!a:.80}")
        instance("namespace", namespace, str, "a str")
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
            search = Search(retrieval, namespace, self.embedder, self._candidates, distinct, told)
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
        return list(self._candidates(view, "", vector, k, False, among)[0])

    def _candidates(
        self, view: Snapshot, query: str, vector: NDArray[np.float32], k: int, words: bool, among: list[int] | None
    ) -> tuple[dict[int, float], list[int]]:
        """See :class:`~ragkv.retrieval.search.Candidates`."""
        with self._lock:
            self._follow(view)
            try:
                ids, scores = self._nearest(vector, k, among)
            except RecordError as error:
                _LOG.warning("the index is filled again from the stored vectors: %s", error)
                self.index.clear()
                self._state = ""
                self._follow(view)
                ids, scores = self._nearest(vector, k, among)
            near = dict(zip(ids.tolist(), scores.tolist(), strict=True))
            return near, self._words.search(view, query, k, among) if words else []

    def _nearest(
        self, vector: NDArray[np.float32], k: int, among: list[int] | None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        return self.index.search(vector, k) if among is None else self.index.search(vector, k, among)

    def save(self) -> None:
        """Writes the index beside the catalogue, so that the next start need not fill it; :meth:`close` does so."""
        with self._lock, self.catalogue.snapshot() as view:
            self._follow(view)
            if self._saved != self._state and not (self.catalogue.temporary or self.catalogue.readonly):
                self.index.save(self.catalogue.path / INDEX_FILE, self._state)
                self._saved = self._state

    def close(self) -> None:
        """Saves the index and closes the catalogue. Closing twice is no error."""
        if self._closed:
            return
        self._closed = True
        try:
            self.save()
        finally:
            self._words.close()
            self.catalogue.close()

    def __enter__(self) -> Retriever:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _restored(self) -> str:
        """The state of the saved index, now in memory; empty where there is none that fits."""
        path = self.catalogue.path / INDEX_FILE
        self.index.clear()
        if not path.exists():
            return ""
        try:
            state = self.index.load(path)
        except RecordError as error:
            _LOG.warning("the index is filled again from the stored vectors: %s", error)
            self.index.clear()
            return ""
        if state != self.catalogue.state:
            # Its ids may be of a history that is not the catalogue's, as after a backup was put back.
            self.index.clear()
            return ""
        return state

    def _applied(self, change: Change) -> Change:
        """The change, made in the index too where nothing else has happened in between."""
        before, after = change.states
        with self._lock, self.catalogue.snapshot() as view:
            if before == self._state and after == view.state:
                self._state = ""
                self.index.remove(change.removed)
                if change.new:
                    self.index.add(change.new, view.vectors(change.new))
                self._state = after
        return change

    def _follow(self, view: Snapshot) -> None:
        """Brings the index to the state of a snapshot. An id's vector never changes, so ids say it all."""
        state = view.state
        if state == self._state:
            return
        self._state = ""  # until it is done: what fails half-way is of no state
        wanted, present = view.passage_ids(), self.index.ids()
        self.index.remove(np.setdiff1d(present, wanted))
        new = np.setdiff1d(wanted, present)
        for at in range(0, len(new), 4096):
            self.index.add(new[at : at + 4096], view.vectors(new[at : at + 4096]))
        self._state = state

    def _embed(self, texts: list[str]) -> NDArray[np.float32]:
        if not texts:
            return np.empty((0, self.embedder.dimension), np.float32)
        vectors = np.asarray(self.embedder.encode_documents(texts), np.float32)
        if vectors.shape != (len(texts), self.embedder.dimension):
            raise RetrievalError(
                f"the embedder {self.embedder.name!r} must give vectors of shape "
                f"[{len(texts)}, {self.embedder.dimension}], got {vectors.shape}"
            )
        return vectors


def _triples(documents: Any) -> list[tuple[Any, Any, Any]]:
    triples = list(documents) if isinstance(documents, Iterable) else [documents]
    for triple in triples:
        if not isinstance(triple, tuple | list) or len(triple) != 3:
            raise DocumentError(f"documents must be a list of (source, passages, metadata), got {triple!r:.80}")
    return [(source, passages, metadata) for source, passages, metadata in triples]
