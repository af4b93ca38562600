"""Documents brought up to date: each behind the passages that are its neighbours now, and what KV are missing are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ragkv.library.catalogued import CataloguedDocuments
from ragkv.library.differing import described
from ragkv.library.document import ChunkedDocument
from ragkv.library.neighbours import Neighbours
from ragkv.library.sizes import check_room
from ragkv.library.watching import Progress, Tell, told
from ragkv.retrieval import Document


class Due(NamedTuple):
    """What a document needs.

    Attributes:
        listed: the document.
        tokens: that the model runs for it.
        stored_tokens: whose KV are stored by it.
        behind: what it is to be read behind: as of :class:`ChunkedDocument`; ``None`` where that stays.
    """

    listed: Document
    tokens: int
    stored_tokens: int
    behind: tuple[Mapping[int, Sequence[tuple[int, ...]]], tuple[int, ...]] | None


def due(catalogued: CataloguedDocuments, listed: Sequence[Document], most: int, tell: Tell | None) -> list[Due]:
    """What documents need; nothing is read, and only records that had to be made are kept.

    Args:
        catalogued: has them.
        listed: which.
        most: passages that each is to be read behind, of those nearest to it.
        tell: told of each.
    """
    found, total = list[Due](), 0
    documents, retriever = catalogued.documents, catalogued.retriever
    for each in listed:
        with retriever.catalogue.snapshot() as view:
            document = ChunkedDocument.from_bytes(catalogued.read(view, each).record)
            now = Neighbours(retriever, view, documents.namespace).behind(document, each, documents, most)
        missing = documents.missing(list(filter(documents.fits, now)))
        behind = None if now is document else (now.fronts, now.behind)
        found.append(Due(each, documents.work(missing), sum(map(len, missing)), behind))
        total += found[-1].tokens
        if tell is not None:
            tell(Progress(each.source, "found", 0, total, done_documents=len(found), documents=len(listed)))
    catalogued.keep_made()
    return found


def bring_up(
    catalogued: CataloguedDocuments,
    work: Sequence[Due],
    tell: Tell | None,
    reasons: Mapping[str, str] | None = None,
) -> int:
    """Do what :func:`due` found; returns the tokens that were read.

    Args:
        catalogued, work, tell: as there.
        reasons: why documents are read, by source, where not because KV are missing or neighbours are others.

    Raises:
        StoreFullError: as for :meth:`ragkv.RAG.add_texts`.
    """
    documents, total = catalogued.documents, sum(each.tokens for each in work)
    size = check_room(documents, sum(each.stored_tokens for each in work))
    if work:
        catalogued.retriever.catalogue.keep_read_with(described(documents))
    done = read = 0
    for each in work:
        source = each.listed.source
        reason = (reasons or {}).get(source, "missing" if each.behind is None else "neighbours")
        with told(tell, source, reason, done, total, size):
            if each.behind is not None:
                catalogued.read_behind(each.listed.id, *each.behind)
            read += documents.add(catalogued.now(each.listed.id))
        done += each.tokens
    return read
