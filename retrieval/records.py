"""What the catalogue holds, and the bytes it is kept in."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ragkv.chunk import digest
from ragkv.errors import DocumentError, RecordError, checked_namespace, half_a_pair
from ragkv.folder import unseal

#: In ``meta`` as long as all documents are of the empty namespace; where it is lost each document is looked at.
UNDIVIDED = b"undivided"

#: In ``meta``: before what names a document that came from a publication (:func:`came_key`), and before a publication's namespace.
CAME, FOLLOWED = b"came ", b"followed "

#: In ``meta``: before the key of KV that no reading names any more, and that may still be stored.
UNUSED = b"unused "

# In the number of a reading's keys: the passages that it is behind follow them.
_BEHIND = 1 << 31


@dataclass(frozen=True)
class Document:
    """A document in the catalogue.

    Attributes:
        source: what it is called: a path, a URL, any name. One document a source and namespace.
        content_hash: digest of its passages, 64 hex digits.
        passage_ids: its passages in order. An id is never given to another text.
        metadata: what was given with it.
        spans: where the passages stand in its text, first character and the one behind the last; empty where not known.
        origin: digest of what the passages were cut from, and how; empty where not known.
        namespace: whose it is: it is found by those only who ask within it.
        pages: the page, from 1, that each passage begins on; empty for a document without pages.
        headings: what each passage stands under, ``"Harbours > Clearport"``; empty for a document without headings.
        file: digest of the file that it was read from, and of all that decides what passages it becomes; empty where it is of none.
    """

    source: str
    content_hash: str
    passage_ids: tuple[int, ...]
    metadata: dict[str, Any] = field(default_factory=dict)
    spans: tuple[tuple[int, int], ...] = ()
    origin: str = ""
    namespace: str = ""
    pages: tuple[int, ...] = ()
    headings: tuple[str, ...] = ()
    file: str = field(default="", compare=False)

    @property
    def id(self) -> str:
        """Digest of namespace and source, 64 hex digits: stays when the content changes."""
        return self.key.hex()

    @property
    def key(self) -> bytes:
        """The key of its record."""
        return source_key(self.source, self.namespace)


_FIELDS = [item.name for item in fields(Document)]


@dataclass(frozen=True)
class Passage:
    """A passage where it stands.

    Attributes:
        id: its id in catalogue and index.
        text: its text.
        position: its place among the passages of its document, from 0.
        document: the document that it is a part of.
    """

    id: int
    text: str
    position: int
    document: Document


class Reading(NamedTuple):
    """How one model reads a document: a record that the catalogue keeps and does not look into.

    Attributes:
        setting: 64 hex digits: of what it holds for, so that a document may have several.
        keys: 32 bytes a passage, in order: the keys of their KV.
        record: whatever else there is to know.
        behind: ids of passages of other documents that the record holds: the reading goes with the first of them that goes.
    """

    setting: str
    keys: Sequence[bytes]
    record: bytes
    behind: tuple[int, ...] = ()

    @property
    def named(self) -> set[bytes]:
        """What it is listed under in ``kv``: its keys, and the passages that it is behind."""
        return {*self.keys, *map(behind_key, self.behind)}


@dataclass(frozen=True)
class Change:
    """What adding, replacing or removing a document changed.

    Attributes:
        document: as it is now; a removed document as it was.
        new: ids of the passages that were added.
        kept: ids of the passages that were there before, perhaps at another position.
        removed: ids of the passages that are gone.
        embedded: passages whose vector had to be computed; the others' were known from equal texts.
        replaced: whether there was a version before.
        first_changed: the first position whose text, or the text before it, is not what it was: from here on a
            document has to be read again. None where nothing has to be.
        unused: keys of KV that no document's record names any more.
        states: the catalogue's state before and after.
    """

    document: Document
    new: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()
    removed: tuple[int, ...] = ()
    embedded: int = 0
    replaced: bool = False
    first_changed: int | None = None
    unused: tuple[bytes, ...] = ()
    states: tuple[str, str] = ("", "")


class ArchivedDocument(NamedTuple):
    """A document on its way from one catalogue to another.

    Attributes:
        document: without ids, which are the catalogue's own.
        passages: its n texts in order.
        vectors: float32 ``[n, d]``.
        readings: how models read it.
    """

    document: Document
    passages: Sequence[str]
    vectors: NDArray[np.float32]
    readings: Sequence[Reading]


class Merged(NamedTuple):
    """What taking in an archived document did.

    Attributes:
        kept: another version of the source is there, and stays.
        there: just this document is there already.
        unused: keys of KV that no document's reading names any more.
    """

    kept: bool = False
    there: bool = False
    unused: tuple[bytes, ...] = ()


def source_id(source: str, namespace: str = "") -> str:
    """The id of a source's document."""
    return source_key(source, namespace).hex()


