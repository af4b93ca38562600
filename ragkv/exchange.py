"""A folder in one file: documents with vectors and readings, what it was made with, and KV, for another folder or machine."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from ragkv.errors import RagKVError, RecordError, RetrievalError
from ragkv.folder.archive import BEGIN, FOLDER_FORMAT, UNREADABLE, Exchanged, Lost, Member, Writer, written
from ragkv.folder.filesystem import has_data
from ragkv.retrieval import Catalogue
from ragkv.retrieval.exchange import opened, packed, sealed, unpacked
from ragkv.retrieval.records import ArchivedDocument
from ragkv.store import exchange as records
from ragkv.store import maintenance
from ragkv.store.disk import DiskTier
from ragkv.store.tier import Offer


def export_folder(
    path: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    sources: Callable[[str], bool] = lambda source: True,
    wanted: Callable[[bytes], bool] = lambda key: True,
    progress: Callable[[int], None] = lambda done: None,
) -> Exchanged:
    """Writes documents, vectors, readings and KV into one file, complete or not at all.

    Args:
        path: the folder of :meth:`~ragkv.RAG.from_pretrained`; one of KV alone gives an archive of KV alone.
        target: the file; replaced where it is there.
        sources: which documents.
        wanted: the keys of which KV. What has expired is left out, and what is damaged, documents too, with a warning.
        progress: called with the number of documents, then of records done.

    Raises:
        StoreError: nothing is left to write.
    """
    documents, kv = Path(path) / "documents", kv_folder(Path(path))
    if not has_data(documents):
        return records.export(kv, target, wanted=wanted, progress=progress)
    with ExitStack() as stack:
        catalogue = stack.enter_context(Catalogue(documents))
        archive = stack.enter_context(written(target, FOLDER_FORMAT))
        archive.add(sealed(BEGIN, json.dumps({"format": FOLDER_FORMAT, **made_with(catalogue)}).encode()))
        _add_documents(archive, catalogue, sources, progress)
        if has_data(kv):
            records.add_records(archive, stack.enter_context(maintenance.opened(kv)), wanted, progress)
    return archive.done


def import_folder(
    path: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *,
    disk_bytes: int,
    replace: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> Exchanged:
    """Takes in what :func:`export_folder` wrote: nothing is tokenised, embedded or computed.

    Every member is checked before it is taken in. That finds accidents, not forgeries: take in what you trust. A document of which
    another version is there is left out, unless it is to be replaced; readings and KV of other models are taken in beside those
    that are there. A folder without documents takes over what the archive's were made with.

    Args:
        path: the folder, made if it is not there.
        source: the file; one of KV alone gives KV alone.
        disk_bytes: what the folder's KV may take; beyond that, those of least worth are evicted.
        replace: the archive's version of a document replaces the one that is there.
        progress: called with the number of members done.

    Raises:
        IncompatibleFolderError: the vectors were made by another embedder than the folder's; nothing was written.
        RecordError: the file is not one of ours; or it is damaged or cut short: what is whole is taken in, the message names the
            rest.
        StoreFullError: something does not fit; what came before it is taken in.
    """
    lost = Lost(source)
    archive, kv = lost.until_broken(), kv_folder(Path(path))
    first = next(archive, None)
    if first is None or first.name != BEGIN:
        return records.import_records(kv, source, disk_bytes=disk_bytes, progress=progress)
    made = lost.parsed(_made, first)
    if made is None:
        lost.refuse("nothing")
        return Exchanged()
    if kv == Path(path):
        raise RagKVError(f"{path} holds KV and no documents: take in the KV alone, or name another folder")
    done, named, namespace = Exchanged(), set[bytes](), str(made["defaults"].get("namespace", ""))
    with Catalogue(Path(path) / "documents") as catalogue:
        dimension = _agree(catalogue, made)
        with maintenance.opened(kv, disk_bytes) as tier:
            for number, member in enumerate(archive, 1):
                if member.kind == "documents":
                    document = lost.parsed(partial(unpacked, namespace=namespace), member)
                    dimension = dimension or (document and document.vectors.shape[1])
                    if document is not None and document.vectors.shape[1] != dimension:
                        lost.note(f"{member.name} has vectors of another dimension than the folder's {dimension}")
                    elif document is not None:
                        named.update(key for reading in document.readings for key in reading.keys)
                        _take_document(document, catalogue, tier, replace, done)
                else:
                    offer = lost.parsed(records.unpacked, member)
                    if offer is not None:
                        _take_record(offer, named, catalogue, tier, done)
                progress(number)
    lost.refuse(f"{done.documents} documents, {done.records} records")
    return done


def made_with(catalogue: Catalogue) -> dict[str, Any]:
    """What documents were made with, for another folder: embedder, options, and what they were read with."""
    defaults = catalogue.defaults
    if (
        defaults.get("method") == "calibrated"
    ):  # what was chosen stays with the KV, and is proved for what is read there
        del defaults["method"]
    return {"embedder": catalogue.settings.get("embedder"), "defaults": defaults, "read_with": catalogue.read_with}


def kv_folder(path: Path) -> Path:
    """Where a folder's KV are: beside its documents, or in the folder itself where it is one of KV alone."""
    return path if has_data(path) and not has_data(path / "kv") else path / "kv"


