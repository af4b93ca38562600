"""The catalogue as it was at one moment."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ragkv.errors import RecordError, RetrievalError
from ragkv.folder import Transaction
from ragkv.retrieval import records
from ragkv.retrieval.records import Document, Passage, Reading

_LOG = logging.getLogger("ragkv.retrieval")


class Snapshot:
    """Reads one committed state of the catalogue; valid inside its ``with`` block only.

    Whatever it returns is a copy and stays valid.
    """

    def __init__(self, txn: Transaction) -> None:
        self._txn = txn
        self._documents: dict[bytes, Document | None] = {}

    @property
    def state(self) -> str:
        """Differs between any two states whose passages differ."""
        return (self._txn.get("meta", b"state") or b"").decode()

    @property
    def settings(self) -> dict[str, dict[str, str]]:
        """What the folder was made with: ``{what: {"fingerprint": ..., "name": ...}}``."""
        return json.loads(self._txn.get("meta", b"settings") or b"{}")

    @property
    def defaults(self) -> dict[str, Any]:
        """What the folder is opened with where nothing else is said."""
        return json.loads(self._txn.get("meta", b"defaults") or b"{}")

    @property
    def read_with(self) -> dict[str, str]:
        """What documents were last read with, by name."""
        return json.loads(self._txn.get("meta", b"read with") or b"{}")

    def outside(self) -> AbstractContextManager[None]:
        """A block for work of others that takes long, or waits: whoever forks or closes the folder need not wait for it."""
        return self._txn.outside()

    def __len__(self) -> int:
        return self._txn.count("documents")

    def documents(
        self, namespace: str | None = None, damaged: Callable[[str, RecordError], object] | None = None
    ) -> Iterator[Document]:
        """The documents of a namespace, by default of all, in no particular order.

        Args:
            namespace: whose; ``None`` for all.
            damaged: told of a document that is damaged, by its id, which is passed over then.

        Raises:
            RecordError: a document is damaged, and nobody wants to be told.
        """
        prefix = records.namespace_prefix(namespace) if namespace else b""
        for key, record in self._txn.items("documents", prefix):
            try:
                document = records.document_of(key, record)
            except RecordError as error:
                if damaged is None:
                    raise
                damaged(key.hex(), error)
                continue
            if namespace is None or document.namespace == namespace:
                yield document

    def all_within(self, namespace: str) -> bool:
        """Whether it is known, without looking at each, that all documents are of a namespace."""
        if not namespace:
            return self._txn.has("meta", records.UNDIVIDED)
        return sum(1 for _ in self._txn.keys("documents", records.namespace_prefix(namespace))) == len(self)

    def passages_within(self, namespace: str) -> list[int] | None:
        """The ids of a namespace's passages; ``None`` where it is known that they are all there are."""
        if self.all_within(namespace):
            return None
        return [passage_id for document in self.documents(namespace) for passage_id in document.passage_ids]

    def get(self, source: str, namespace: str = "") -> Document | None:
        """The document of a source; None where there is none."""
        return self._document(records.source_key(source, namespace))

    def by_id(self, document_id: str) -> Document | None:
        """The document of an id; None where there is none."""
        try:
            key = bytes.fromhex(document_id)
        except ValueError:
            return None
        return self._document(key) if len(key) == 32 else None

    def texts(self, document: Document) -> list[str]:
        """The passages of a document, in order."""
        return [self._text(passage_id)[1] for passage_id in document.passage_ids]

    def passage(self, passage_id: int) -> Passage:
        """The passage of an id.

        Raises:
            RetrievalError: there is no such passage.
        """
        key, text = self._text(passage_id)
        document = self._document(key)
        if document is None or passage_id not in document.passage_ids:
            raise RecordError(
                f"the catalogue is damaged: passage {passage_id} belongs to no document; Catalogue.repair() or "
                "'ragkv verify --repair' mends it"
            )
        return Passage(passage_id, text, document.passage_ids.index(passage_id), document)

    def passage_ids(self) -> NDArray[np.int64]:
        """The ids of all passages, int64 ``[n]``, ascending."""
        keys = b"".join(self._txn.keys("passages"))
        return np.frombuffer(keys, ">i8").astype(np.int64)

    def text_digests(self) -> Iterator[tuple[int, bytes]]:
        """The id of every passage and the digest of its text, 32 bytes, in no particular order."""
        for key, passage_id in self._txn.items("uses"):
            yield int.from_bytes(passage_id, "big"), key

    def has_passage(self, passage_id: int) -> bool:
        """Whether there is a passage of an id."""
        return 0 <= passage_id < 2**63 and self._txn.has("passages", records.passage_key(passage_id))

    def passage_text(self, passage_id: int) -> str:
        """The text of a passage.

        Raises:
            RetrievalError: there is no such passage.
        """
        return self._text(passage_id)[1]

    def vectors(self, passage_ids: Iterable[int]) -> NDArray[np.float32]:
        """The vectors of passages, float32 ``[n, d]``; ``[0, 0]`` for no ids."""
        rows = [self.vector(int(passage_id)) for passage_id in passage_ids]
        return np.stack(rows) if rows else np.empty((0, 0), np.float32)

    def vector(self, passage_id: int) -> NDArray[np.float32]:
        """The vector of a passage, float32 ``[d]``.

        Raises:
            RecordError: it is missing or damaged.
        """
        key = records.passage_key(passage_id)
        record = self._txn.get("vectors", key)
        if record is None:
            raise RecordError(
                f"the catalogue is damaged: passage {passage_id} has no vector; Catalogue.repair() or "
                "'ragkv verify --repair' mends it"
            )
        return records.vector_from(records.opened(f"the vector of passage {passage_id}", key, record))

    def vector_of(self, text: str, namespace: str = "") -> NDArray[np.float32]:
        """The vector of a text that some passage of a namespace has, float32 ``[d]``.

        Raises:
            RetrievalError: none has it.
            RecordError: it is missing or damaged.
        """
        key = self._txn.get("uses", records.text_key(text, namespace))
        if key is None:
            raise RetrievalError(f"no passage has the text {text!r:.80}: its vector has to be given")
        return self.vector(int.from_bytes(key, "big"))

    def has_text(self, text: str, namespace: str = "") -> bool:
        """Whether any passage of a namespace has this text."""
        return self.used(records.text_key(text, namespace))

    def used(self, key: bytes) -> bool:
        """Whether any passage stands under a text key."""
        return self._txn.has("uses", key)

    def read_for(self, source_key: bytes) -> list[str]:
        """The settings for which it is kept how a model reads a document."""
        return [key[32:].hex() for key, _ in self._txn.items("readings", source_key)]

    def readings(self, document: Document) -> list[Reading]:
        """How models read a document, as far as that is kept and sound."""
        key = document.key
        found = [self.reading(records.reading_key(key, setting)) for setting in self.read_for(key)]
        return [reading for reading in found if reading is not None]

    def reading(self, key: bytes) -> Reading | None:
        """The reading of a key (:func:`~ragkv.retrieval.records.reading_key`); None where it is not kept, or damaged."""
        record = self._txn.get("readings", key)
        if record is None:
            return None
        try:
            return records.reading_from(key, records.opened("a reading", key, record))
        except RecordError as error:
            _LOG.warning("a document is read anew: %s", error)
            return None

    def keeps(self, document: Document, reading: Reading) -> bool:
        """Whether just this reading of a document is kept."""
        return self.reading(records.reading_key(document.key, reading.setting)) == reading

    def named(self) -> list[bytes]:
        """The keys of all KV that some document's reading names, each once."""
        return list(dict.fromkeys(self._txn.keys("kv")))

    def names(self, kv: bytes) -> bool:
        """Whether any document's reading names the KV of a key."""
        return self._txn.has("kv", kv)

    def _document(self, key: bytes) -> Document | None:
        if key not in self._documents:
            record = self._txn.get("documents", key)
            self._documents[key] = None if record is None else records.document_of(key, record)
        return self._documents[key]

    def _text(self, passage_id: int) -> tuple[bytes, str]:
        """The key of a passage's document, and its text."""
        key = records.passage_key(passage_id) if 0 <= passage_id < 2**63 else b"none"
        record = self._txn.get("passages", key)
        if record is None:
            raise RetrievalError(f"there is no passage {passage_id}: it was removed, or never added")
        payload = records.opened(f"passage {passage_id}", key, record)
        return payload[:32], payload[32:].decode()
