"""How a model reads the documents of a catalogue: records beside their passages, made once for each setting."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ragkv.chunk import Chunk
from ragkv.errors import DocumentError, RecordError, StoreError
from ragkv.library.document import ChunkedDocument
from ragkv.library.documents import Documents
from ragkv.library.repair import plan_repair, repair
from ragkv.retrieval import Change, Hit, Reading, Retrieval, Retriever, Snapshot
from ragkv.retrieval.records import Document, reading_key, source_id

logger: logging.Logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A document that is about to be added.

    Attributes:
        source: what it is called.
        passages: its texts in order.
        metadata: what was given with it.
        facts: ``spans``, ``origin``, ``pages``, ``headings`` and ``file``, see :class:`~ragkv.retrieval.Document`.
        document: as the model reads it.
        kind: ``"added"``, ``"changed"`` or ``"unchanged"``: what adding it will be.
    """

    source: str
    passages: list[str]
    metadata: dict[str, Any] | None
    facts: dict[str, Any]
    document: ChunkedDocument
    kind: str


class CataloguedDocuments:
    """From a catalogue's documents to the chunks that a model reads; the catalogue as :class:`~ragkv.library.records.Records`.

    Args:
        retriever: its catalogue has the passages, and keeps the records in the same transactions.
        documents: reads them.

    Attributes:
        retriever, documents: as given.
    """

    def __init__(self, retriever: Retriever, documents: Documents):
        self.retriever: Retriever = retriever
        self.documents: Documents = documents
        self._catalogue = retriever.catalogue
        self._made: list[tuple[Document, Reading]] = []
        documents.records.append(self)

    def close(self) -> None:
        """The documents know of the catalogue no more. Closing twice is fine."""
        if self in self.documents.records:
            self.documents.records.remove(self)

    def find(self, document_id: str) -> ChunkedDocument | None:
        """See the protocol."""
        with self._catalogue.snapshot() as view:
            listed = view.by_id(document_id)
            return None if listed is None else self.kept(view, listed)

    def holds(self, chunks: Mapping[bytes, Chunk]) -> set[bytes]:
        """See the protocol."""
        with self._catalogue.snapshot() as view:
            return {key for key in chunks if view.names(key)}

    def put(self, prepared: Prepared, repair_tokens: int | None, read: bool = True) -> tuple[Change, int]:
        """Add a document, or replace the one of the same source, and read what the store lacks of it.

        Args:
            prepared: from :func:`ragkv.library.preparing.prepare`.
            repair_tokens: see :class:`~ragkv.RAG`.
            read: or leave that for later.

        Returns:
            What changed in the catalogue, and the tokens that the model read.

        Raises:
            StoreFullError: document and vectors are stored, but KV do not fit.
        """
        documents, source, passages = self.documents, prepared.source, prepared.passages
        documents.look()
        _, before, old = self.before(source)
        document = before if before is not None and old == passages else prepared.document
        plan = None
        if read and before is not None and document is not before and repair_tokens is not None:
            plan = plan_repair(documents, list(before), document, repair_tokens)
        # The catalogue first: whatever is cut short later is read again, and no KV are left that nobody names.
        reading = self.reading(document if plan is None else plan.document)
        more = {**prepared.facts, "reading": reading, "namespace": documents.namespace}
        change = self.retriever.add(source, passages, prepared.metadata, **more)
        tokens = None
        try:
            if plan is not None:  # from KV of the version before
                tokens = repair(documents, plan)
                if tokens is None:
                    self.drop(self._catalogue.keep([(change.document, self.reading(document))]))
        finally:
            self.drop(change.unused)
        if tokens is None:
            tokens = documents.add(list(filter(documents.fits, document))) if read else 0
        return change, tokens

    def before(self, source: str) -> tuple[Document | None, ChunkedDocument | None, list[str]]:
        """The document of a source as it is now, as the model reads it where that is kept, and its passages."""
        with self._catalogue.snapshot() as view:
            listed = view.get(source, self.documents.namespace)
            return (None, None, []) if listed is None else (listed, self.kept(view, listed), view.texts(listed))

    def rename(self, source: str, to: str) -> bool:
        """Call a document by another source: nothing is read or embedded again. Whether it was so called."""
        namespace = self.documents.namespace
        to_id = source_id(to, namespace)
        return self._catalogue.rename(source, to, lambda reading: _reread(reading, to_id), namespace) is not None

    def remove(self, source: str) -> Change:
        """Remove a document, and the KV that no other one needs.

        Raises:
            DocumentError: there is no such document.
            StoreError: it is removed, and its KV cannot be.
        """
        change = self.retriever.remove(source, self.documents.namespace)
        try:
            self.drop(change.unused)
        except StoreError as error:
            said = f"{source} is removed, but its KV are still stored: {error}; they go when the folder is opened again"
            raise type(error)(said) from error
        return change

    def drop(self, unused: Iterable[bytes]) -> None:
        """Remove KV that no document's reading names any more. That they were to go is noted until they are gone."""
        keys = list(unused)
        if keys:
            self.documents.drop(keys)
            self._catalogue.dropped(keys)

    def finish(self) -> None:
        """Remove the KV that somebody did not come to remove, who was killed or had no room to."""
        if self._catalogue.readonly:
            return
        try:
            self.drop(self._catalogue.unused())
        except StoreError as error:
            logger.warning("KV of documents that were removed are still stored: %s", str(error))

    def reading(self, document: ChunkedDocument) -> Reading:
        """What the catalogue keeps of a document."""
        keys = self.documents.keys_of(document)
        return Reading(self.documents.setting, keys, document.to_bytes(), document.behind)

    def kept(self, view: Snapshot, listed: Document) -> ChunkedDocument | None:
        """A document as the model reads it, if that is kept."""
        reading, document = self._kept(view, listed)
        return replace(document, id=listed.id, behind=reading.behind) if reading and document else None

    def read(self, view: Snapshot, listed: Document) -> Reading:
        """How the model reads a document: as it is kept, or found out now and kept by :meth:`keep_made`.

        The latter in a folder that another model has used so far.
        """
        reading, document = self._kept(view, listed)
        if reading is None or document is None:
            reading = self.reading(self.documents.cut(view.texts(listed), listed.id, any_length=True))
        elif document.id != listed.id:
            reading = reading._replace(record=replace(document, id=listed.id).to_bytes())
        else:
            return reading
        self._made.append((listed, reading))
        return reading

    def search(
        self, question: str, retrieval: Retrieval, first: Callable[[list[Hit]], object] | None = None
    ) -> list[Hit]:
        """The passages for a question, in the order of the prompt; ``first`` as for :meth:`ragkv.retrieval.Retriever.find`."""
        given: dict[str, Any] = {"namespace": self.documents.namespace, "readings": self.read, "tokens": _lengths}
        return self.retriever.find(question, retrieval, **given, first=first)

    def now(self, document_id: str) -> list[Chunk]:
        """The chunks of a document as it is now, without those that are too long for the model; none where it is gone."""
        with self._catalogue.snapshot() as view:
            listed = view.by_id(document_id)
            record = None if listed is None else self.read(view, listed).record
        self.keep_made()
        return [] if record is None else list(filter(self.documents.fits, ChunkedDocument.from_bytes(record)))

    def read_behind(
        self, document_id: str, fronts: Mapping[int, Sequence[tuple[int, ...]]], behind: tuple[int, ...]
    ) -> None:
        """Have a document read behind other passages from now on; KV that nothing needs any more go.

        Args:
            document_id: its id.
            fronts, behind: see :class:`ChunkedDocument`.
        """
        with self._catalogue.snapshot() as view:
            listed = view.by_id(document_id)
            if listed is None:
                return
            document = ChunkedDocument.from_bytes(self.read(view, listed).record).read_behind(fronts, behind)
        self.drop(self._catalogue.keep([(listed, self.reading(document))]))

    def keep_made(self) -> None:
        """Keeps what had to be found out, in one transaction."""
        made, self._made = self._made, []
        try:
            if made:
                self._catalogue.keep(made)
        except StoreError as error:  # full, or open for reading only: it is found out again next time
            logger.warning("how documents are read could not be kept: %s", str(error))

    def chunks(self, hits: Sequence[Hit]) -> list[Chunk]:
        """The chunks of passages that were found, each in the context of its document; also those that are too long for the model.

        Raises:
            DocumentError: a hit that was found without asking how its document is read, and that is gone meanwhile.
        """
        documents: dict[str, ChunkedDocument] = {}
        for hit in hits:
            if hit.document_id not in documents:
                documents[hit.document_id] = ChunkedDocument.from_bytes((hit.reading or self._now(hit)).record)
        self.keep_made()
        found = [documents[hit.document_id][hit.position] for hit in hits]
        return [
            replace(chunk, text=hit.text, span=hit.span, metadata=hit.metadata, name=hit.source)
            for hit, chunk in zip(hits, found, strict=True)
        ]

    def at(self, places: Mapping[int, tuple[str, int, str]]) -> dict[int, Hit]:
        """Passages by where they stand, for :meth:`chunks`: only those that are there, with just this text.

        Args:
            places: each the id of a document, a number among its passages, and a text.
        """
        hits: dict[int, Hit] = {}
        with self._catalogue.snapshot() as view:
            for name, (document_id, number, text) in places.items():
                listed = view.by_id(document_id)
                if listed is None or listed.namespace != self.documents.namespace:
                    continue
                ids = listed.passage_ids[number : number + 1] if number >= 0 else ()
                passage = view.passage(ids[0]) if ids else None
                if passage is not None and passage.text == text:
                    hits[name] = Hit.of(passage, 1.0, self.read(view, listed))
        return hits

    def _kept(self, view: Snapshot, listed: Document) -> tuple[Reading | None, ChunkedDocument | None]:
        reading = view.reading(reading_key(listed.key, self.documents.setting))
        return reading, None if reading is None else _parsed(reading, listed)

    def _now(self, hit: Hit) -> Reading:
        with self._catalogue.snapshot() as view:
            listed = view.by_id(hit.document_id)
            if listed is None or listed.passage_ids[hit.position : hit.position + 1] != (hit.passage_id,):
                raise DocumentError(
                    f"passage {hit.position} of {hit.source} is not what was found any more: search again"
                )
            return self.read(view, listed)


def _lengths(reading: Reading) -> list[int]:
    """The tokens of each passage."""
    return [len(ids) for ids in ChunkedDocument.from_bytes(reading.record).ids]


def _reread(reading: Reading, document_id: str) -> Reading | None:
    """How a model reads a document that has another id now; None where the record is of another version."""
    try:
        document = ChunkedDocument.from_bytes(reading.record)
    except RecordError:
        return None
    return reading._replace(record=replace(document, id=document_id).to_bytes())


def _parsed(reading: Reading, listed: Document) -> ChunkedDocument | None:
    """A document as a model reads it; ``None`` where the record is not one of this document, and it is found out anew.

    It may have the id that the document had when catalogues had no namespaces.
    """
    try:
        document = ChunkedDocument.from_bytes(reading.record)
    except RecordError as error:
        logger.warning("how %s is read is damaged, and found out anew: %s", listed.source, str(error))
        return None
    ids = listed.id, source_id(listed.source)
    return document if len(document) == len(listed.passage_ids) and document.id in ids else None
