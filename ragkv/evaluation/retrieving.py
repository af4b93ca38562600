"""Passages for the questions of data that does not say what was retrieved, by the library's own retriever."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cache
from itertools import groupby

from ragkv.evaluation.cases import Case, Place, everything, narrowed
from ragkv.retrieval import Embedder, Retriever, offline_embedder


def retrieve(
    cases: Sequence[Case], top_k: int, *, pooled: bool = False, embedder: Embedder | None = None
) -> Iterator[Case]:
    """Cases with the passages that are found for their questions, by vectors and words, best first.

    Args:
        cases: those without question or answer, or with an empty passage, stay as they are.
        top_k: passages for each; a case that has no more keeps its own, in their order.
        pooled: look among the documents of all cases, instead of the case's own.
        embedder: the offline one by default.

    Raises:
        MissingPackageError: the offline embedder is not installed.
    """
    made = cache(lambda: embedder or offline_embedder())  # loaded once, and only where passages have to be chosen
    if pooled:
        number = {document: n for n, document in enumerate(dict.fromkeys(d for case in cases for d in case.documents))}
        pool = tuple(number)
        cases = [
            replace(
                case,
                documents=pool,
                retrieved=everything(pool),
                gold=tuple((number[case.documents[document]], chunk) for document, chunk in case.gold),
            )
            for case in cases
        ]
    for _, same in groupby(cases, key=lambda case: (case.documents, case.retrieved)):
        yield from _found(list(same), top_k, made)


def _found(cases: Sequence[Case], top_k: int, embedder: Callable[[], Embedder]) -> Iterator[Case]:
    """Cases that were given the same passages, with those that are found."""
    documents: dict[int, list[Place]] = {}
    for place in sorted(cases[0].retrieved):
        documents.setdefault(place[0], []).append(place)
    if len(cases[0].retrieved) <= top_k or not all(cases[0].text(place).strip() for place in cases[0].retrieved):
        yield from cases
        return
    with closing(Retriever.open(embedder=embedder())) as retriever:
        for document, places in documents.items():
            retriever.add(str(document), [cases[0].text(place) for place in places])
        for case in cases:
            if not (case.question.strip() and any(case.answers)):
                yield case
                continue
            hits = retriever.search(case.question, top_k, hybrid=True)
            yield narrowed(case, [documents[int(hit.source)][hit.position] for hit in hits])
