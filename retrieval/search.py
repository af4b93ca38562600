"""One search: candidates by meaning and words, ordered, cut, followed to a second hop, with their neighbours."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from copy import copy
from itertools import chain, islice
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from ragkv.retrieval import rerank
from ragkv.retrieval.copies import Indexes
from ragkv.retrieval.embedder import Embedder
from ragkv.retrieval.options import Retrieval
from ragkv.retrieval.ranking import fused, names
from ragkv.retrieval.snapshot import Snapshot
from ragkv.retrieval.where import admitted

# Where an order is made of others, it is made of more passages than are taken.
_CANDIDATES = 50


class Search:
    """Finds passages in one snapshot.

    Args:
        retrieval: how.
        namespace: whose documents.
        embedder: turns the question of a second hop into a vector.
        indexes: give candidates.
        distinct: find no text twice: the best passage of it stands for the others, and what is next best comes in their place.
        first: told what would be found without the reranker, before that begins; not where a second hop comes behind it.

    Attributes:
        copies: those others, by the passage that stands for them.
        second_s: seconds that the reranker took.
    """

    def __init__(
        self,
        retrieval: Retrieval,
        namespace: str,
        embedder: Embedder,
        indexes: Indexes,
        distinct: bool = False,
        first: Callable[[dict[int, float]], object] | None = None,
    ) -> None:
        self._retrieval, self._namespace = retrieval, namespace
        self._embedder, self._indexes = embedder, indexes
        self._distinct, self._first = distinct, first
        self.second_s: float = 0.0
        self._taken = dict[str, int]()  # by text
        self.copies: defaultdict[int, set[int]] = defaultdict(set)

    def __call__(self, view: Snapshot, question: str, vector: NDArray[np.float32]) -> dict[int, float]:
        """Passages by id with their scores: those that were found, best first, hop by hop; then their neighbours."""
        among = self._among(view)
        if among == []:
            return {}
        found = hop = self._hop(view, question, vector, among, {})
        for _ in range(1, self._retrieval.hops):
            query = self._next(view, question, hop)
            if query is None:
                break
            with view.outside():
                vector = self._embedder.encode_query(query)
            hop = self._hop(view, query, vector, among, self._spread(view, found))
            found = {**found, **hop}
        return self._spread(view, found)

    def _among(self, view: Snapshot) -> list[int] | None:
        """The ids of passages that may be found; None for all."""
        where, namespace = self._retrieval.where, self._namespace
        if where is None:
            return view.passages_within(namespace)
        return list(chain.from_iterable(map(admitted(where), view.documents(namespace))))

    def _hop(
        self,
        view: Snapshot,
        query: str,
        vector: NDArray[np.float32],
        among: list[int] | None,
        before: dict[int, float],
    ) -> dict[int, float]:
        """The best passages that were not found before, with their scores."""
        retrieval, taken = self._retrieval, dict(self._taken)
        least = -math.inf if retrieval.min_score is None else retrieval.min_score
        if retrieval.rerank is None:
            found = self._first_stage(view, query, vector, among, before, taken, retrieval.limit, least)
        else:
            candidates = self._first_stage(view, query, vector, among, before, taken, self._depth, -math.inf)
            said = self._reranked(view, query, candidates) if candidates else []
            pairs = sorted(zip(candidates, said, strict=True), key=lambda pair: -pair[1])
            found = dict(islice((pair for pair in pairs if pair[1] >= least), retrieval.limit))
        self._taken.update((text, each) for text, each in taken.items() if each in found)
        return found

    def _reranked(self, view: Snapshot, query: str, candidates: dict[int, float]) -> list[float]:
        texts = list(map(view.passage_text, candidates))
        if self._first is not None and self._retrieval.hops == 1:
            found = dict(islice(candidates.items(), self._retrieval.limit))
            alone = copy(self)  # what it takes along is no copy of what is found in the end
            alone._taken, alone.copies = dict(zip(texts, found, strict=False)), defaultdict(set)
            self._first(alone._spread(view, found))
        begin = perf_counter()
        with view.outside():  # it may ask the engine, which may wait for whoever waits for this snapshot
            said = rerank.scores(self._retrieval.rerank, query, texts)
        self.second_s += perf_counter() - begin
        return said

    @property
    def _depth(self) -> int:
        """How many candidates are looked at."""
        retrieval = self._retrieval
        ordered = retrieval.hybrid or retrieval.rerank is not None
        return max(_CANDIDATES, 4 * retrieval.limit) if ordered else retrieval.limit

    def _first_stage(
        self,
        view: Snapshot,
        query: str,
        vector: NDArray[np.float32],
        among: list[int] | None,
        before: dict[int, float],
        taken: dict[str, int],
        most: int,
        least: float,
    ) -> dict[int, float]:
        """Candidates that were not found before and score no less than ``least``, the best first, ``most`` of them.

        Where copies leave fewer than are to be found, it is looked deeper.
        """
        retrieval, look = self._retrieval, self._depth + len(before)
        while True:
            near, worded = self._indexes.search(view, query, vector, look, retrieval.hybrid, among)
            ids = fused([list(near), worded]) if retrieval.hybrid else near
            scored = (
                (each, near[each] if each in near else float(view.vector(each) @ vector))
                for each in ids
                if each not in before
            )
            good = (pair for pair in scored if pair[1] >= least)
            found = dict(islice(self._each_once(view, good, taken), most))
            if len(found) >= retrieval.limit or len(near) < look or min(near.values()) < least:
                return found
            look *= 2

    def _each_once(
        self, view: Snapshot, pairs: Iterable[tuple[int, float]], taken: dict[str, int]
    ) -> Iterator[tuple[int, float]]:
        """Passages with their scores, without copies of those that were taken, which are noted; the others are taken."""
        for each, score in pairs:
            first = taken.setdefault(view.passage_text(each), each) if self._distinct else each
            if first == each:
                yield each, score
            else:
                self.copies[first].add(each)

    def _next(self, view: Snapshot, question: str, hop: dict[int, float]) -> str | None:
        """The question with the names that stand in what was found of the best document; None where there are none."""
        passages = [view.passage(each) for each in self._spread(view, hop)]
        texts = [passage.text for passage in passages if passage.document == passages[0].document]
        found = names(texts, question)
        return f"{question} {' '.join(found)}" if found else None

    def _spread(self, view: Snapshot, found: dict[int, float]) -> dict[int, float]:
        """With the neighbours of each passage behind all of them, each with the score of its passage."""
        spread, reach = dict(found), self._retrieval.neighbours
        for passage_id, score in found.items() if reach else ():
            passage = view.passage(passage_id)
            first = max(0, passage.position - reach)
            beside = ((each, score) for each in passage.document.passage_ids[first : passage.position + reach + 1])
            for each, _ in self._each_once(view, beside, self._taken):
                spread.setdefault(each, score)
        return spread
