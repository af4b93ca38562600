"""The durable list of documents, passages and vectors: one LMDB environment, every change one transaction."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ragkv.chunk import digest
from ragkv.errors import (
    DocumentError,
    IncompatibleFolderError,
    OfOneProcess,
    RetrievalError,
    checked_namespace,
    instance,
)
from ragkv.folder import Environment
from ragkv.retrieval import records
from ragkv.retrieval.changes import checked_vectors, merged, noted_unused, put_readings, renamed, replaced
from ragkv.retrieval.following import Following, Seen, seen, taken_over
from ragkv.retrieval.records import ArchivedDocument, Change, Document, Merged, Passage, Reading, misplaced
from ragkv.retrieval.snapshot import Snapshot
from ragkv.retrieval.upkeep import Embed, bring_up, problems, repaired

# documents: source key -> document. passages: id -> source key and text. vectors: id -> vector.
# uses: text key -> the ids of its passages. readings: source key, setting -> how a model reads the document.
# kv: key of KV, or of a passage in front of a document -> the keys of the readings that name it.
# meta: format, settings, defaults, state, next id, what came from publications.
DATABASES: dict[bytes, dict[str, Any]] = {
    b"meta": {},
    b"documents": {},
    b"passages": {},
    b"vectors": {},
    b"uses": {"dupsort": True, "dupfixed": True},
    b"readings": {},
    b"kv": {"dupsort": True, "dupfixed": True},
}


class Catalogue(OfOneProcess, instead="open its folder where it is needed, Catalogue(path)"):
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

    def __init__(self, path: str | os.PathLike[str] | None = None, *, readonly: bool = False) -> None:
        instance("path", path, str | os.PathLike | None, "a folder's path, or None")
        self.temporary: bool = path is None
        self.path: Path = Path(tempfile.mkdtemp(prefix="ragkv-") if path is None else path)
        only_reading = readonly and not self.temporary
        self._opened = Environment.open(self.path, DATABASES, durable=not self.temporary, readonly=only_reading)
        self._give_back = weakref.finalize(self, _give_back, self._opened, self.temporary, os.getpid())
        try:
            bring_up(self._environment, self.readonly)
        except BaseException:
            self.close()
            raise

    @property
    def readonly(self) -> bool:
        """Whether the folder may not be written to."""
        return self._environment.readonly

    def require(self, what: str, fingerprint: str, name: str = "") -> None:
        """States what the folder is made with, or checks that it was made with just that.

        While the folder has no documents, the last statement counts.

        Args:
            what: a word for it: ``"embedder"``.
            fingerprint: equal exactly when the folder can be used.
            name: what people call it.

        Raises:
            IncompatibleFolderError: the folder was made with another one.
        """
        given = {"fingerprint": fingerprint, "name": name}
        if self.settings.get(what, {}).get("fingerprint") == fingerprint:
            return
        with self._environment.transaction(write=True) as txn:
            view = Snapshot(txn)
            stored = view.settings.get(what)
            if stored and stored["fingerprint"] != fingerprint and len(view):
                raise IncompatibleFolderError(
                    f"{self.path} was made with the {what} {_spoken(stored)}, got {_spoken(given)}: open it with the "
                    f"former, or add the documents to another folder"
                )
            txn.put("meta", b"settings", json.dumps({**view.settings, what: given}).encode())

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
        checked_namespace(namespace)
        instance("reading", reading, Reading | None, "a ragkv.retrieval.Reading")
        for name, items in (("spans", spans), ("pages", pages), ("headings", headings)):
            instance(name, items, list | tuple, "a list, one a passage")
        facts = tuple(spans), origin, namespace, tuple(pages), tuple(headings), file
        given = Document(source, digest(*passages).hex(), (), metadata, *facts)
        wrong = misplaced(given, len(passages))
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
                    and (reading is None or view.keeps(old, reading))
                ):
                    return Change(old, kept=old.passage_ids, replaced=True, states=(view.state,) * 2)
                missing = [
                    text
                    for text in dict.fromkeys(passages)
                    if text not in vectors and not view.has_text(text, namespace)
                ]
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
            document = Snapshot(txn).get(source, namespace)
            if document is None:
                raise DocumentError(f"there is no document {source!r}")
            change = replaced(txn, replace(document, passage_ids=()), [], {})
            return replace(change, document=document)

    @contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        """Everything as it is now, whatever is written meanwhile. To be left soon: it keeps deleted pages alive."""
        with self._environment.transaction() as txn:
            yield Snapshot(txn)

    @property
    def state(self) -> str:
        """Differs between any two states whose passages differ."""
        with self.snapshot() as view:
            return view.state

    @property
    def settings(self) -> dict[str, dict[str, str]]:
        """What the folder was made with: ``{what: {"fingerprint": ..., "name": ...}}``."""
        with self.snapshot() as view:
            return view.settings

    @property
    def defaults(self) -> dict[str, Any]:
        """What the folder is opened with where nothing else is said: whatever :meth:`keep_defaults` was given last."""
        with self.snapshot() as view:
            return view.defaults

    def keep_defaults(self, defaults: dict[str, Any]) -> None:
        """Keeps what JSON can hold, in the place of what was kept before."""
        if defaults != self.defaults:
            with self._environment.transaction(write=True) as txn:
                txn.put("meta", b"defaults", json.dumps(defaults).encode())

    @property
    def read_with(self) -> dict[str, str]:
        """What documents were last read with, by name; see :meth:`keep_read_with`."""
        with self.snapshot() as view:
            return view.read_with

    def keep_read_with(self, described: dict[str, str]) -> None:
        """Keeps what documents are read with, to name what differs later; in the place of what was kept before."""
        if described != self.read_with:
            with self._environment.transaction(write=True) as txn:
                txn.put("meta", b"read with", json.dumps(described).encode())

    def documents(self, namespace: str | None = None) -> list[Document]:
        """The documents of a namespace, by default of all, by source."""
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
            document = view.get(source, namespace)
            if document is None:
                raise DocumentError(f"there is no document {source!r}")
            return view.texts(document)

    def passage(self, passage_id: int) -> Passage:
        """The passage of an id.

        Raises:
            RetrievalError: there is no such passage.
        """
        with self.snapshot() as view:
            return view.passage(passage_id)

    def check(self) -> list[str]:
        """Reads every record and says what is wrong, a line each; nothing for a sound catalogue."""
        with self._environment.transaction() as txn:
            return problems(txn)

    def structure(self) -> list[str]:
        """What is wrong with the file's own pages, a line each; writers wait meanwhile."""
        return self._environment.problems()

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

    def close(self) -> None:
        """Closes the folder, and deletes it where it is a temporary one. Closing twice is no error."""
        self._give_back()

    @property
    def _environment(self) -> Environment:
        if not self._give_back.alive:
            raise RetrievalError(f"{self.path} is closed: open it again")
        return self._opened

    def __enter__(self) -> Catalogue:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _spoken(setting: dict[str, str]) -> str:
    return " ".join(part for part in (setting["name"], f"({setting['fingerprint']})") if part)


def _give_back(environment: Environment, temporary: bool, process: int) -> None:
    environment.close()
    # A forked child has its parent's folder, which is not its own to delete.
    if temporary and os.getpid() == process:
        shutil.rmtree(environment.path, ignore_errors=True)
