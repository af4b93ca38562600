"""Documents in: what is new or changed is found out first, then read; a folder is kept in step with the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ragkv.chunk import Chunk, digest
from ragkv.errors import DocumentError, MissingPackageError, half_a_pair, listable
from ragkv.library.catalogued import CataloguedDocuments, Prepared
from ragkv.library.differing import described
from ragkv.library.done import Added, Planned, Synced
from ragkv.library.preparing import Given, prepare, unchanged
from ragkv.library.rates import reading_s
from ragkv.library.refreshing import Due, bring_up, due
from ragkv.library.sizes import check_room, codec_bytes
from ragkv.library.watching import Progress, Tell, check_told, told
from ragkv.retrieval import SkippedFile, TokenChunker
from ragkv.retrieval.converter import Converter, fingerprint
from ragkv.retrieval.encodings import checked_encoding
from ragkv.retrieval.loaders import file_bytes, found_files, hidden_files, listed_paths, text_of
from ragkv.retrieval.naming import below, gone, named
from ragkv.retrieval.outline import Outline, sections
from ragkv.retrieval.records import Document, checked_document

_REASONS = {"added": "new", "changed": "changed", "unchanged": "missing"}


@dataclass
class _Plan:
    """What is to be done: documents, each with the tokens that the model has to run for it; tokens whose KV are stored by it."""

    documents: list[tuple[Prepared, int]] = field(default_factory=list)
    moved: dict[str, str] = field(default_factory=dict)
    skipped: list[SkippedFile] = field(default_factory=list)
    hidden: int = 0
    stored_tokens: int = 0

    @property
    def tokens(self) -> int:
        return sum(tokens for _, tokens in self.documents)

    def files(self) -> dict[str, Any]:
        """As :class:`~ragkv.library.done.Files` takes them."""
        kinds = {prepared.source: prepared.kind for prepared, _ in self.documents if prepared.source not in self.moved}
        sources = {kind: [source for source, of in kinds.items() if of == kind] for kind in _REASONS}
        return {**sources, "moved": self.moved, "skipped": self.skipped, "hidden": self.hidden}


class Intake:
    """Adds documents to a catalogue and lets the model read them.

    Args:
        catalogued: puts documents into its catalogue.
        chunker: cuts texts into passages; may be replaced.
        repair_tokens: see :class:`~ragkv.RAG`; may be changed.

    Attributes:
        defaults: what the folder was opened with; kept there with the first document.
        behind: see :class:`~ragkv.RAG`.
    """

    def __init__(self, catalogued: CataloguedDocuments, chunker: TokenChunker, repair_tokens: int | None):
        self._take_into(catalogued)
        self.chunker: TokenChunker = chunker
        self.repair_tokens: int | None = repair_tokens
        self.behind: int = 0
        self.defaults: dict[str, Any] = {}

    def _take_into(self, catalogued: CataloguedDocuments) -> None:
        self._catalogued, self._documents = catalogued, catalogued.documents
        self._catalogue = catalogued.retriever.catalogue

    def within(self, catalogued: CataloguedDocuments) -> Intake:
        """The same for other documents of the model: those of a namespace."""
        if catalogued.documents is self._documents:
            return self
        other = copy(self)
        other._take_into(catalogued)
        return other

    def add_texts(
        self, texts: Any, sources: Any, metadata: Any, chunker: TokenChunker | None, tell: Tell | None
    ) -> Added:
        """See :meth:`ragkv.RAG.add_texts`."""
        given = listed(texts, "texts")
        names = [None] * len(given) if sources is None else listed(sources, "sources")
        extras = [None] * len(given) if metadata is None else listed(metadata, "metadata")
        if not len(given) == len(names) == len(extras):
            raise DocumentError(f"got {len(given)} texts, {len(names)} sources and {len(extras)} metadata: one each")
        for text, name, extra in zip(given, names, extras, strict=True):
            checked_document("a text" if name is None else name, [text], extra)
        called = [
            f"text:{digest(text).hex()[:16]}" if name is None else name for text, name in zip(given, names, strict=True)
        ]
        outlines = [Outline(sections=sections(text)) for text in given]
        return self._done(
            self._plan(map(Given, called, given, extras, outlines), len(given), tell, chunker=chunker), tell
        )

    def add_files(self, paths: Any, encoding: str | None, tell: Tell | None) -> Added:
        """See :meth:`ragkv.RAG.add_files`."""
        added = self._done(self._files(paths, encoding, tell), tell)
        self._forget_converted()
        return added

    def planned(self, paths: Any, encoding: str | None, tell: Tell | None) -> Planned:
        """See :meth:`ragkv.RAG.plan_files`."""
        plan, documents = self._files(paths, encoding, tell), self._documents
        chunks = [chunk for prepared, _ in plan.documents for chunk in prepared.document if documents.fits(chunk)]
        tokens = sum(map(len, chunks))
        sizes = codec_bytes(documents) if plan.stored_tokens else {}
        return Planned(
            **plan.files(),
            passages=sum(len(prepared.passages) for prepared, _ in plan.documents),
            tokens=tokens,
            stored_tokens=tokens - sum(map(len, documents.missing(chunks))),
            tokens_to_read=plan.tokens,
            seconds=reading_s(documents, [tokens for _, tokens in plan.documents]),
            kv_bytes={codec: round(size * plan.stored_tokens) for codec, size in sizes.items()},
            codec=documents.store.codecs[0].name,
        )

    def sync(self, folder: str | os.PathLike[str], dry_run: bool, encoding: str | None, tell: Tell | None) -> Synced:
        """See :meth:`ragkv.RAG.sync`."""
        path = os.path.abspath(os.path.expanduser(named(folder)))
        if not named(folder) or not os.path.isdir(path):
            raise DocumentError(
                f"{named(folder)!r} is no folder that is there: nothing was changed. Where it was moved, sync the new one; 'ragkv "
                "forget' or RAG.remove() removes documents"
            )
        plan = self._files(path, encoding, tell)
        lost = [source for source in self._below(path) if gone(source) and source not in plan.moved.values()]
        if lost and not plan.documents and not plan.skipped:
            raise DocumentError(
                f"no file is left in {path}, and {len(lost)} documents came from there: nothing was changed. Is its disk mounted? "
                "'ragkv forget' or RAG.remove() removes documents"
            )
        synced = Synced(**plan.files(), removed=lost, tokens=plan.tokens)
        if not dry_run:
            first = self._removed(lost) if self.behind else []  # or what is added would be read behind it
            added = self._done(plan, tell)
            self._forget_converted()
            synced.tokens, synced.kv_bytes = added.tokens_read, added.kv_bytes
            synced.removed = first or self._removed(lost)  # last: KV that both need are not read again
        return synced

    def _removed(self, sources: Iterable[str]) -> list[str]:
        """Removes documents whose files are gone; returns which."""
        removed = []
        for source in filter(gone, sources):
            with suppress(DocumentError):  # somebody else has removed it
                self._catalogued.remove(source)
                removed.append(source)
        return removed

    def refresh(self, tell: Tell | None) -> int:
        """See :meth:`ragkv.RAG.refresh`."""
        check_told(tell)
        self._keep_behind()
        return bring_up(self._catalogued, self._due(tell), tell)

    def stale(self) -> list[str]:
        """See :meth:`ragkv.RAG.stale`."""
        return [each.listed.source for each in self._due(None) if each.behind is not None]

    def _due(self, tell: Tell | None, listed: Sequence[Document] | None = None) -> list[Due]:
        """What documents need, by default all."""
        self._documents.look()
        listed = self._catalogue.documents(self._documents.namespace) if listed is None else listed
        return due(self._catalogued, listed, self.behind, tell)

    def _keep_behind(self) -> None:
        kept = self._catalogue.defaults
        if self.behind != kept.get("behind", 0):
            self._catalogue.keep_defaults({**kept, "behind": self.behind})

    @property
    def _converted(self) -> Path | None:
        """Where converted files are kept until all of them are documents: an interrupted call need not convert them again."""
        catalogue = self._catalogue
        return None if catalogue.temporary or catalogue.readonly else catalogue.path / ".converted"

    def _forget_converted(self) -> None:
        if self._converted is not None:
            shutil.rmtree(self._converted, ignore_errors=True)

    def _files(self, paths: Any, encoding: str | None, tell: Tell | None) -> _Plan:
        """What adding files takes. One whose text is that of a document whose own file is gone was moved."""
        checked_encoding(encoding)
        paths = listed_paths(paths)
        found = found_files(paths)
        with Converter(self._converted) as converter:
            files = (item if isinstance(item, SkippedFile) else self._file(item, converter, encoding) for item in found)
            plan = self._plan(files, len(found), tell, skip=True)
        plan.hidden = hidden_files(paths)
        new = [prepared for prepared, _ in plan.documents if prepared.kind == "added"]
        formers: dict[str, list[str]] = {}
        for document in self._catalogue.documents(self._documents.namespace) if new else ():
            if document.file:
                formers.setdefault(document.origin, []).append(document.source)
        for prepared in new:
            sources = formers.get(prepared.facts["origin"], [])
            former = next(filter(gone, sources), None)
            if former is not None:
                sources.remove(former)
                plan.moved[prepared.source] = former
        return plan

    def _file(self, path: str, converter: Converter, encoding: str | None) -> Given | Prepared | SkippedFile:
        """A file's text; where its bytes became a document in the same way before, that one."""
        try:
            data, source = file_bytes(path), os.path.realpath(path)
            if half_a_pair(source):
                raise DocumentError("its name, or that of a folder that it is in, is not valid Unicode: rename it")
            file = digest(fingerprint(Path(path), data, encoding), self.chunker.settings).hex()
            known = unchanged(self._catalogued, source, file)
            if known is not None:
                return known
            text, outline = text_of(Path(path), data, converter, encoding)
        except (DocumentError, MissingPackageError) as error:
            return SkippedFile(path, str(error))
        return Given(source, text, outline=outline, file=file)

    def _plan(
        self,
        given: Iterable[Given | Prepared | SkippedFile],
        count: int,
        tell: Tell | None,
        skip: bool = False,
        chunker: TokenChunker | None = None,
    ) -> _Plan:
        """What adding so many documents takes; with ``skip`` those that cannot be stored are skipped."""
        check_told(tell)
        self._documents.look()
        plan, counted, total = _Plan(), set[bytes](), 0
        for done, item in enumerate(given, 1):
            if isinstance(item, SkippedFile):
                plan.skipped.append(item)
            else:
                try:
                    prepared = item
                    if not isinstance(prepared, Prepared):
                        prepared = prepare(self._catalogued, prepared, chunker or self.chunker)
                    missing = self._missing(prepared, counted)
                    plan.documents.append((prepared, self._documents.work(missing)))
                    plan.stored_tokens += sum(map(len, missing))
                    total += plan.documents[-1][1]
                except DocumentError as error:
                    if not skip:
                        raise
                    plan.skipped.append(SkippedFile(item.source, str(error)))
            if tell is not None:
                tell(Progress(item.source, "found", 0, total, done_documents=done, documents=count))
        return plan

    def _missing(self, prepared: Prepared, counted: set[bytes]) -> list[Chunk]:
        """A document's chunks that the store lacks, without those that one before it is read for."""
        chunks = self._documents.keys(list(filter(self._documents.fits, prepared.document)))
        missing = [key for key in self._documents.store.missing(chunks) if key not in counted]
        counted.update(missing)
        return [chunks[key] for key in missing]

    def _done(self, plan: _Plan, tell: Tell | None) -> Added:
        """The plan carried out."""
        added, done, total = Added(**plan.files()), 0, plan.tokens
        size = check_room(self._documents, plan.stored_tokens)
        if self.defaults and plan.documents:  # before reading, which may take hours and be cut short
            self._catalogue.keep_defaults(self.defaults)
            self.defaults = {}
        if plan.documents:
            self._catalogue.keep_read_with(described(self._documents))
        later = None if self.behind else tell  # neighbours are found when all are there, and read then
        for prepared, tokens in plan.documents:
            if prepared.source in plan.moved:
                self._catalogued.rename(plan.moved[prepared.source], prepared.source)
            with told(later, prepared.source, _REASONS[prepared.kind], done, total, size):
                change, read = self._catalogued.put(prepared, self.repair_tokens, read=not self.behind)
            done += tokens
            added.changes.append(change)
            added.tokens_read += read
        if self.behind:
            self._keep_behind()
            plans = [prepared for prepared, _ in plan.documents if prepared.kind != "unchanged"]
            reasons = {prepared.source: _REASONS[prepared.kind] for prepared in plans}
            work = self._due(tell, [change.document for change in added.changes])
            added.tokens_read = bring_up(self._catalogued, work, tell, reasons)
        added.kv_bytes = self._kv_bytes(added)
        return added

    def _kv_bytes(self, added: Added) -> dict[str, int]:
        setting, ids = self._documents.setting, {change.document.id for change in added.changes}
        with self._catalogue.snapshot() as view:
            there = [document for document in map(view.by_id, ids) if document is not None]
            readings = [reading for document in there for reading in view.readings(document)]
        return self._documents.store.sizes(
            key for reading in readings if reading.setting == setting for key in reading.keys
        )

    def _below(self, path: str) -> list[str]:
        real = os.path.realpath(path)
        listed = self._catalogue.documents(self._documents.namespace)
        sources = [document.source for document in listed if document.file]
        return [source for source in sources if below(source, path) or below(source, real)]


def listed(items: Any, what: str) -> list[Any]:
    """A list, where one text would be taken for a list of its characters.

    Raises:
        DocumentError: it is none.
    """
    if not listable(items):
        raise DocumentError(f"{what} must be a list, one each; got one {type(items).__name__}: write [...] around it")
    return list(items)
