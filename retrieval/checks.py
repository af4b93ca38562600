"""Reading a catalogue from end to end, for what does not fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from ragkv.chunk import digest
from ragkv.errors import RagKVError
from ragkv.retrieval import records
from ragkv.retrieval.environment import Transaction
from ragkv.retrieval.records import Document
from ragkv.retrieval.snapshot import Snapshot


def problems(txn: Transaction) -> list[str]:
    """What is wrong with a catalogue, a line each; nothing for a sound one.

    Every record is read and held against its checksum, every document against its content hash, and every passage,
    vector and use against the documents.
    """
    view = Snapshot(txn)
    found: list[str] = []
    expected: Counter[str] = Counter()
    dimensions: set[int] = set()
    for document in _documents(txn, found):
        try:
            uses = _check_document(view, document, found)
            dimensions.update(view.vectors(document.passage_ids).shape[1:])
        except RagKVError as error:
            found.append(f"{document.source}: {error}")
            continue
        expected.update(passages=len(document.passage_ids), vectors=len(document.passage_ids), uses=uses)
    if len(dimensions) > 1:
        found.append(f"vectors of several dimensions: {sorted(dimensions)}")
    # Counts only tell more where every document is sound.
    for database in () if found else ("passages", "vectors", "uses"):
        if txn.count(database) != expected[database]:
            found.append(f"{txn.count(database)} records in {database}, its documents have {expected[database]}")
    return found


def _documents(txn: Transaction, found: list[str]) -> Iterator[Document]:
    for key, record in txn.items("documents"):
        try:
            document = records.document_from(records.opened("a document", key, record))
        except RagKVError as error:
            found.append(str(error))
            continue
        if records.source_key(document.source) != key:
            found.append(f"{document.source}: stands under the key of another document")
        yield document


def _check_document(view: Snapshot, document: Document, found: list[str]) -> int:
    """Checks the texts of a document; returns how many records it has in ``uses``."""
    texts = view.texts(document)
    if digest(*texts).hex() != document.content_hash:
        found.append(f"{document.source}: its passages do not give its content hash")
    keys = [*records.lineage_keys(texts), *map(records.text_key, texts)]
    if not all(view.used(key) for key in keys):
        found.append(f"{document.source}: a passage is not listed under its text")
    # A lineage is had once by a passage, and so is a text.
    return len(keys)
