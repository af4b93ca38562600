"""Reading a catalogue from end to end, and mending what does not fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ragkv.chunk import digest
from ragkv.errors import RagKVError
from ragkv.folder import Transaction, seal
from ragkv.retrieval import records
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


@dataclass
class Damage:
    """What :func:`mend` has to do.

    Attributes:
        lost: document keys with a damaged document or text, and what to call the document.
        vectors: ids of passages whose vector is damaged, and their texts.
    """

    lost: dict[bytes, str] = field(default_factory=dict)
    vectors: dict[int, str] = field(default_factory=dict)


def damage(txn: Transaction) -> Damage:
    """Reads every record for damage."""
    view, found = Snapshot(txn), Damage()
    for key, record in txn.items("documents"):
        name = "a document whose name is lost"
        try:
            document = records.document_from(records.opened("a document", key, record))
            name = document.source
            texts = view.texts(document)
        except RagKVError:
            found.lost[key] = name
            continue
        for passage_id, text in zip(document.passage_ids, texts, strict=True):
            try:
                view.vector(passage_id)
            except RagKVError:
                found.vectors[passage_id] = text
    return found


def mend(txn: Transaction, found: Damage, vectors: NDArray[np.float32]) -> None:
    """Deletes lost documents with all that belongs to them, and writes damaged vectors and all uses again.

    Args:
        txn: a transaction that may write.
        found: what :func:`damage` found.
        vectors: of ``found.vectors``, float32 ``[n, d]``.
    """
    for key in found.lost:
        txn.delete("documents", key)
    sound = list(Snapshot(txn).documents())
    kept = {records.passage_key(passage_id) for document in sound for passage_id in document.passage_ids}
    for database in ("passages", "vectors"):
        for key in [key for key in txn.keys(database) if key not in kept]:
            txn.delete(database, key)
    for passage_id, vector in zip(found.vectors, vectors, strict=True):
        key = records.passage_key(passage_id)
        if key in kept:
            txn.put("vectors", key, seal(key, records.vector_payload(vector)))
    txn.clear("uses")
    for document in sound:
        for key, value in sorted(records.uses(Snapshot(txn).texts(document), document.passage_ids)):
            txn.put("uses", key, value)


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
    # Two for every passage: ids differ, so none stands for another.
    return len(keys)
