"""One document put in the place of another, inside a transaction."""

from __future__ import annotations

import uuid
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ragkv.errors import RetrievalError
from ragkv.folder import Transaction, seal
from ragkv.retrieval import records
from ragkv.retrieval.index import as_numbers
from ragkv.retrieval.records import ArchivedDocument, Change, Document, Merged, Reading
from ragkv.retrieval.snapshot import Snapshot


def new_state() -> bytes:
    """A name that no other state has."""
    return uuid.uuid4().hex.encode()


def checked_vectors(vectors: Any, count: int, dimension: int | None = None) -> NDArray[np.float32]:
    """What an embedder gave for so many texts, float32 ``[n, d]``.

    Raises:
        RetrievalError: it is something else.
    """
    array = as_numbers("what the embedder gives", vectors)
    if array.ndim != 2 or len(array) != count or not array.shape[1] or dimension not in (None, array.shape[1]):
        raise RetrievalError(
            f"the embedder must give vectors of shape [{count}, {dimension or 'd'}], got {array.shape}"
        )
    if not np.isfinite(array).all():
        raise RetrievalError("the embedder gave a vector with a number that is not finite")
    return array


def replaced(
    txn: Transaction,
    document: Document,
    passages: list[str],
    vectors: dict[str, NDArray[np.float32]],
    readings: Sequence[Reading] = (),
) -> Change:
    """Puts a document in the place of the version before.

    Args:
        txn: a transaction that may write.
        document: the document, its ``passage_ids`` not yet known.
        passages: its texts in order; none removes it.
        vectors: vectors by text, float32 ``[d]``; of the other texts some passage has to have one.
        readings: how models read it. Those of the version before stay where its passages do.
    """
    view = Snapshot(txn)
    before = view.state
    old = view.get(document.source, document.namespace)
    old_ids = old.passage_ids if old else ()
    old_texts = view.texts(old) if old else []
    ids, new = _matched(txn, passages, old_texts, old_ids)
    key = document.key
    for text, passage_id in zip(passages, ids, strict=True):
        if passage_id in new:
            vector = vectors[text] if text in vectors else view.vector_of(text, document.namespace)
            _write(txn, "passages", records.passage_key(passage_id), key + text.encode())
            _write(txn, "vectors", records.passage_key(passage_id), records.vector_payload(vector))
    removed = tuple(sorted(set(old_ids) - set(ids)))
    for passage_id in removed:
        txn.delete("passages", records.passage_key(passage_id))
        txn.delete("vectors", records.passage_key(passage_id))
    uses = partial(records.uses, namespace=document.namespace)
    _write_uses(txn, uses(old_texts, old_ids), uses(passages, ids))
    if document.namespace:
        txn.delete("meta", records.UNDIVIDED)
    document = replace(document, passage_ids=tuple(ids))
    txn.delete("meta", records.came_key(key, document.namespace))
    if passages:
        _write(txn, "documents", key, records.document_payload(document))
    else:
        txn.delete("documents", key)
    outdated = [] if passages == old_texts else view.read_for(key)
    unused = dropped_readings(txn, key, outdated) | put_readings(txn, key, readings)
    for passage_id in removed:
        for other in list(txn.values("kv", records.behind_key(passage_id))):
            unused |= dropped_readings(txn, other[:32], [other[32:].hex()])
    if passages != old_texts:
        txn.put("meta", b"state", new_state())
    return Change(
        document,
        new=tuple(sorted(new)),
        kept=tuple(sorted(set(ids) & set(old_ids))),
        removed=removed,
        replaced=old is not None,
        first_changed=_first_changed(passages, old_texts),
        unused=noted_unused(txn, unused),
        states=(before, view.state),
    )


def renamed(
    txn: Transaction, document: Document, source: str, readings: Sequence[Reading], namespace: str | None = None
) -> Document:
    """Calls a document by another source. Its passages and vectors stay what they are, so the state does too.

    Args:
        txn: a transaction that may write.
        document: as it is kept.
        source: of no document.
        readings: how models read it, for its new name.
        namespace: of its own by default.
    """
    view, former = Snapshot(txn), document.key
    txn.delete("meta", records.came_key(former, document.namespace))
    namespace = document.namespace if namespace is None else namespace
    texts, document = view.texts(document), replace(document, source=source, namespace=namespace)
    for passage_id, text in zip(document.passage_ids, texts, strict=True):
        _write(txn, "passages", records.passage_key(passage_id), document.key + text.encode())
    txn.delete("documents", former)
    _write(txn, "documents", document.key, records.document_payload(document))
    dropped_readings(txn, former, view.read_for(former))
    put_readings(txn, document.key, readings)
    return document


