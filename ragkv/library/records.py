"""Where the records of documents are kept: a chunk is read again with them, and what was removed stays removed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Protocol

from ragkv.chunk import Chunk
from ragkv.errors import DocumentError, RecordError
from ragkv.folder import seal, unseal
from ragkv.library.document import ChunkedDocument
from ragkv.store import TieredStore

logger: logging.Logger = logging.getLogger(__name__)


class Records(Protocol):
    """The documents that are kept."""

    def find(self, document_id: str) -> ChunkedDocument | None:
        """The document of an id, as it is now; None where it is not kept."""

    def holds(self, chunks: Mapping[bytes, Chunk]) -> set[bytes]:
        """The keys of those chunks that are chunks of kept documents, as these are now."""


class StoreRecords:
    """Records beside the KV, as facts of the store, which are never evicted.

    Args:
        store: keeps them.
        setting: how documents are cut and their texts become ids: with another one they have other records.
    """

    def __init__(self, store: TieredStore, setting: str):
        self._store, self._setting = store, setting

    def find(self, document_id: str) -> ChunkedDocument | None:
        """See the protocol. A damaged record counts as none."""
        name = self.name(document_id)
        data = self._store.meta_get(name)
        try:
            return None if data is None else ChunkedDocument.from_bytes(unseal(name.encode(), data))
        except RecordError as error:
            logger.warning("the record of document %s is lost: %s", document_id, str(error))
            return None

    def holds(self, chunks: Mapping[bytes, Chunk]) -> set[bytes]:
        """See the protocol."""
        documents = {name: self.find(name) for name in {chunk.document for chunk in chunks.values()}}
        return {key for key, chunk in chunks.items() if has(documents[chunk.document], chunk)}

    def put(self, document: ChunkedDocument) -> None:
        """Keep a document, in the place of the one of its id."""
        name = self.name(document.id)
        data = seal(name.encode(), document.to_bytes())
        if self._store.meta_get(name) != data:
            self._store.meta_put(name, data)

    def name(self, document_id: str) -> str:
        """What the fact is called."""
        return f"document:{self._setting}:{document_id}"


def has(document: ChunkedDocument | None, chunk: Chunk) -> bool:
    """Whether a document has just this chunk at its place."""
    if document is None or chunk.number >= len(document):
        return False
    own = document[chunk.number]
    return (own.ids, own.context, own.offset) == (chunk.ids, chunk.context, chunk.offset)


def lineage_of(chunk: Chunk, records: Sequence[Records]) -> list[Chunk]:
    """A chunk's lineage, from its document's record where it does not know it itself.

    Raises:
        DocumentError: nobody does.
    """
    lineage = chunk.lineage()
    for kept in records if lineage is None else ():
        document = kept.find(chunk.document)
        if document is not None and has(document, chunk):
            return document.lineage(chunk.number)
    if lineage is None:
        raise DocumentError(
            f"chunk {chunk.number} of document {chunk.document} has lost its KV, and no record says what it was read behind: "
            "add the document again"
        )
    return lineage


def held(chunks: Mapping[bytes, Chunk], records: Sequence[Records]) -> set[bytes]:
    """The keys of chunks that may be stored: those of no document, and those of documents that are kept."""
    of_documents = {key: chunk for key, chunk in chunks.items() if chunk.document}
    free = chunks.keys() - of_documents.keys()
    return free.union(*(kept.holds(of_documents) for kept in records)) if of_documents else free
