"""A corpus: documents put in, kept in step with the disk and with the model, and taken out again."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ragkv.engine import Engine
from ragkv.errors import ArgumentError, instance, whole_number
from ragkv.finding import Finder
from ragkv.library.differing import warn_of_differences
from ragkv.library.done import Added, Planned, Synced
from ragkv.library.intake import Intake
from ragkv.library.listing import ListedDocument, listed_documents
from ragkv.library.watching import Progress
from ragkv.publishing import Followed, Published, follow, publish
from ragkv.retrieval import Change, Retriever, TokenChunker
from ragkv.retrieval.naming import only
from ragkv.retrieval.records import source_id


class Corpus:
    """What a :class:`~ragkv.RAG` does with documents; arguments as there."""

    def __init__(
        self,
        engine: Engine,
        retriever: Retriever,
        chunker: TokenChunker | None,
        repair_tokens: int | None,
        behind: int,
    ):
        instance("engine", engine, Engine, "a ragkv.Engine, as ragkv.Engine(model, tokenizer)")
        instance("retriever", retriever, Retriever, "a ragkv.retrieval.Retriever, as Retriever.open('documents/')")
        instance("chunker", chunker, TokenChunker | None, "a ragkv.retrieval.TokenChunker")
        if repair_tokens is not None:
            whole_number("repair_tokens", repair_tokens)
        if engine.tokenizer is None:
            raise ArgumentError("RAG reads text: the engine needs a tokenizer")
        self.engine: Engine = engine
        self.retriever: Retriever = retriever
        self.finder: Finder = Finder(retriever, engine.documents)
        cuts = chunker or TokenChunker(engine.tokenizer)
        catalogued = self.finder.catalogued()
        catalogued.finish()
        self._intake = Intake(catalogued, cuts, repair_tokens)
        self.behind = behind
        warn_of_differences(retriever.catalogue, engine.documents)

    @property
    def chunker(self) -> TokenChunker:
        """Cuts texts into passages. With another one, documents that are added again are cut anew."""
        return self._intake.chunker

    @chunker.setter
    def chunker(self, chunker: TokenChunker) -> None:
        instance("chunker", chunker, TokenChunker, "a ragkv.retrieval.TokenChunker")
        self._intake.chunker = chunker

    @property
    def behind(self) -> int:
        """Passages of others that each document is read behind, see :class:`RAG`; :meth:`refresh` brings what is there in step."""
        return self._intake.behind

    @behind.setter
    def behind(self, behind: int) -> None:
        self._intake.behind = whole_number("behind", behind)

    def add_texts(
        self,
        texts: Sequence[str],
        sources: Sequence[str] | None = None,
        metadata: Sequence[dict[str, Any]] | None = None,
        *,
        chunker: TokenChunker | None = None,
        namespace: str | None = None,
        progress: Callable[[Progress], object] | None = None,
    ) -> Added:
        """Add documents given as text; one of a known source replaces it.

        Args:
            texts: a document each.
            sources: what they are called; by default a name made from the text, so that the same text is one document.
            metadata: anything that JSON can hold, for each.
            chunker: cuts these texts, instead of :attr:`chunker`.
            namespace: in place of the engine's: :meth:`ask` finds them with the same one.
            progress: called behind each text that was looked at, and behind each piece that the model has read.

        Raises:
            DocumentError: a text is blank or cannot be stored as it is: nothing was added.
            StoreFullError: before anything is read: the disk is too small. Later: documents and vectors are stored, but KV do not
                fit.
        """
        instance("chunker", chunker, TokenChunker | None, "a ragkv.retrieval.TokenChunker")
        return self._taking_in(namespace).add_texts(texts, sources, metadata, chunker, progress)

    def add_files(
        self,
        paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        *,
        namespace: str | None = None,
        encoding: str | None = None,
        progress: Callable[[Progress], object] | None = None,
    ) -> Added:
        """Add files, and folders with all that is in them: text, Markdown, PDF, HTML, Office and others (docs/retrieval.md).

        A file that cannot be read is named and skipped.

        A file that is known and unchanged costs no reading. A changed one is read again from the first changed passage on. One
        that was moved, known by its content, is the same document under its new path.

        Args:
            paths: files and folders.
            namespace: as for :meth:`add_texts`.
            encoding: of text files, as ``"cp1252"``; by default UTF-8 where they are, else it is found out.
            progress: called behind each file that was looked at, and behind each piece that the model has read.

        Raises:
            DocumentError: ``paths`` are none.
            ArgumentError: Python knows no encoding of this name.
            StoreFullError: as for :meth:`add_texts`.
        """
        return self._taking_in(namespace).add_files(paths, encoding, progress)

    def plan_files(
        self,
        paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        *,
        namespace: str | None = None,
        encoding: str | None = None,
        progress: Callable[[Progress], object] | None = None,
    ) -> Planned:
        """What :meth:`add_files` would do and take. Files are looked at; nothing is computed, and nothing written."""
        return self._taking_in(namespace).planned(paths, encoding, progress)

    def sync(
        self,
        folder: str | os.PathLike[str],
        *,
        dry_run: bool = False,
        encoding: str | None = None,
        progress: Callable[[Progress], object] | None = None,
    ) -> Synced:
        """Bring the documents of a folder in step with the disk: as :meth:`add_files`, and what is gone from the folder goes.

        Documents whose files lay elsewhere stay, and texts, whatever they are called.

        Args:
            folder: with all that is in it.
            dry_run: only say what would be done.
            encoding, progress: as for :meth:`add_files`.

        Raises:
            DocumentError: there is no such folder, or nothing is left in it: its disk may not be mounted.
            StoreFullError: as for :meth:`add_texts`.
        """
        return self._intake.sync(folder, dry_run, encoding, progress)

    def documents(self, *, namespace: str | None = None) -> list[ListedDocument]:
        """The documents of a namespace, the engine's by default, by source, with their length and what their KV take."""
        documents = self.engine.documents.within(namespace)
        return listed_documents(self.retriever.catalogue, self.engine.store, documents.setting, documents.namespace)

    def remove(self, source: str | os.PathLike[str], *, namespace: str | None = None) -> Change:
        """Remove a document, its passages and vectors, and the KV that no other document uses.

        Args:
            source: what it is called, or a file's path.
            namespace: in place of the engine's.

        Raises:
            DocumentError: there is no such document.
        """
        documents = self.engine.documents.within(namespace)
        return self.finder.catalogued(documents).remove(self._source(source, documents.namespace))

    def pin(self, source: str | os.PathLike[str], lifetime_s: float = math.inf) -> int:
        """Keep a document's KV from being evicted for some seconds; returns how many of its passages' are stored.

        Raises:
            DocumentError: there is no such document.
        """
        instance("lifetime_s", lifetime_s, int | float, "a number of seconds")
        return self.engine.store.pin_many(self._keys(source), lifetime_s)

    def unpin(self, source: str | os.PathLike[str]) -> int:
        """End the pins of a document's KV; returns how many of its passages' are stored.

        Raises:
            DocumentError: there is no such document.
        """
        return self.engine.store.unpin_many(self._keys(source))

    def refresh(self, progress: Callable[[Progress], object] | None = None) -> int:
        """Read whatever KV of the documents is missing, after a crash, with a new prefix or with another model say.

        Documents whose neighbours are others now (``behind``) are read again behind these.

        Args:
            progress: called behind each document that was looked at, and behind each piece that the model has read.

        Returns:
            Tokens that were read.

        Raises:
            StoreFullError: as for :meth:`add_texts`.
        """
        return self._intake.refresh(progress)

    def stale(self) -> list[str]:
        """The documents whose neighbours (``behind``) are others than those that they were read behind; by source.

        Until :meth:`refresh` they answer as they were read; one whose neighbour is gone is read alone when it is asked for.
        """
        return self._intake.stale()

    def publish(self, *, namespace: str | None = None, only: bool = False, limit_s: float = 60.0) -> Published:
        """Put into the shared pool which documents there are, so that others answer from them without having read anything.

        First the pool gets the KV of the documents that it lacks, then, in the place of what was published of the namespace for
        this model before, the catalogue: whoever takes it (:meth:`follow`) has all of one state. Of several who publish the last
        one counts.

        Args:
            namespace: whose documents; the engine's by default.
            only: withdraw what is published of the namespace for other models, or the same in another setting.
            limit_s: how long to wait for KV of which none arrives.

        Raises:
            ArgumentError: there is no pool, or it is for reading only.
            UploadError: the pool did not have the KV in time: nothing was published, and they are sent later.
            PublicationError: the catalogue is too large for the pool; what was published before stays.
            StoreError: the pool does not answer.
            RecordError: a document is damaged: nothing was published.
        """
        return publish(self.retriever.catalogue, self.engine.documents.within(namespace), only, limit_s)

    def follow(self, *, namespace: str | None = None) -> Followed:
        """Take what is published of a namespace for this model, or what has changed since: all of it, or nothing.

        What went from the publication goes here, too; documents of the folder's own stay. Nothing is tokenised, embedded or read.
        A question that is being answered has the state before. Nothing is ever written to the pool.

        Args:
            namespace: whose documents; the engine's by default.

        Raises:
            ArgumentError: there is no pool, or it is not for reading only: give ``from_pretrained`` ``follow=True``.
            PublicationError: nothing is published for this model and namespace, or with another embedder; the message names what
                differs.
            RecordError: it is damaged. What was taken before stays.
            StoreError: the pool does not answer, or its catalogue is encrypted with another key.
        """
        return follow(self.retriever, self.engine.documents.within(namespace))

    def _taking_in(self, namespace: str | None) -> Intake:
        return self._intake.within(self.finder.catalogued(self.engine.documents.within(namespace)))

    def _source(self, given: str | os.PathLike[str], namespace: str) -> str:
        catalogue = self.retriever.catalogue
        if isinstance(given, str) and catalogue.get(given, namespace) is not None:
            return given
        return only([document.source for document in catalogue.documents(namespace)], given, "RAG.documents()")

    def _keys(self, source: str | os.PathLike[str]) -> list[bytes]:
        namespace = self.engine.documents.namespace
        document = source_id(self._source(source, namespace), namespace)
        return list(self.engine.documents.keys(self.finder.catalogued().now(document)))