def merged(txn: Transaction, archived: ArchivedDocument, replace_other: bool) -> Merged:
    """Takes in a document of an archive: as :meth:`~ragkv.retrieval.Catalogue.merge`, inside a transaction that may write."""
    view, given = Snapshot(txn), archived.document
    old, key = view.get(given.source, given.namespace), given.key
    there = old is not None and replace(old, passage_ids=()) == given
    if old is not None and not replace_other:
        readings = archived.readings if old.content_hash == given.content_hash else ()
        new = [reading for reading in readings if view.reading(records.reading_key(key, reading.setting)) is None]
        put_readings(txn, key, new)
        return Merged(kept=not there, there=there)
    vectors = dict(zip(archived.passages, archived.vectors, strict=True))
    return Merged(there=there, unused=replaced(txn, given, list(archived.passages), vectors, archived.readings).unused)


def put_readings(txn: Transaction, source_key: bytes, readings: Sequence[Reading]) -> set[bytes]:
    """Keeps how models read a document; returns the keys of KV that the readings before them named.

    One that is behind a passage that is gone is not kept.
    """
    before, view = dropped_readings(txn, source_key, [reading.setting for reading in readings]), Snapshot(txn)
    for reading in readings:
        if all(map(view.has_passage, reading.behind)):
            key = records.reading_key(source_key, reading.setting)
            _write(txn, "readings", key, records.reading_payload(reading))
            for name in reading.named:
                txn.put("kv", name, key)
    return before


def noted_unused(txn: Transaction, keys: Iterable[bytes]) -> tuple[bytes, ...]:
    """Those keys of KV that no reading names any more; that they are still to be removed is noted (:meth:`Catalogue.unused`)."""
    view = Snapshot(txn)
    left = tuple(sorted(key for key in keys if not view.names(key)))
    for key in left:
        txn.put("meta", records.UNUSED + key, b"1")
    return left


def dropped_readings(txn: Transaction, source_key: bytes, settings: Iterable[str]) -> set[bytes]:
    """Forgets how models of some settings read a document; returns the keys of KV that were named."""
    named: set[bytes] = set()
    for setting in settings:
        key = records.reading_key(source_key, setting)
        reading = Snapshot(txn).reading(key)
        for name in reading.named if reading else ():
            txn.delete("kv", name, key)
        named.update(reading.keys if reading else ())
        txn.delete("readings", key)
    return named


def _matched(
    txn: Transaction, passages: list[str], old_texts: list[str], old_ids: tuple[int, ...]
) -> tuple[list[int], set[int]]:
    """The id of every passage, one it had before where its text was there; and which of them are new."""
    known: defaultdict[str, deque[int]] = defaultdict(deque)
    for text, passage_id in zip(old_texts, old_ids, strict=True):
        known[text].append(passage_id)
    first = following = int.from_bytes(txn.get("meta", b"next id") or b"", "big")
    ids = []
    for text in passages:
        if known[text]:
            ids.append(known[text].popleft())
        else:
            ids.append(following)
            following += 1
    txn.put("meta", b"next id", records.passage_key(following))
    return ids, set(range(first, following))


def _write_uses(txn: Transaction, before: set[tuple[bytes, bytes]], now: set[tuple[bytes, bytes]]) -> None:
    for key, value in sorted(before - now):
        txn.delete("uses", key, value)
    for key, value in sorted(now - before):
        txn.put("uses", key, value)


def _write(txn: Transaction, database: str, key: bytes, payload: bytes) -> None:
    txn.put(database, key, seal(key, payload))


def _first_changed(passages: list[str], old: list[str]) -> int | None:
    same = 0
    while same < min(len(passages), len(old)) and passages[same] == old[same]:
        same += 1
    return same if same < len(passages) else None
