"""Documents in an archive, with passages, vectors and readings: see :mod:`ragkv.folder.archive`.

A member is a safetensors file: ``document`` (JSON in UTF-8: source, texts, where they stand, metadata), ``vectors`` float32
``[n, d]``, and for each reading ``keys.I`` uint8 ``[n, 32]`` and ``record.I`` uint8.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ragkv.chunk import digest
from ragkv.errors import DocumentError, RecordError
from ragkv.folder.archive import UNREADABLE, Member
from ragkv.retrieval.records import (
    ArchivedDocument,
    Document,
    Reading,
    checked_document,
    document_from,
    document_payload,
    misplaced,
)
from ragkv.retrieval.snapshot import Snapshot


def packed(view: Snapshot, document: Document, setting: str | None = None) -> Member:
    """A document as a member of an archive, without readings that hold passages of other documents.

    Args:
        view: has it.
        document: which.
        setting: for which the reading is taken along; by default all are.

    Raises:
        RecordError: a text or a vector of it is damaged.
    """
    readings = [
        reading for reading in view.readings(document) if not reading.behind and setting in (None, reading.setting)
    ]
    facts = json.loads(document_payload(replace(document, passage_ids=())))
    facts |= {"texts": view.texts(document), "settings": [reading.setting for reading in readings]}
    arrays = {"document": _bytes(json.dumps(facts, ensure_ascii=False).encode())}
    arrays["vectors"] = view.vectors(document.passage_ids).astype("<f4")
    for number, reading in enumerate(readings):
        arrays[f"keys.{number}"] = _bytes(b"".join(reading.keys)).reshape(-1, 32)
        arrays[f"record.{number}"] = _bytes(reading.record)
    return sealed(f"documents/{document.id}.safetensors", save(arrays))


def unpacked(member: Member, namespace: str = "") -> ArchivedDocument:
    """The document of a member.

    Args:
        member: of the archive.
        namespace: of documents that were written before they had one.

    Raises:
        RecordError: it is damaged, or cannot be.
    """
    try:
        return _parsed(opened(member), namespace)
    except (DocumentError, SafetensorError, *UNREADABLE) as error:
        raise RecordError(f"{member.name} is damaged: {error}") from error


def sealed(name: str, data: bytes) -> Member:
    """A member with a checksum over all of it."""
    return Member(name, data, checksum=xxhash.xxh3_64_hexdigest(name.encode() + data))


def opened(member: Member) -> Member:
    """The member, where its checksum is right.

    Raises:
        RecordError: it differs.
    """
    if member.checksum != sealed(member.name, member.data).checksum:
        raise RecordError(f"{member.name} is damaged: its checksum differs")
    return member


def _parsed(member: Member, namespace: str) -> ArchivedDocument:
    arrays = load(member.data)
    facts = json.loads(arrays["document"].tobytes())
    _, texts, metadata = checked_document(facts["source"], facts["texts"], facts["metadata"])
    document = replace(document_from(arrays["document"].tobytes()), metadata=metadata)
    vectors = arrays["vectors"]
    readings = [_reading(setting, arrays, number) for number, setting in enumerate(facts["settings"])]
    wrong = (
        (member.name != f"documents/{document.id}.safetensors", "it has another document's name"),
        (document.content_hash != digest(*texts).hex(), "its texts do not give its content hash"),
        (document.passage_ids != (), "it has ids of its own"),
        (misplaced(document, len(texts)) != "", "passages that cannot stand where it says"),
        (not isinstance(document.origin, str) or not isinstance(document.file, str), "an origin that is no text"),
        (not isinstance(document.namespace, str), "a namespace that is no text"),
        (vectors.dtype != np.float32 or vectors.ndim != 2 or len(vectors) != len(texts), "not a vector a passage"),
        (not vectors.size or not np.isfinite(vectors).all(), "a vector that is none"),
        (any(len(reading.keys) != len(texts) for reading in readings), "a reading of other passages"),
    )
    for holds, reason in wrong:
        if holds:
            raise ValueError(reason)
    if "namespace" not in facts:
        document = replace(document, namespace=namespace)
    return ArchivedDocument(document, texts, vectors, readings)


def _reading(setting: Any, arrays: dict[str, NDArray[Any]], number: int) -> Reading:
    keys = arrays[f"keys.{number}"]
    if len(bytes.fromhex(setting)) != 32 or keys.dtype != np.uint8 or keys.ndim != 2 or keys.shape[1] != 32:
        raise ValueError("a reading that cannot be")
    return Reading(setting, [key.tobytes() for key in keys], arrays[f"record.{number}"].tobytes())


def _bytes(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8)
