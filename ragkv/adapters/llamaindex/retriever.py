"""A folder's passages for LlamaIndex."""

from __future__ import annotations

from functools import partial
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.callbacks.base import CallbackManager
from llama_index.core.schema import IndexNode, NodeWithScore, QueryBundle

from ragkv.adapters.llamaindex.nodes import node_of
from ragkv.errors import instance
from ragkv.rag import RAG
from ragkv.retrieval import Retrieval
from ragkv.streaming import in_thread


class RagKVRetriever(BaseRetriever):
    """Finds passages of a :class:`~ragkv.RAG`, as a LlamaIndex ``BaseRetriever``.

    Nodes come in the order of the prompt: documents by their best passage, each in its own order. What the model is shown of
    one is its passage's text; its metadata are its document's, and a reference by which the synthesizer finds its KV.

    Args:
        rag: whose documents are searched.
        top_k: passages to find; 5 by default, or as many as ``max_context_tokens`` takes.
        neighbours: passages to take along on either side of each, see :meth:`ragkv.RAG.retrieve`.
        callback_manager, object_map, objects, verbose: of LlamaIndex's ``BaseRetriever``.
        **retrieval: more of :class:`ragkv.Retrieval`: ``hybrid``, ``hops``, ``where``, ...

    Attributes:
        retrieval: all options of retrieval by name; may be changed.

    Raises:
        UnknownArgumentError: there is no such option.
        RetrievalError, ArgumentTypeError: one is out of range, or of another type.
    """

    def __init__(
        self,
        rag: RAG,
        top_k: int | None = None,
        neighbours: int = 0,
        *,
        callback_manager: CallbackManager | None = None,
        object_map: dict[str, Any] | None = None,
        objects: list[IndexNode] | None = None,
        verbose: bool = False,
        **retrieval: Any,
    ):
        instance("rag", rag, RAG, "a ragkv.RAG, as ragkv.RAG.open('kv/')")
        self.retrieval: dict[str, Any] = {"top_k": top_k, "neighbours": neighbours, **retrieval}
        Retrieval.of(**self.retrieval)
        super().__init__(callback_manager, object_map, objects, verbose)
        self._rag = rag

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        wanted = "\n".join(query_bundle.embedding_strs)  # the question; or what a transform says to look for instead
        return [
            NodeWithScore(node=node_of(hit), score=hit.score) for hit in self._rag.retrieve(wanted, **self.retrieval)
        ]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await in_thread(self._rag.threads.pool(), partial(self._retrieve, query_bundle))
