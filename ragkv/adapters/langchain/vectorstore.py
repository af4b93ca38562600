"""The vector store: documents of LangChain in a ragkv folder, their KV made when they are added."""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore
from langchain_core.vectorstores.utils import maximal_marginal_relevance

from ragkv.adapters.langchain.documents import document_of, remember
from ragkv.adapters.langchain.embeddings import RagKVEmbeddings, embedder_of
from ragkv.adapters.langchain.members import TOGETHER, Member, Members, added_here, as_added, in_order, kept
from ragkv.adapters.parts import Cut, changing, listed, remove, search
from ragkv.adapters.passages import all_of
from ragkv.errors import ArgumentError, DocumentError, UnknownArgumentError, instance, whole_number
from ragkv.rag import RAG
from ragkv.retrieval import Hit
from ragkv.retrieval.records import checked_document

#: Metadata that a document must have, or a function that says whether it is wanted.
Filter = Mapping[str, Any] | Callable[[Document], bool]


class RagKVVectorStore(VectorStore):
    """LangChain's documents in a folder of ragkv.

    A document is one passage, as it was split. Those whose metadata say their ``source`` and their place in it (``start_index``,
    ``page``, ``page_number`` or ``split_id``, whole numbers) are read in that order, each behind those before it; all others are
    read alone. Passages of files and texts that were added to the folder otherwise are found too, each in the context of its
    document, with ids as those of :class:`RagKVRetriever`.

    Args:
        rag: where documents go; whoever made it closes it.
    """

    def __init__(self, rag: RAG) -> None:
        instance("rag", rag, RAG, "a ragkv.RAG")
        self.rag = rag
        self._members = Members.of(rag.retriever.catalogue, rag.engine.documents.namespace)

    @property
    def embeddings(self) -> Embeddings:
        """The folder's embedder."""
        return RagKVEmbeddings(self.rag.retriever.embedder)

    @classmethod
    def from_texts(
        cls,
        texts: Iterable[str],
        embedding: Embeddings | None = None,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        rag: RAG | None = None,
        **options: Any,
    ) -> RagKVVectorStore:
        """A vector store with texts.

        Args:
            texts: as for :meth:`add_texts`.
            embedding: turns them into vectors; by default the folder's own embedder, or the offline one.
            metadatas: as for :meth:`add_texts`.
            ids: as for :meth:`add_texts`.
            rag: where they go; without it one is made, to be closed as ``store.rag.close()``.
            **options: of :meth:`ragkv.RAG.from_pretrained`, ``path`` and ``model`` say.

        Raises:
            ArgumentError: ``rag`` has an embedder of its own, and another is given, or options.
            DocumentError: as :meth:`add_texts`.
        """
        embedder = embedder_of(embedding)
        with ExitStack() as undone:
            if rag is None:
                rag = undone.enter_context(RAG.from_pretrained(embedder=embedder, **options))
            elif options or (embedder is not None and embedder.fingerprint != rag.retriever.embedder.fingerprint):
                said = f"with the embedder {rag.retriever.embedder.name!r}"
                raise ArgumentError(
                    f"rag is there already, {said}: leave out embedding and {sorted(options) or 'options'}"
                )
            store = cls(rag)
            store.add_texts(texts, metadatas, ids=ids)
            undone.pop_all()
        return store

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: Sequence[str | None] | None = None,
        batch_size: int | None = None,
        **options: Any,
    ) -> list[str]:
        """Add texts, and let the model read them; one of a known id replaces it.

        Args:
            texts: a passage each.
            metadatas: anything that JSON can hold, for each.
            ids: of each; where there is none, a new one.
            batch_size: what LangChain's indexing says; all are added together.
            **options: none.

        Returns:
            The ids.

        Raises:
            ArgumentTypeError: texts or ids are no list.
            DocumentError: a text is blank, metadata are nothing that JSON can hold, an id is given to two texts: nothing was added.
            PromptTooLongError: a text is longer than the model reads at once: nothing was added.
            StoreFullError: as for :meth:`ragkv.RAG.add_texts`.
        """
        _no_more(options)
        given = all_of(texts, object, "texts must be a list of str")
        if ids is not None:
            ids = all_of(ids, object, "ids must be a list of str")
        names = [str(uuid.uuid4()) if name is None else name for name in ([None] * len(given) if ids is None else ids)]
        extras = (
            [{}] * len(given) if metadatas is None else all_of(metadatas, object, "metadatas must be a list of dict")
        )
        if not len(given) == len(names) == len(extras):
            raise DocumentError(f"got {len(given)} texts, {len(names)} ids and {len(extras)} metadatas: one each")
        for name in names:
            if not isinstance(name, str) or not name:
                raise DocumentError(f"an id must be a str that is not empty, got {name!r:.80}")
        new: dict[str, Member] = {}
        for name, text, extra in zip(names, given, extras, strict=True):
            _, (text,), said = checked_document(name, [text], extra)
            if new.setdefault(name, Member(text, said)) != (text, said):
                raise DocumentError(f"two documents have the id {name!r}: nothing was added")
        self._put(new, new)
        return names

    def delete(self, ids: Sequence[str] | None = None, **options: Any) -> bool:
        """Remove documents, and the KV that no other one needs. Ids that are not there are fine.

        What stands behind them in their source was read behind their text, and is read again.

        Args:
            ids: which; ``None``: all that were added here.
            **options: none.

        Raises:
            ArgumentTypeError: ids are no list of texts.
        """
        _no_more(options)
        if ids is not None:
            self._put(all_of(ids, str, "ids must be a list of str"), {})
            return True
        with changing(self.rag.retriever.catalogue):
            for made in listed(self.rag):
                if added_here(made.source):
                    self._remove(made.source)
        return True

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """The documents of ids that are there, each once, in the order of the ids."""
        ids = all_of(ids, str, "ids must be a list of str")
        with self._members.view(self.rag.retriever.catalogue) as view:
            found = self._members.find(view, ids).values()
            return [
                as_added(made.source, made.metadata, place, view.passage_text(made.passage_ids[place]))
                for made, place in found
            ]

    def similarity_search(self, query: str, k: int = 4, filter: Filter | None = None, **options: Any) -> list[Document]:
        """The documents nearest to a text, best first.

        Args:
            query: not blank.
            k: how many.
            filter: metadata that a document must have, or a function that is given the document and says whether it is wanted.
            **options: none.
        """
        return [found for found, _ in self.similarity_search_with_score(query, k, filter, **options)]

    def similarity_search_with_score(
        self, query: str, k: int = 4, filter: Filter | None = None, **options: Any
    ) -> list[tuple[Document, float]]:
        """The documents nearest to a text with the inner product of their vectors: the cosine, where those are of length one."""
        _no_more(options)
        return [(_as_added(hit), hit.score) for hit in self._nearest(query, k, filter)]

    def max_marginal_relevance_search(
        self,
        query: str,
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        filter: Filter | None = None,
        **options: Any,
    ) -> list[Document]:
        """Of the ``fetch_k`` documents nearest to a text, ``k`` that differ among each other (maximal marginal relevance)."""
        _no_more(options)
        whole_number("k", k)
        instance("lambda_mult", lambda_mult, int | float, "a number, 0 to 1")
        if not 0 <= lambda_mult <= 1:
            raise ArgumentError(f"lambda_mult must be a number, 0 to 1, got {lambda_mult}")
        hits = self._nearest(query, fetch_k, filter)
        with self.rag.retriever.catalogue.snapshot() as view:
            vectors = list(view.vectors(hit.passage_id for hit in hits))
        asked = self.rag.retriever.embedder.encode_query(query)
        chosen = maximal_marginal_relevance(asked, vectors, lambda_mult, k) if hits else []
        return [_as_added(hits[number]) for number in chosen]

    def _put(self, gone: Iterable[str], new: Mapping[str, Member]) -> None:
        """Let documents of some ids go, and put others where they belong."""
        gone, homes = set(gone), defaultdict[str, dict[str, Member]](dict)
        for name, member in new.items():
            homes[member.source(name)][name] = member
        with changing(self.rag.retriever.catalogue):
            with self._members.view(self.rag.retriever.catalogue) as view:
                there = {made.source for made, _ in self._members.find(view, gone).values()}
                before = {source: self._members.read(view, source) for source in [*homes, *there]}
            now: dict[str, dict[str, Member]] = {}
            for source, members in before.items():
                here = homes.get(source, {})
                stay = {name: member for name, member in members.items() if name in here or name not in gone}
                now[source] = in_order({**stay, **here})
            self._write({source: members for source, members in now.items() if members})
            for source in [source for source, members in now.items() if not members]:
                self._remove(source)

    def _write(self, documents: dict[str, dict[str, Member]]) -> None:
        """Documents with their members as they are now."""
        together = {
            source: [member.text for member in members.values()]
            for source, members in documents.items()
            if source.startswith(TOGETHER)
        }
        cut = Cut(together)
        texts = [cut.texts.get(source) or next(iter(members.values())).text for source, members in documents.items()]
        metadata = [kept(source, members) for source, members in documents.items()]
        if texts:
            added = self.rag.add_texts(texts, list(documents), metadata, chunker=cut)
            for change in added.changes:
                self._members.follow(change, documents[change.document.source])

    def _remove(self, source: str) -> None:
        change = remove(self.rag, source)
        if change is not None:
            self._members.follow(change, ())

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        return lambda cosine: min(1.0, max(0.0, cosine))

    def _nearest(self, query: str, k: int, wanted: Filter | None) -> list[Hit]:
        """The nearest passages that are wanted."""
        instance("filter", wanted, Mapping | Callable | None, "a dict of metadata, or a function of a document")
        parts = [wanted, *wanted.values()] if isinstance(wanted, Mapping) else []
        signs = [name for part in parts if isinstance(part, Mapping) for name in part if str(name).startswith("$")]
        if signs:
            said = "filter takes values that are equal, or a function, and no"
            raise ArgumentError(f"{said} {signs[0]}: a RagKVRetriever has it, as where=")
        kept = search(self.rag, query, k, None if wanted is None else partial(_wanted, wanted=wanted))
        remember(self.rag, kept)
        return kept


def _as_added(hit: Hit) -> Document:
    """A document as it was added; a passage of a file or text that was added otherwise as the retriever gives it."""
    return as_added(hit.source, hit.metadata, hit.position, hit.text) if added_here(hit.source) else document_of(hit)


def _no_more(options: Mapping[str, Any]) -> None:
    if options:
        raise UnknownArgumentError(f"the vector store does not take {', '.join(sorted(options))}")


def _wanted(hit: Hit, wanted: Filter) -> bool:
    found = _as_added(hit)
    if callable(wanted):
        return bool(wanted(found))
    return all(name in found.metadata and found.metadata[name] == value for name, value in wanted.items())
