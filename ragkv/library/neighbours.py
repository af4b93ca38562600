"""What documents are read behind: the passages of others that are nearest to them (FusionRAG, arXiv:2601.12904).

A question finds passages that are alike, so what will stand in front of a passage is likely to be like its neighbours. A document's
own context is kept: neighbours stand before it, and before each window of a long one. They are read as text, one behind the other,
so that a chunk's KV are exact behind just these passages.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, islice

import numpy as np
from numpy.typing import NDArray

from ragkv.lazy import lazy
from ragkv.library.document import ChunkedDocument
from ragkv.library.documents import Documents
from ragkv.retrieval import Retriever, Snapshot
from ragkv.retrieval.records import Document

# More than are wanted, as a rule: some are of the document itself, or the same text.
_LOOK = 8


class Neighbours:
    """Finds a document's neighbours, in one snapshot.

    Args:
        retriever: searches.
        view: of its catalogue.
        namespace: whose documents.
    """

    def __init__(self, retriever: Retriever, view: Snapshot, namespace: str):
        self._retriever, self._view, self._namespace = retriever, view, namespace

    def behind(self, document: ChunkedDocument, listed: Document, documents: Documents, most: int) -> ChunkedDocument:
        """The document as it would be read behind its neighbours now.

        Args:
            document: as the model reads it.
            listed: the same in the catalogue.
            documents: read it; neighbours count in their ``document_tokens``.
            most: passages in front of each window, the nearest; those for which there is no room are left out.
        """
        fronts, ids = dict[int, list[tuple[int, ...]]](), list[int]()
        for first, group in groupby(range(len(document)) if most else (), lambda number: document.firsts[number]):
            numbers = list(group)
            front, own = list[tuple[int, ...]](), document.ids[first : numbers[-1] + 1]
            room = documents.document_tokens - sum(map(len, own))
            for passage_id in islice(self.of(listed, numbers), most):
                passage = documents.encoder.chunk(self._view.passage_text(passage_id))
                if len(passage) <= room:
                    front.append(passage)
                    ids.append(passage_id)
                    room -= len(passage)
            if front:
                fronts[first] = front
        return document.read_behind(fronts, tuple(dict.fromkeys(ids)))

    def of(self, listed: Document, numbers: list[int]) -> Iterator[int]:
        """The ids of passages of other documents, those nearest to the mean of some of its own first.

        No text twice, and none of its own.

        Args:
            listed: the document.
            numbers: of those of its passages whose mean it is.
        """
        look = _LOOK + len(listed.passage_ids)
        given, seen = 0, set(self._view.texts(listed))
        vector: NDArray[np.float32] = self._view.vectors(listed.passage_ids[number] for number in numbers).mean(0)
        while True:
            found = self._retriever.nearest(self._view, vector, look, self._among)
            for passage_id in found[given:]:
                text = self._view.passage_text(passage_id)
                if text not in seen:
                    seen.add(text)
                    yield passage_id
            if len(found) < look:
                return
            given, look = len(found), 2 * look

    @lazy
    def _among(self) -> list[int] | None:
        """The namespace's passages; None for all."""
        return self._view.passages_within(self._namespace)
