"""Reading a catalogue from end to end, mending what does not fit, and bringing up what a former version wrote."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ragkv.chunk import digest
from ragkv.errors import IncompatibleFolderError, RagKVError, RecordError, RetrievalError
from ragkv.folder import Environment, Transaction, seal
from ragkv.retrieval import records
from ragkv.retrieval.changes import checked_vectors, new_state, renamed
from ragkv.retrieval.records import Document
from ragkv.retrieval.snapshot import Snapshot

FORMAT, _FORMER = b"ragkv.catalogue/3", (b"ragkv.catalogue/1", b"ragkv.catalogue/2")

#: Gives the vectors, float32 ``[n, d]``, of texts.
Embed = Callable[[list[str]], NDArray[np.float32]]


def problems(txn: Transaction) -> list[str]:
    """What is wrong with a catalogue, a line each; nothing for a sound one.

    Every record is read and held against its checksum, every document against its content hash, and every passage,
    vector and use against the documents.
    """
    view = Snapshot(txn)
    found: list[str] = []
    expected: Counter[str] = Counter()
    dimensions: set[int] = set()
    undivided = view.all_within("")
    for document in _documents(txn, found):
        if undivided and document.namespace:
            found.append(f"{document.source}: the catalogue says that it has no namespaces")
        try:
            _check_document(view, document, found)
            dimensions.update(view.vectors(document.passage_ids).shape[1:])
        except RagKVError as error:
            found.append(f"{document.source}: {error}")
            continue
        count = len(document.passage_ids)
        expected.update(passages=count, vectors=count, uses=count, **_check_readings(txn, document, found))
    if len(dimensions) > 1:
        found.append(f"vectors of several dimensions: {sorted(dimensions)}")
    # Counts only tell more where every document is sound.
    for database in () if found else ("passages", "vectors", "uses", "readings", "kv"):
        if txn.count(database) != expected[database]:
            found.append(f"{txn.count(database)} records in {database}, its documents have {expected[database]}")
    return found


@dataclass
class Damage:
    """What :func:`mend` has to do.

    Attributes:
        lost: document keys with a damaged document or text, and what to call the document.
        vectors: ids of passages whose vector is damaged, and their texts.
        dimension: of the other vectors; 0 where there are none.
    """

    lost: dict[bytes, str] = field(default_factory=dict)
    vectors: dict[int, str] = field(default_factory=dict)
    dimension: int = 0


def damage(txn: Transaction) -> Damage:
    """Reads every record for damage."""
    view, found = Snapshot(txn), Damage()
    for key, record in txn.items("documents"):
        name = "a document whose name is lost"
        try:
            document = records.document_of(key, record)
            name = document.source
            texts = view.texts(document)
        except RagKVError:
            found.lost[key] = name
            continue
        for passage_id, text in zip(document.passage_ids, texts, strict=True):
            try:
                found.dimension = len(view.vector(passage_id))
            except RagKVError:
                found.vectors[passage_id] = text
    return found


def repaired(environment: Environment, embed: Embed) -> list[str]:
    """See :meth:`ragkv.retrieval.Catalogue.repair`."""
    while True:
        with environment.transaction() as txn:
            found, state = damage(txn), Snapshot(txn).state
        texts = list(found.vectors.values())
        vectors = checked_vectors(embed(texts), len(texts)) if texts else np.empty((0, 0), np.float32)
        if texts and found.dimension not in (0, vectors.shape[1]):
            raise RetrievalError(
                f"the embedder gives vectors of {vectors.shape[1]} numbers, those of {environment.path} have "
                f"{found.dimension}: repair it with the embedder that it was made with"
            )
        with environment.transaction(write=True, suspicious=True) as txn:
            if Snapshot(txn).state == state:  # nobody has added again meanwhile what is to be deleted
                mend(txn, found, vectors)
                txn.put("meta", b"state", new_state())
                break
    return [
        *(f"{name}: damaged and deleted, add it again" for name in found.lost.values()),
        *(f"passage {passage_id}: its vector was computed again" for passage_id in found.vectors),
    ]


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
    mend_readings(txn, {document.key: document for document in sound})
    txn.clear("uses")
    for document in sound:
        for key, value in sorted(_uses(txn, document)):
            txn.put("uses", key, value)
    mark_undivided(txn, sound)
    for name in list(txn.keys("meta", records.CAME)):
        txn.put("meta", name, b"mended")  # the document may lack something now, or all: it is taken again
    for name in list(txn.keys("meta", records.FOLLOWED)):
        txn.put("meta", name, bytes(20))


def mend_readings(txn: Transaction, sound: dict[bytes, Document]) -> None:
    """Drops how models read documents where it is damaged or the document is lost, and lists the named KV again."""
    view, named = Snapshot(txn), list[tuple[bytes, bytes]]()
    for key in list(txn.keys("readings")):
        reading, document = view.reading(key), sound.get(key[:32])
        if (
            reading is None
            or document is None
            or len(reading.keys) != len(document.passage_ids)
            or not all(map(view.has_passage, reading.behind))
        ):
            txn.delete("readings", key)
        else:
            named += [(name, key) for name in reading.named]
    txn.clear("kv")
    for kv, key in sorted(named):
        txn.put("kv", kv, key)


def bring_up(environment: Environment, readonly: bool) -> None:
    """Sees that a catalogue is of the present format: a new one, and one of a former format, become so.

    Raises:
        RecordError: it is of another one.
        IncompatibleFolderError: it has to be written to for that, and may not be.
    """
    with environment.transaction() as txn:
        found = txn.get("meta", b"format")
        if found == FORMAT:
            return
        if found not in (None, *_FORMER):
            raise RecordError(f"{environment.path} is of format {found.decode()}, this version reads {FORMAT.decode()}")
        if readonly and found == _FORMER[-1]:  # readable as it is, where it has one namespace
            if Snapshot(txn).defaults.get("namespace"):
                raise IncompatibleFolderError(
                    f"the documents of {environment.path} have no namespace yet: open it once where it may be written to"
                )
            return
    with environment.transaction(write=True) as txn:
        if found is None:
            txn.put("meta", b"state", new_state())
            txn.put("meta", records.UNDIVIDED, b"1")
        else:
            migrate(txn)
        txn.put("meta", b"format", FORMAT)


def migrate(txn: Transaction) -> None:
    """Brings a catalogue of a former format to the present one.

    The first had no readings, and belonged to one model. The second had no namespaces: its documents are of the one that the
    folder was opened with.
    """
    view = Snapshot(txn)
    settings = {what: setting for what, setting in view.settings.items() if what != "model"}
    txn.put("meta", b"settings", json.dumps(settings).encode())
    namespace = view.defaults.get("namespace", "")
    for document in list(_documents(txn, [])) if namespace else ():
        try:
            renamed(txn, document, document.source, view.readings(document), namespace)
        except RagKVError:
            continue  # repair() names it
    txn.clear("uses")
    documents = list(_documents(txn, []))
    for document in documents:
        try:
            listed = sorted(_uses(txn, document))
        except RagKVError:
            continue  # repair() names it
        for key, value in listed:
            txn.put("uses", key, value)
    mark_undivided(txn, documents)


def mark_undivided(txn: Transaction, documents: Iterable[Document]) -> None:
    """Notes whether all documents are of the empty namespace."""
    if any(document.namespace for document in documents):
        txn.delete("meta", records.UNDIVIDED)
    else:
        txn.put("meta", records.UNDIVIDED, b"1")


def _uses(txn: Transaction, document: Document) -> set[tuple[bytes, bytes]]:
    return records.uses(Snapshot(txn).texts(document), document.passage_ids, document.namespace)


def _documents(txn: Transaction, found: list[str]) -> Iterator[Document]:
    for key, record in txn.items("documents"):
        try:
            document = records.document_of(key, record)
        except RagKVError as error:
            found.append(str(error))
            continue
        if document.key != key:
            found.append(f"{document.source}: stands under the key of another document")
        yield document


def _check_document(view: Snapshot, document: Document, found: list[str]) -> None:
    texts = view.texts(document)
    if digest(*texts).hex() != document.content_hash:
        found.append(f"{document.source}: its passages do not give its content hash")
    if not all(view.has_text(text, document.namespace) for text in texts):
        found.append(f"{document.source}: a passage is not listed under its text")


def _check_readings(txn: Transaction, document: Document, found: list[str]) -> dict[str, int]:
    """Checks how models read a document; returns how many records that takes, by database."""
    view, source_key, named = Snapshot(txn), document.key, 0
    settings = view.read_for(source_key)
    for setting in settings:
        reading = view.reading(records.reading_key(source_key, setting))
        if reading is None or len(reading.keys) != len(document.passage_ids):
            found.append(f"{document.source}: how a model reads it is damaged")
        else:
            named += len(reading.named)
            if not all(map(view.names, reading.named)):
                found.append(f"{document.source}: the KV of a passage are not listed")
            if not all(map(view.has_passage, reading.behind)):
                found.append(f"{document.source}: it is read behind a passage that is gone")
    return {"readings": len(settings), "kv": named}
