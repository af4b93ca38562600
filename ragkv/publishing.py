"""Catalogues in a shared pool: whoever fills it says there which documents there are; others answer without having read any."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ragkv.errors import ArgumentError, PublicationError, RecordError, UploadError, instance
from ragkv.exchange import made_with
from ragkv.library.differing import described, differences
from ragkv.library.documents import Documents
from ragkv.retrieval import Catalogue, Embedder, Retriever
from ragkv.retrieval.exchange import packed, sealed, unpacked
from ragkv.retrieval.records import ArchivedDocument, reading_key
from ragkv.store import TieredStore
from ragkv.store.remote import RemoteTier
from ragkv.store.remote.pool import PoolError
from ragkv.store.remote.publications import KEYS, Publication

logger: logging.Logger = logging.getLogger(__name__)

_FORMAT = 1
_TRIES = 5


@dataclass(frozen=True)
class Published:
    """What was published.

    Attributes:
        documents: how many.
        passages: theirs.
        unread: passages among them that nobody finds KV of: whoever is asked reads them; :meth:`~ragkv.RAG.refresh` does before.
        size_bytes: of the catalogue in the pool.
        withdrawn: catalogues of the namespace that were made for other models, and are not there any more.
    """

    documents: int
    passages: int
    unread: int
    size_bytes: int
    withdrawn: int = 0


@dataclass(frozen=True)
class Followed:
    """What was taken of a publication.

    Attributes:
        documents: how many it has.
        taken: how many of them were new, or others than before.
        removed: sources that are not in it any more.
        kept: sources of which the folder has a version of its own, which stayed.
    """

    documents: int
    taken: int = 0
    removed: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


def publish(catalogue: Catalogue, documents: Documents, only: bool, limit_s: float) -> Published:
    """See :meth:`ragkv.RAG.publish`."""
    instance("limit_s", limit_s, int | float, "a number of seconds")
    pool = documents.store.remote
    if pool is None or pool.readonly:
        raise ArgumentError(
            "to publish takes a pool that may be written to: give remote=, and neither readonly= nor follow="
        )
    setting, namespace = documents.setting, documents.namespace
    parts, keys, passages, unread = dict[bytes, bytes](), dict[bytes, None](), 0, 0
    with catalogue.snapshot() as view:
        for document in sorted(view.documents(namespace), key=lambda document: document.source):
            parts[document.key] = packed(view, document, setting).data
            reading = view.reading(reading_key(document.key, setting))
            keys.update(dict.fromkeys(reading.keys if reading else ()))
            passages += len(document.passage_ids)
            if reading is None or reading.behind:  # which others do not have
                unread += len(document.passage_ids)
    lacking = pool.lacking(list(keys))
    pool.share(lacking)
    _wait(documents.store, pool, limit_s)
    facts = {"format": _FORMAT, "created_s": time.time(), **made_with(catalogue), "read_with": described(documents)}
    size = pool.publications.put(namespace, setting, facts, {KEYS: b"".join(keys), **parts})
    withdrawn = pool.publications.withdraw(namespace, setting) if only else 0
    return Published(len(parts), passages, unread + len(pool.lacking(lacking)), size, withdrawn)


def follow(retriever: Retriever, documents: Documents) -> Followed:
    """See :meth:`ragkv.RAG.follow`."""
    catalogue, embedder = retriever.catalogue, retriever.embedder
    pool = pool_to_follow(documents.store.remote)
    setting, namespace = documents.setting, documents.namespace
    for _ in range(_TRIES):
        before = catalogue.seen(namespace)
        if before.id and pool.publications.id(namespace, setting) == before.id:
            return Followed(before.size)
        marks = before.documents

        def wanted(found: Publication, marks: Mapping[bytes, bytes] = marks) -> list[bytes]:
            _check(found, embedder, pool)
            return [name for name, part in found.parts.items() if name != KEYS and marks.get(name) != part.checksum]

        taken = pool.publications.take(namespace, setting, wanted)
        if taken is None:
            raise PublicationError(_nothing(pool, documents))
        found, parts = taken
        present = found.parts.keys() - {KEYS}
        changed = {
            key: (_document(key, data, namespace, embedder.dimension), found.parts[key].checksum)
            for key, data in parts.items()
        }
        _take_defaults(catalogue, documents, found)
        done = catalogue.follow(namespace, before.id, found.head.id, present, changed)
        if done is not None:
            documents.drop(done.unused)
            catalogue.dropped(done.unused)
            return Followed(len(present), done.taken, done.removed, done.kept)
    raise PublicationError(f"{catalogue.path} follows in another process at the same time, again and again")


def follow_at_opening(retriever: Retriever, documents: Documents) -> None:
    """Take what is published; where the pool does not answer or has nothing any more, go on with what was taken before."""
    try:
        follow(retriever, documents)
    except (PoolError, PublicationError) as error:
        if not retriever.catalogue.seen(documents.namespace).id:
            raise
        logger.warning("answers come from what was published before: %s", str(error))


def pool_to_follow(pool: RemoteTier | None) -> RemoteTier:
    """The pool, which is for reading only.

    Raises:
        ArgumentError: there is none, or it is not.
    """
    if pool is None:
        raise ArgumentError("to follow takes a pool: remote='s3://bucket/prefix', follow=True")
    if not pool.readonly:
        raise ArgumentError(
            "whoever follows never writes to the pool: give RAG.from_pretrained follow=True, and a pool of your own as "
            "RemoteTier(..., readonly=True)"
        )
    return pool


def published_defaults(pool: RemoteTier, namespace: str) -> dict[str, Any]:
    """What a folder is opened with that follows and has nothing yet: what the last one who published opened his with.

    Raises:
        PublicationError: nothing is published for the namespace.
    """
    found = pool.publications.each(namespace)
    if not found:
        raise PublicationError(f"nothing is published in {pool.publications.place}{_of(namespace)}: {_HOW}")
    return _defaults(max((publication.facts for publication in found), key=_created_s), namespace)


_HOW = "'ragkv publish --remote URL', or RAG.publish(), does that where the documents are"


def _wait(store: TieredStore, pool: RemoteTier, limit_s: float) -> None:
    """Until the pool has what was put, as long as something arrives there."""
    left = pool.pool().pending
    while True:
        try:
            return store.flush(limit_s)
        except UploadError:
            left, before = pool.pool().pending, left
            if left >= before:
                raise


def _check(found: Publication, embedder: Embedder, pool: RemoteTier) -> None:
    facts, place = found.facts, pool.publications.place
    if facts.get("format") != _FORMAT:
        raise PublicationError(
            f"the catalogue in {place} is of version {facts.get('format')!r}, this version of ragkv reads {_FORMAT}"
        )
    made = _mapping(facts, "embedder")
    if made.get("fingerprint") != embedder.fingerprint:
        raise PublicationError(
            f"the catalogue in {place} was made with the embedder {made.get('name', 'unknown')}, got {embedder.name}: "
            "give the former"
        )


def _document(key: bytes, data: bytes, namespace: str, dimension: int) -> ArchivedDocument:
    """A document of a publication.

    Raises:
        RecordError: it cannot be.
    """
    archived = unpacked(sealed(f"documents/{key.hex()}.safetensors", data), namespace)
    if archived.document.namespace != namespace or archived.vectors.shape[1] != dimension:
        raise RecordError(
            f"the document {archived.document.source!r} is of another namespace, or its vectors of another embedder"
        )
    return archived


def _take_defaults(catalogue: Catalogue, documents: Documents, found: Publication) -> None:
    """An empty folder is opened as the publisher's was, from now on."""
    if not len(catalogue):
        if not catalogue.defaults:
            catalogue.keep_defaults(_defaults(found.facts, documents.namespace))
        catalogue.keep_read_with(described(documents))


def _defaults(facts: Mapping[str, Any], namespace: str) -> dict[str, Any]:
    """What a folder of a namespace is opened with."""
    return {**_mapping(facts, "defaults"), "namespace": namespace}


def _nothing(pool: RemoteTier, documents: Documents) -> str:
    """Why there is nothing to take."""
    others = pool.publications.each(documents.namespace)
    said = f"nothing is published in {pool.publications.place}{_of(documents.namespace)}"
    if not others:
        return f"{said}: {_HOW}"
    newest = max((publication.facts for publication in others), key=_created_s)
    before = {str(name): str(value) for name, value in _mapping(newest, "read_with").items()}
    differ = differences(before, described(documents)) or ["the version of ragkv"]
    return f"{said} for this model; what was published last differs in: {', '.join(differ)}"


def _mapping(facts: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = facts.get(name)
    return found if isinstance(found, dict) else {}


def _created_s(facts: Mapping[str, Any]) -> float:
    created_s = facts.get("created_s")
    return float(created_s) if isinstance(created_s, int | float) else 0.0


def _of(namespace: str) -> str:
    return f" of the namespace {namespace!r}" if namespace else ""