def _add_documents(
    archive: Writer, catalogue: Catalogue, sources: Callable[[str], bool], progress: Callable[[int], None]
) -> None:
    with catalogue.snapshot() as view:
        found = view.documents(damaged=lambda document_id, error: archive.pass_over(f"document {document_id}", error))
        chosen = sorted((each.source, each.namespace) for each in found if sources(each.source))
    for source, namespace in chosen:
        try:
            with catalogue.snapshot() as view:
                document = view.get(source, namespace)
                if document is not None:  # else it was removed meanwhile
                    archive.add(packed(view, document))
        except (RecordError, RetrievalError) as error:
            archive.pass_over(source, error)
        progress(archive.counts["documents"])


def _made(member: Member) -> dict[str, Any]:
    """What the archive's documents were made with."""
    try:
        made = json.loads(opened(member).data)
        if made["format"] != FOLDER_FORMAT:
            raise RecordError(f"it is of format {made['format']!r}, this version reads {FOLDER_FORMAT!r}")
        embedder = made["embedder"] or {"fingerprint": "", "name": "unknown"}
        read_with = {str(name): str(value) for name, value in dict(made.get("read_with", {})).items()}
        return {
            "embedder": (str(embedder["fingerprint"]), str(embedder["name"])),
            "defaults": dict(made["defaults"]),
            "read_with": read_with,
        }
    except UNREADABLE as error:
        raise RecordError(f"{member.name} is damaged: {error}") from error


def _agree(catalogue: Catalogue, made: dict[str, Any]) -> int | None:
    """Refuse another embedder's vectors; take over what the documents were made with where there are none yet.

    Returns:
        The dimension of the vectors that are there.
    """
    fingerprint, name = made["embedder"]
    with catalogue.snapshot() as view:
        first = view.passage_ids()[:1]
        dimension = view.vectors(first).shape[1] if len(first) else None
    if fingerprint or dimension is not None:
        catalogue.require("embedder", fingerprint, name)
    if dimension is None and made["defaults"] and not catalogue.defaults:
        catalogue.keep_defaults(made["defaults"])
    if dimension is None and made["read_with"] and not catalogue.read_with:
        catalogue.keep_read_with(made["read_with"])
    return dimension


def _take_document(
    archived: ArchivedDocument, catalogue: Catalogue, tier: DiskTier, replace: bool, done: Exchanged
) -> None:
    merged = catalogue.merge(archived, replace_other=replace)
    tier.remove([*merged.unused, *tier.computed_of(merged.unused)])
    catalogue.dropped(merged.unused)
    if merged.kept:
        done.kept.append(archived.document.source)
    elif merged.there:
        done.documents_there += 1
    else:
        done.documents += 1


def _take_record(offer: Offer, named: set[bytes], catalogue: Catalogue, tier: DiskTier, done: Exchanged) -> None:
    """Take in KV, unless only a document of the archive names them that was not taken in, or that is removed meanwhile."""
    with catalogue.snapshot() as view:
        known = offer.key in named or view.by_id(offer.record.label) is not None
    if known and not _named(catalogue, offer.key):
        done.useless += 1
        return
    before = done.records
    records.take(tier, offer, done)
    # Whoever removes a document strikes it out before its KV: what is stored behind that he may have missed.
    if known and done.records > before and not _named(catalogue, offer.key):
        tier.remove([offer.key])
        done.records, done.useless = before, done.useless + 1


def _named(catalogue: Catalogue, key: bytes) -> bool:
    with catalogue.snapshot() as view:
        return view.names(key)