def source_key(source: str, namespace: str = "") -> bytes:
    """The key of a document; those of one namespace stand together, unless it is the empty one.

    Raises:
        DocumentError: the source is no text.
        ArgumentError, ArgumentTypeError: the namespace is none.
    """
    if not isinstance(source, str):
        raise DocumentError(f"a document is named by a str, got {source!r:.80}")
    checked_namespace(namespace)
    key = digest("source", source)
    return namespace_prefix(namespace) + key[:16] if namespace else key


def came_key(document: bytes, namespace: str) -> bytes:
    """Where it stands that a document, by its key, came from a publication, and what it came as."""
    return CAME + namespace_prefix(namespace) + document


def namespace_prefix(namespace: str) -> bytes:
    """What the keys of a namespace's documents begin with."""
    return digest("namespace", namespace)[:16]


def passage_key(passage_id: int) -> bytes:
    """The key of a passage and of its vector; keys sort as ids do."""
    return passage_id.to_bytes(8, "big")


def text_key(text: str, namespace: str = "") -> bytes:
    """The key under which the passages of a text are found, wherever in a namespace they stand.

    Namespaces share no vectors: whoever has a text could tell that it is there.
    """
    return digest("text", text, namespace) if namespace else digest("text", text)


def uses(texts: list[str], ids: Sequence[int], namespace: str) -> set[tuple[bytes, bytes]]:
    """What stands for a document in ``uses``: every passage under its text key."""
    return {(text_key(text, namespace), passage_key(passage_id)) for text, passage_id in zip(texts, ids, strict=True)}


def reading_key(source_key: bytes, setting: str) -> bytes:
    """The key of a document's reading; those of one document stand together."""
    return source_key + bytes.fromhex(setting)


def behind_key(passage_id: int) -> bytes:
    """The key in ``kv`` of the readings that are behind a passage."""
    return digest("behind", passage_key(passage_id))


def reading_payload(reading: Reading) -> bytes:
    """A reading's record: the number of its keys, the keys, the passages that it is behind if any, the rest."""
    behind = b"".join(map(passage_key, reading.behind))
    counted = len(behind).to_bytes(4, "little") + behind if behind else b""
    first = len(reading.keys) | (_BEHIND if behind else 0)
    return first.to_bytes(4, "little") + b"".join(reading.keys) + counted + reading.record


def reading_from(key: bytes, payload: bytes) -> Reading:
    """The reading of a record."""
    first, behind = int.from_bytes(payload[:4], "little"), b""
    end = 4 + 32 * (first & ~_BEHIND)
    keys = [payload[at : at + 32] for at in range(4, end, 32)]
    if first & _BEHIND:
        start, end = end + 4, end + 4 + int.from_bytes(payload[end : end + 4], "little")
        behind = payload[start:end]
    ids = tuple(int.from_bytes(behind[at : at + 8], "big") for at in range(0, len(behind), 8))
    return Reading(key[32:].hex(), keys, payload[end:], ids)


