"""One document put in the place of another, inside a transaction."""

from __future__ import annotations

import uuid
from collections import defaultdict, deque
from dataclasses import replace

from numpy.typing import NDArray

from ragkv.folder import Transaction, seal
from ragkv.retrieval import records
from ragkv.retrieval.records import Change, Document
from ragkv.retrieval.snapshot import Snapshot


def new_state() -> bytes:
    """A name that no other state has."""
    return uuid.uuid4().hex.encode()


def replaced(txn: Transaction, document: Document, passages: list[str], vectors: dict[str, NDArray]) -> Change:
    """Puts a document in the place of the version before.

    Args:
        txn: a transaction that may write.
        document: the document, its ``passage_ids`` not yet known.
        passages: its texts in order; none removes it.
        vectors: vectors by text, float32 ``[d]``; of the other texts some passage has to have one.
    """
    view = Snapshot(txn)
    before = view.state
    old = view.get(document.source)
    old_ids = old.passage_ids if old else ()
    old_texts = view.texts(old) if old else []
    ids, new = _matched(txn, passages, old_texts, old_ids)
    key = records.source_key(document.source)
    for text, passage_id in zip(passages, ids, strict=True):
        if passage_id in new:
            vector = vectors[text] if text in vectors else view.vector_of(text)
            _write(txn, "passages", records.passage_key(passage_id), key + text.encode())
            _write(txn, "vectors", records.passage_key(passage_id), records.vector_payload(vector))
    removed = tuple(sorted(set(old_ids) - set(ids)))
    for passage_id in removed:
        txn.delete("passages", records.passage_key(passage_id))
        txn.delete("vectors", records.passage_key(passage_id))
    _write_uses(txn, records.uses(old_texts, old_ids), records.uses(passages, ids))
    document = replace(document, passage_ids=tuple(ids))
    if passages:
        _write(txn, "documents", key, records.document_payload(document))
    else:
        txn.delete("documents", key)
    if passages != old_texts:
        txn.put("meta", b"state", new_state())
    return Change(
        document,
        new=tuple(sorted(new)),
        kept=tuple(sorted(set(ids) & set(old_ids))),
        removed=removed,
        old_passages=tuple(old_texts),
        first_changed=_first_changed(passages, old_texts),
        orphans=tuple(i for i, use in enumerate(records.lineage_keys(old_texts)) if not view.used(use)),
        orphan_texts=tuple(i for i, text in enumerate(old_texts) if not view.has_text(text)),
        states=(before, view.state),
    )


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
