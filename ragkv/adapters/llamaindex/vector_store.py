"""LlamaIndex's nodes in a folder of ragkv."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
    VectorStoreQueryResult,
)
from llama_index.core.vector_stores.utils import build_metadata_filter_fn

from ragkv.adapters.llamaindex.nodes import ADDED, NODES, kept, node_of, nodes_of, ordered, shown
from ragkv.adapters.parts import Cut, changing, document, listed, remove, search
from ragkv.adapters.passages import all_of
from ragkv.errors import ArgumentError, DocumentError, instance
from ragkv.rag import RAG
from ragkv.streaming import in_thread


class RagKVVectorStore(BasePydanticVectorStore):
    """Nodes of LlamaIndex in a folder of ragkv, as a ``BasePydanticVectorStore``; their KV are made when they are added.

    Nodes of one document (``ref_doc_id``) are that document's passages, in the order that they say themselves (``PREVIOUS``,
    ``NEXT``), else in that in which they are added: each is read behind those before it, as the model is shown them
    (``MetadataMode.LLM``). A node without a document is one of its own.
    Passages that were added to the folder otherwise are found too, as those of :class:`RagKVRetriever`.

    Vectors are made by the folder's own embedder, for nodes and for questions. Those of the index's ``embed_model`` are not used:
    give it a :class:`RagKVEmbedding`.

    Args:
        rag: where nodes go; whoever made it closes it.
    """

    stores_text: bool = True
    is_embedding_query: bool = False
    _rag: RAG = PrivateAttr()

    def __init__(self, rag: RAG):
        instance("rag", rag, RAG, "a ragkv.RAG, as ragkv.RAG.open('kv/')")
        super().__init__(stores_text=True, is_embedding_query=False)
        self._rag = rag

    @classmethod
    def class_name(cls) -> str:
        """LlamaIndex's name of the class."""
        return "RagKVVectorStore"

    @property
    def client(self) -> RAG:
        """The RAG that has the nodes."""
        return self._rag

    def add(self, nodes: Sequence[BaseNode], **_: Any) -> list[str]:
        """Add nodes, and let the model read them; one of a known id takes the place of that one in its document.

        Returns:
            Their ids.

        Raises:
            ArgumentTypeError: they are no list of nodes.
            DocumentError: a node has no text, or metadata that JSON cannot hold, or its id is another node's: nothing was added.
            PromptTooLongError: a node is longer than the model reads at once: nothing was added.
            StoreFullError: as for :meth:`ragkv.RAG.add_texts`.
        """
        nodes = all_of(nodes, BaseNode, "nodes must be a list of LlamaIndex's nodes")
        new: dict[str, dict[str, BaseNode]] = {}
        fields: dict[str, dict[str, Any]] = {}
        for node in nodes:
            if fields.setdefault(node.node_id, said := kept(node)) != said:
                raise DocumentError(f"two nodes have the id {node.node_id!r}: nothing was added")
            new.setdefault(_source(node), {})[node.node_id] = node
        with changing(self._rag.retriever.catalogue):
            self._put({source: {**self._nodes(source), **added} for source, added in new.items()})
        return [node.node_id for node in nodes]

    def delete(self, ref_doc_id: str, **_: Any) -> None:
        """Remove the nodes of a document, and the KV that nobody else needs. One that is not there is fine."""
        with changing(self._rag.retriever.catalogue):
            remove(self._rag, f"{ADDED}{ref_doc_id}")

    def get_nodes(self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None) -> list[BaseNode]:
        """Nodes that were added, by id or by metadata; all by default."""
        wanted = _wanted(filters, node_ids)
        return [node for nodes in self._all().values() for node in nodes.values() if wanted(node)]

    def delete_nodes(self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **_: Any) -> None:
        """Remove nodes by id or by metadata; those behind them in their document are read again."""
        wanted = _wanted(filters, node_ids)
        with changing(self._rag.retriever.catalogue):
            for source, nodes in self._all().items():
                left = {name: node for name, node in nodes.items() if not wanted(node)}
                if not left:
                    remove(self._rag, source)
                elif len(left) < len(nodes):
                    self._put({source: left})

    def clear(self) -> None:
        """Remove all nodes that were added here; what else is in the folder stays."""
        self.delete_nodes()

    def query(self, query: VectorStoreQuery, **_: Any) -> VectorStoreQueryResult:
        """The nodes nearest to the text of a question, best first.

        Raises:
            ArgumentError: there is no text, another mode than ``DEFAULT``, or filters that do not go with the nodes' metadata.
        """
        if query.mode != VectorStoreQueryMode.DEFAULT:
            raise ArgumentError(f"mode must be {VectorStoreQueryMode.DEFAULT.value!r}, got {query.mode!r}")
        if not query.query_str:
            raise ArgumentError("query_str must be the question's text: the folder's own embedder looks for it")
        wanted = _wanted(query.filters, query.node_ids or None, query.doc_ids or None)
        hits = search(self._rag, query.query_str, query.similarity_top_k, lambda hit: wanted(node_of(hit)))
        nodes = [node_of(hit) for hit in hits]
        return VectorStoreQueryResult(nodes, [hit.score for hit in hits], [node.node_id for node in nodes])

    async def async_add(self, nodes: Sequence[BaseNode], **_: Any) -> list[str]:
        """:meth:`add` in an event loop, which goes on meanwhile."""
        return await self._beside(self.add, nodes)

    async def adelete(self, ref_doc_id: str, **_: Any) -> None:
        """:meth:`delete` in an event loop, which goes on meanwhile."""
        await self._beside(self.delete, ref_doc_id)

    async def aget_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        """:meth:`get_nodes` in an event loop, which goes on meanwhile."""
        return await self._beside(self.get_nodes, node_ids, filters)

    async def adelete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **_: Any
    ) -> None:
        """:meth:`delete_nodes` in an event loop, which goes on meanwhile."""
        await self._beside(self.delete_nodes, node_ids, filters)

    async def aclear(self) -> None:
        """:meth:`clear` in an event loop, which goes on meanwhile."""
        await self._beside(self.clear)

    async def aquery(self, query: VectorStoreQuery, **_: Any) -> VectorStoreQueryResult:
        """:meth:`query` in an event loop, which goes on meanwhile."""
        return await self._beside(self.query, query)

    async def _beside(self, work: Callable[..., Any], *given: Any) -> Any:
        """What ``work`` gives, in a thread of the RAG's."""
        return await in_thread(self._rag.threads.pool(), partial(work, *given))

    def _put(self, documents: dict[str, dict[str, BaseNode]]) -> None:
        """Documents as they are now, each the passages of its nodes."""
        documents = {source: ordered(nodes) for source, nodes in documents.items()}
        cut = Cut({source: [shown(node) for node in nodes.values()] for source, nodes in documents.items()})
        metadata = [{NODES: [kept(node) for node in nodes.values()]} for nodes in documents.values()]
        self._rag.add_texts(list(cut.texts.values()), list(documents), metadata, chunker=cut)

    def _nodes(self, source: str) -> dict[str, BaseNode]:
        """The nodes of a document in order, by id; none where it is not there."""
        made = document(self._rag, source)
        return {} if made is None else nodes_of(made)

    def _all(self) -> dict[str, dict[str, BaseNode]]:
        """The nodes of all documents that were added here, by source."""
        return {made.source: nodes_of(made) for made in listed(self._rag) if NODES in made.metadata}