def opened(what: str, key: bytes, record: bytes) -> bytes:
    """The payload of a sealed record.

    Raises:
        RecordError: it is not what was written under this key.
    """
    try:
        return unseal(key, record)
    except RecordError as error:
        raise RecordError(
            f"the catalogue's record of {what} is damaged: Catalogue.repair() or 'ragkv verify --repair' mends or names it"
        ) from error


def document_payload(document: Document) -> bytes:
    """A document's record, JSON."""
    return json.dumps(vars(document), ensure_ascii=False).encode()


def document_of(key: bytes, record: bytes) -> Document:
    """The document of a sealed record, which may be damaged (:class:`~ragkv.errors.RecordError`)."""
    return document_from(opened("a document", key, record))


def document_from(payload: bytes) -> Document:
    """The document of a record's payload."""
    facts = json.loads(payload)
    given = {name: facts[name] for name in _FIELDS if name in facts}  # fewer in those of former versions
    tuples = {name: tuple(given[name]) for name in ("passage_ids", "pages", "headings") if name in given}
    return Document(**given | tuples | {"spans": tuple(map(tuple, given.get("spans", ())))})


def misplaced(document: Document, passages: int) -> str:
    """What is wrong with where a document's passages stand; empty where nothing is."""
    for name, one, holds in (
        ("spans", "a pair of first character and the one behind the last", _is_span),
        ("pages", "a number from 1", lambda page: isinstance(page, int) and page > 0),
        ("headings", "a str", lambda heading: isinstance(heading, str)),
    ):
        given = getattr(document, name)
        if len(given) not in (0, passages):
            return f"got {len(given)} {name} for {passages} passages"
        if not all(map(holds, given)):
            return f"each of {name} must be {one}, got {given!r:.80}"
    said = "".join((document.origin, document.file, *document.headings))
    return f"not valid Unicode: half a surrogate pair in {said!a:.80}" if half_a_pair(said) else ""


def _is_span(span: Any) -> bool:
    pair = isinstance(span, tuple | list) and len(span) == 2 and all(isinstance(at, int) for at in span)
    return pair and 0 <= span[0] <= span[1]


def vector_payload(vector: NDArray[np.float32]) -> bytes:
    """A vector's record, little-endian float32."""
    return vector.astype("<f4").tobytes()


def vector_from(payload: bytes) -> NDArray[np.float32]:
    """The vector of a record."""
    return np.frombuffer(payload, "<f4").astype(np.float32)


def checked_document(source: Any, passages: Any, metadata: Any) -> tuple[str, list[str], dict[str, Any]]:
    """A document as it can be stored.

    Raises:
        DocumentError: no source, no passages, a blank passage, text that is not valid Unicode, metadata that JSON
            cannot hold.
    """
    if not isinstance(source, str) or not source.strip():
        raise DocumentError(f"a document needs a source, a str that is not blank; got {source!r}")
    texts = [] if isinstance(passages, str) or not isinstance(passages, Iterable) else list(passages)
    if not all(isinstance(text, str) for text in texts):
        raise DocumentError(f"{source}: passages must be a list of str")
    if not texts:
        raise DocumentError(f"{source}: a document needs at least one passage, as a list of str; got {passages!r}")
    for position, text in enumerate(texts):
        if not text.strip():
            raise DocumentError(f"{source}: passage {position} is blank")
    try:
        encoded = json.dumps(metadata or {}, ensure_ascii=False, allow_nan=False)
        "".join([source, encoded, *texts]).encode()
    except UnicodeEncodeError as error:
        raise DocumentError(f"{source!a}: not valid Unicode: half a surrogate pair") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise DocumentError(f"{source}: metadata must be what JSON can hold: {error}") from error
    parsed = json.loads(encoded)
    if not isinstance(parsed, dict):
        raise DocumentError(f"{source}: metadata must be a dict, got {type(metadata).__name__}")
    return source, texts, parsed
