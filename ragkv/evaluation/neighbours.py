"""What documents are read behind in the arms ``@neighbours``: the passages of others that are nearest to them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice

from ragkv.evaluation.cases import Case
from ragkv.library.neighbours import Neighbours
from ragkv.retrieval import Embedder, Retriever, offline_embedder

#: Passages in front of each document, as in the paper (arXiv:2601.12904).
MOST = 2


def with_neighbours(cases: Sequence[Case], embedder: Embedder | None = None) -> list[Case]:
    """Cases whose documents have neighbours among the documents of all of them, as in a folder that holds them all.

    Args:
        cases: a document with an empty passage has no neighbours.
        embedder: the offline one by default.

    Raises:
        MissingPackageError: the offline embedder is not installed.
    """
    documents = dict.fromkeys(document for case in cases for document in case.documents)
    names = {
        document: str(number) for number, document in enumerate(documents) if document and all(map(str.strip, document))
    }
    behind = dict[tuple[str, ...], tuple[str, ...]]()
    with closing(Retriever.open(embedder=embedder or offline_embedder())) as retriever:
        retriever.add_many([(name, list(document), None) for document, name in names.items()])
        with retriever.catalogue.snapshot() as view:
            neighbours = Neighbours(retriever, view, "")
            for document, name in names.items():
                listed = view.get(name)
                assert listed is not None
                found = neighbours.of(listed, list(range(len(document))))
                behind[document] = tuple(map(view.passage_text, islice(found, MOST)))
    return [replace(case, behind=tuple(behind.get(document, ()) for document in case.documents)) for case in cases]
