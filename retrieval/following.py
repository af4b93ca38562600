"""A catalogue that follows a published one: which documents came from there, and one state put in the place of another.

Beside each document that came so stands the checksum of what it came as; it goes when the document is changed or removed in any
other way, for it is the folder's own then.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import NamedTuple

from ragkv.chunk import digest
from ragkv.folder import Transaction
from ragkv.retrieval import records
from ragkv.retrieval.changes import merged, noted_unused, replaced
from ragkv.retrieval.records import ArchivedDocument
from ragkv.retrieval.snapshot import Snapshot


class Seen(NamedTuple):
    """What a catalogue has of a publication.

    Attributes:
        id: of the publication; empty where none was taken yet.
        size: how many documents it has.
        documents: those that came from it and are as they came, by key: what they came as.
    """

    id: bytes
    size: int
    documents: dict[bytes, bytes]


class Following(NamedTuple):
    """What taking over a publication did.

    Attributes:
        taken: how many documents were new, or others than before.
        removed: sources of documents that are not in it any more.
        kept: sources of which the folder has a version of its own, which stayed.
        unused: keys of KV that no document's reading names any more.
    """

    taken: int
    removed: tuple[str, ...]
    kept: tuple[str, ...]
    unused: tuple[bytes, ...]


def seen(txn: Transaction, namespace: str) -> Seen:
    """What there is of a namespace's publication."""
    prefix = records.CAME + records.namespace_prefix(namespace)
    last = txn.get("meta", _name(namespace)) or b""
    documents = {name.removeprefix(prefix): mark for name, mark in txn.items("meta", prefix)}
    return Seen(last[:16], int.from_bytes(last[16:], "little"), documents)


def taken_over(
    txn: Transaction,
    namespace: str,
    former: bytes,
    publication: bytes,
    present: Collection[bytes],
    changed: Mapping[bytes, tuple[ArchivedDocument, bytes]],
) -> Following | None:
    """As :meth:`~ragkv.retrieval.Catalogue.follow`, inside a transaction that may write."""
    view, (last, _, before) = Snapshot(txn), seen(txn, namespace)
    if last != former:
        return None
    removed, kept, unused, taken = list[str](), list[str](), set[bytes](), 0
    for key in before.keys() - set(present):
        document = view.by_id(key.hex())
        if document is None:  # lost in a repair
            txn.delete("meta", records.came_key(key, namespace))
            continue
        unused.update(replaced(txn, replace(document, passage_ids=()), [], {}).unused)
        removed.append(document.source)
    for key, (archived, mark) in changed.items():
        own = key not in before and view.by_id(key.hex()) is not None
        done = merged(txn, archived, replace_other=not own)
        unused.update(done.unused)
        if done.kept:
            kept.append(archived.document.source)
        if not own:
            taken += 1
            txn.put("meta", records.came_key(key, namespace), mark)
    txn.put("meta", _name(namespace), publication + len(present).to_bytes(4, "little"))
    return Following(taken, tuple(sorted(removed)), tuple(sorted(kept)), noted_unused(txn, unused))


def _name(namespace: str) -> bytes:
    """Where it stands which publication was taken last."""
    return records.FOLLOWED + digest("namespace", namespace)
