"""How a model reads the documents of a catalogue: records beside their passages, made once for each setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ragkv.chunk import Chunk
from ragkv.errors import DocumentError
from ragkv.library.document import Document
from ragkv.library.documents import Documents
from ragkv.retrieval import Catalogue, Hit, Reading, Snapshot
from ragkv.retrieval.records import Document as Listed
from ragkv.retrieval.records import reading_key


class CataloguedDocuments:
    """From a catalogue's documents to the chunks that a model reads; the catalogue as :class:`~ragkv.library.records.Records`.

    Args:
        catalogue: has the passages; keeps the records in the same transactions.
        documents: reads them.
    """

    def __init__(self, catalogue: Catalogue, documents: Documents):
        self._catalogue, self._documents = catalogue, documents
        self._made: list[tuple[Listed, Reading]] = []
        documents.records.append(self)

    def find(self, document_id: str) -> Document | None:
        """See the protocol."""
        with self._catalogue.snapshot() as view:
            listed = view.by_id(document_id)
            return None if listed is None else self.kept(view, listed)

    def holds(self, chunks: Mapping[bytes, Chunk]) -> set[bytes]:
        """See the protocol."""
        with self._catalogue.snapshot() as view:
            return {key for key in chunks if view.names(key)}

    def reading(self, document: Document) -> Reading:
        """What the catalogue keeps of a document."""
        return Reading(self._documents.setting, self._documents.keys_of(document), document.to_bytes())

    def kept(self, view: Snapshot, listed: Listed) -> Document | None:
        """A document as the model reads it, if that is kept."""
        reading = view.reading(reading_key(bytes.fromhex(listed.id), self._documents.setting))
        return None if reading is None else Document.from_bytes(reading.record)

    def read(self, view: Snapshot, listed: Listed) -> Reading:
        """How the model reads a document: as it is kept, or found out now and kept by :meth:`keep_made`.

        The latter in a folder that another model has used so far.
        """
        reading = view.reading(reading_key(bytes.fromhex(listed.id), self._documents.setting))
        if reading is None:
            reading = self.reading(self._documents.cut(view.texts(listed), listed.id))
            self._made.append((listed, reading))
        return reading

    def now(self, document_id: str) -> list[Chunk]:
        """The chunks of a document as it is now; none where it is gone."""
        with self._catalogue.snapshot() as view:
            listed = view.by_id(document_id)
            record = None if listed is None else self.read(view, listed).record
        self.keep_made()
        return [] if record is None else list(Document.from_bytes(record))

    def keep_made(self) -> None:
        """Keeps what had to be found out, in one transaction."""
        made, self._made = self._made, []
        if made:
            self._catalogue.keep(made)

    def chunks(self, hits: Sequence[Hit]) -> list[Chunk]:
        """The chunks of passages that were found, each in the context of its document.

        Raises:
            DocumentError: a hit that was found without asking how its document is read, and that is gone meanwhile.
        """
        documents: dict[str, Document] = {}
        for hit in hits:
            if hit.document_id not in documents:
                documents[hit.document_id] = Document.from_bytes((hit.reading or self._now(hit)).record)
        self.keep_made()
        return [
            replace(documents[hit.document_id][hit.position], text=hit.text, span=hit.span, metadata=hit.metadata)
            for hit in hits
        ]

    def _now(self, hit: Hit) -> Reading:
        with self._catalogue.snapshot() as view:
            listed = view.by_id(hit.document_id)
            if listed is None or listed.passage_ids[hit.position : hit.position + 1] != (hit.passage_id,):
                raise DocumentError(
                    f"passage {hit.position} of {hit.source} is not what was found any more: search again"
                )
            return self.read(view, listed)