def _source(node: BaseNode) -> str:
    """What a node's document is called."""
    return f"{ADDED}{node.ref_doc_id or node.node_id}"


def _wanted(
    filters: MetadataFilters | None, node_ids: list[str] | None, doc_ids: list[str] | None = None
) -> Callable[[BaseNode], bool]:
    """Whether a node is of these ids, documents and metadata, by LlamaIndex's own rules."""
    if node_ids is not None:
        node_ids = all_of(node_ids, str, "node_ids must be a list of str")
    if doc_ids is not None:
        doc_ids = all_of(doc_ids, str, "doc_ids must be a list of str")
    instance("filters", filters, MetadataFilters | None, "LlamaIndex's MetadataFilters")
    metadata: dict[str, Any] = {}
    matches = build_metadata_filter_fn(lambda _: metadata, filters)

    def wanted(node: BaseNode) -> bool:
        if node_ids is not None and node.node_id not in node_ids:
            return False
        if doc_ids is not None and node.ref_doc_id not in doc_ids:
            return False
        metadata.clear()
        metadata.update(node.metadata, document_id=node.ref_doc_id, doc_id=node.ref_doc_id, ref_doc_id=node.ref_doc_id)
        try:
            return matches(node.node_id)
        except (TypeError, ValueError) as error:
            raise ArgumentError(f"filters cannot be applied to node {node.node_id}: {error}") from error

    return wanted
