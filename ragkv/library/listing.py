"""Documents as people see them: what they are called, how long they are, and what their KV take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ragkv.errors import RecordError
from ragkv.library.document import ChunkedDocument
from ragkv.retrieval import Catalogue, Reading
from ragkv.store import TieredStore


@dataclass(frozen=True)
class ListedDocument:
    """A document.

    Attributes:
        source: what it is called.
        passages: how many it has.
        tokens: as a model counts them that has read it; None where none has.
        kv_bytes: what its KV take, by tier, of all models together; a passage that several documents share counts for each, so
            that their sum may be more than the store's own ``stats()`` say.
        pinned: whether any of its KV is kept from being evicted.
        metadata: what was given with it.
        namespace: whose it is.
    """

    source: str
    passages: int
    tokens: int | None
    kv_bytes: dict[str, int]
    pinned: bool
    metadata: dict[str, Any]
    namespace: str = ""


def listed_documents(
    catalogue: Catalogue, store: TieredStore | None, setting: str = "", namespace: str | None = None
) -> list[ListedDocument]:
    """Documents, by source.

    Args:
        catalogue: has them.
        store: holds their KV.
        setting: of the model whose tokens are counted; by default any.
        namespace: whose documents; by default all.
    """
    # The store is asked behind it: who waited in one folder for another would hold up a fork for ever.
    with catalogue.snapshot() as view:
        read = [(document, view.readings(document)) for document in view.documents(namespace)]
    found = []
    for document, readings in sorted(read, key=lambda each: (each[0].source, each[0].namespace)):
        readings.sort(key=lambda reading: reading.setting != setting)
        keys = [key for reading in readings for key in reading.keys]
        found.append(
            ListedDocument(
                source=document.source,
                passages=len(document.passage_ids),
                tokens=_tokens(readings),
                kv_bytes={} if store is None else store.sizes(keys),
                pinned=store is not None and bool(store.pinned(keys)),
                metadata=document.metadata,
                namespace=document.namespace,
            )
        )
    return found


def kept_bytes(catalogue: Catalogue, store: TieredStore) -> dict[str, int]:
    """What the KV of all documents take together, by tier; what several of them share counts once."""
    with catalogue.snapshot() as view:
        named = view.named()
    return store.sizes(named)


def _tokens(readings: Sequence[Reading]) -> int | None:
    for reading in readings:
        try:
            return sum(len(ids) for ids in ChunkedDocument.from_bytes(reading.record).ids)
        except RecordError:
            continue
    return None
