"""The durable list of documents, passages and vectors: every change is one transaction."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ragkv.chunk import digest
from ragkv.errors import DocumentError, OfOneProcess, checked_namespace, instance
from ragkv.retrieval import records
from ragkv.retrieval.changes import checked_vectors, merged, noted_unused, put_readings, renamed, replaced
from ragkv.retrieval.folder import CatalogueFolder
from ragkv.retrieval.following import Following, Seen, seen, taken_over
from ragkv.retrieval.records import ArchivedDocument, Change, Document, Merged, Passage, Reading
from ragkv.retrieval.snapshot import Snapshot
from ragkv.retrieval.upkeep import Embed, problems, repaired


class Catalogue(CatalogueFolder, OfOneProcess, instead="open its folder where it is needed, Catalogue(path)"):
    """Which documents there are, their passages in order, and the passages' vectors.

    A change is kept whole or not at all, also when the process is killed in the middle of it, and it is on the disk
    when the call returns. Several objects, threads and processes may read and write one folder, also across a fork; writers
    queue. A folder that may not be written to opens for reading.

    Args:
        path: the folder, made if it is not there; None for a temporary one that goes with the object.
        readonly: open the folder for reading only; it must be there.

    Raises:
        StoreError: the folder cannot be used.
        RecordError: the folder holds something else, is damaged, or was made by a newer version.
    """

    def put(
        self,
        source: str,
        passages: list[str],
        embed: Embed,
        metadata: dict[str, Any] | None = None,
        *,
        spans: Sequence[tuple[int, int]] = (),
        origin: str = "",
        pages: Sequence[int] = (),
        headings: Sequence[str] = (),
        file: str = "",
        reading: Reading | None = None,
        namespace: str = "",
    ) -> Change:
        """Adds a document, or replaces the one of the same source and namespace.

        Passages whose text was in the version before keep their ids. Nothing is embedded whose text any document of the namespace
        has. A document that is there already, all of it equal, changes nothing.

        Args:
            source: what the document is called.
            passages: its texts in order, none blank.
            embed: gives the vectors, float32 ``[n, d]``, of texts; called outside of any transaction.
            metadata: anything that JSON can hold.
            spans, pages, headings: see :class:`Document`; one a passage, or none.
            origin, file: see :class:`Document`.
            reading: how a model reads it, kept in the same transaction. Those of other models stay if no passage changes.
            namespace: see :class:`Document`.

        Raises:
            DocumentError: the document cannot be stored as it is.
            RetrievalError: ``embed`` gave something else than one vector a text.
            StoreFullError: disk or map are full; nothing was changed.
        """
        source, passages, metadata = records.checked_document(source, passages, metadata)
        instance("origin", origin, str, "a str")
        instance("file", file, str, "a str")
        instance("reading", reading, Reading | None, "a ragkv.retrieval.Reading")
        for name, items in (("spans", spans), ("pages", pages), ("headings", headings)):
            instance(name, items, list | tuple, "a list, one a passage")
        facts = tuple(spans), origin, namespace, tuple(pages), tuple(headings), file
        given = Document(source, digest(*passages).hex(), (), metadata, *facts)
        wrong = records.misplaced(given, len(passages))
        if wrong:
            raise DocumentError(f"{source}: {wrong}")
        readings = [] if reading is None else [reading]
        vectors: dict[str, NDArray[np.float32]] = {}
        while True:
            with self.snapshot() as view:
                old = view.get(source, namespace)
                if (
                    old is not None
                    and (replace(old, passage_ids=()), old.file) == (given, file)
                    and all(view.keeps(old, each) for each in readings)
                ):
                    return Change(old, kept=old.passage_ids, replaced=True, states=(view.state,) * 2)
                known = {*vectors, *(text for text in passages if view.has_text(text, namespace))}
            missing = [text for text in dict.fromkeys(passages) if text not in known]
            vectors.update(zip(missing, checked_vectors(embed(missing), len(missing)), strict=True) if missing else ())
            with self._environment.transaction(write=True) as txn:
                view = Snapshot(txn)
                # Another process may have removed a text whose vector was counted on.
                if all(text in vectors or view.has_text(text, namespace) for text in passages):
                    return replace(replaced(txn, given, passages, vectors, readings), embedded=len(vectors))

    def merge(self, archived: ArchivedDocument, *, replace_other: bool = False) -> Merged:
        """Takes in a document of an archive, in one transaction; nothing is embedded.

        A version that is there stays, and is given the readings that it lacks where its passages are equal.

        Args:
            archived: with vectors of this catalogue's embedder.
            replace_other: put it in the place of the version that is there.
        """
        with self._environment.transaction(write=True) as txn:
            return merged(txn, archived, replace_other)

    def seen(self, namespace: str = "") -> Seen:
        """What there is of a namespace's publication, see :meth:`follow`."""
        with self._environment.transaction() as txn:
            return seen(txn, namespace)

    def follow(
        self,
        namespace: str,
        before: bytes,
        publication: bytes,
        present: Collection[bytes],
        changed: Mapping[bytes, tuple[ArchivedDocument, bytes]],
    ) -> Following | None:
        """Puts a publication in the place of the one before, in one transaction; nothing is embedded.

        Documents that came from the one before and are not in this one go. Those of this folder's own stay.

        Args:
            namespace: of all its documents.
            before: the id of the one before, as :meth:`seen` said.
            publication: its id.
            present: the keys of its documents.
            changed: those that did not come as they are now, by key, and what they come as.

        Returns:
            What was done; ``None`` where another has come in the place of the one before: nothing was.
        """
        with self._environment.transaction(write=True) as txn:
            return taken_over(txn, namespace, before, publication, present, changed)

    def keep(self, readings: Sequence[tuple[Document, Reading]]) -> set[bytes]:
        """Keeps how a model reads documents that are there, in one transaction; those that have changed are passed over.

        Returns:
            Keys of KV that were named before and are no more.
        """
        with self._environment.transaction(write=True) as txn:
            view, unused = Snapshot(txn), set[bytes]()
            for document, reading in readings:
                if view.get(document.source, document.namespace) == document:
                    unused |= put_readings(txn, document.key, [reading])
            return set(noted_unused(txn, unused))

    def unused(self) -> list[bytes]:
        """Keys of KV that nothing names any more, and that are still stored where somebody did not come to remove them."""
        with self._environment.transaction() as txn:
            noted = [name.removeprefix(records.UNUSED) for name in txn.keys("meta", records.UNUSED)]
            return [key for key in noted if not Snapshot(txn).names(key)]

    def dropped(self, keys: Collection[bytes]) -> None:
        """Keeps that KV are not stored any more, of those that were noted (:meth:`unused`)."""
        if keys:
            with self._environment.transaction(write=True) as txn:
                for key in keys:
                    txn.delete("meta", records.UNUSED + key)

    def rename(
        self, source: str, to: str, reread: Callable[[Reading], Reading | None], namespace: str = ""
    ) -> Document | None:
        """Calls a document by another source: passages, vectors and what models know of it stay.

        Args:
            source: what it was called.
            to: what it is called now.
            reread: gives how a model reads it under its new name; None for what is to be found out anew.
            namespace: its own.

        Returns:
            The document; None where there is none of the first name, or one of the second: nothing was changed.
        """
        with self._environment.transaction(write=True) as txn:
            view = Snapshot(txn)
            document = view.get(source, namespace)
            if document is None or view.get(to, namespace) is not None:
                return None
            return renamed(txn, document, to, list(filter(None, map(reread, view.readings(document)))))

    def remove(self, source: str, namespace: str = "") -> Change:
        """Removes a document of a namespace with its passages and vectors.

        Raises:
            DocumentError: there is no such document.
        """
        with self._environment.transaction(write=True) as txn:
            document = _found(Snapshot(txn), source, namespace)
            change = replaced(txn, replace(document, passage_ids=()), [], {})
            return replace(change, document=document)

    @property
    def state(self) -> str:
        """Differs between any two states whose passages differ."""
        with self.snapshot() as view:
            return view.state

    def documents(self, namespace: str | None = None) -> list[Document]:
        """The documents of a namespace, by default of all, by source."""
        if namespace is not None:
            checked_namespace(namespace)
        with self.snapshot() as view:
            return sorted(view.documents(namespace), key=lambda document: (document.source, document.namespace))

    def get(self, source: str, namespace: str = "") -> Document | None:
        """The document of a source; None where there is none."""
        with self.snapshot() as view:
            return view.get(source, namespace)

    def texts(self, source: str, namespace: str = "") -> list[str]:
        """The passages of a document, in order.

        Raises:
            DocumentError: there is no such document.
        """
        with self.snapshot() as view:
            return view.texts(_found(view, source, namespace))

    def passage(self, passage_id: int) -> Passage:
        """The passage of an id.

        Raises:
            RetrievalError: there is no such passage.
        """
        instance("passage_id", passage_id, int, "the id of a passage, a whole number")
        with self.snapshot() as view:
            return view.passage(passage_id)

    def check(self) -> list[str]:
        """Reads every record and says what is wrong, a line each; nothing for a sound catalogue."""
        with self._environment.transaction() as txn:
            return problems(txn)

    def repair(self, embed: Embed) -> list[str]:
        """Computes damaged vectors again, and deletes documents that cannot be read whole.

        Args:
            embed: gives the vectors, float32 ``[n, d]``, of texts.

        Returns:
            what was done, a line each; the deleted documents have to be added again.

        Raises:
            RetrievalError: ``embed`` gives vectors of another kind than the folder's: nothing was changed.
        """
        return repaired(self._environment, embed)

    def __len__(self) -> int:
        with self.snapshot() as view:
            return len(view)

    def __iter__(self) -> Iterator[Document]:
        return iter(self.documents())

    def __contains__(self, source: object) -> bool:
        return isinstance(source, str) and self.get(source) is not None


def _found(view: Snapshot, source: str, namespace: str) -> Document:
    document = view.get(source, namespace)
    if document is None:
        raise DocumentError(f"there is no document {source!r}")
    return document
