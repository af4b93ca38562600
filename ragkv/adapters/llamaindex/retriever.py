"""A folder's passages for LlamaIndex."""

from __future__ import annotations

from functools import partial
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle

from ragkv.adapters.llamaindex.nodes import scored
from ragkv.errors import instance
from ragkv.rag import RAG
from ragkv.streaming import in_thread


class RagKVRetriever(BaseRetriever):
    """Finds passages of a :class:`~ragkv.RAG`, as a LlamaIndex ``BaseRetriever``.

    Nodes come in the order of the prompt: documents by their best passage, each in its own order. What the model is shown of
    one is its passage's text; its metadata are its document's, and a reference by which the synthesizer finds its KV.

    Args:
        rag: whose documents are searched.
        top_k: passages to find.
        neighbours: passages to take along on either side of each, see :meth:`ragkv.RAG.retrieve`.
        **options: of LlamaIndex's ``BaseRetriever``.
    """

    def __init__(self, rag: RAG, top_k: int = 5, neighbours: int = 0, **options: Any):
        instance("rag", rag, RAG, "a ragkv.RAG, as ragkv.RAG.open('kv/')")
        super().__init__(**options)
        self._rag, self.top_k, self.neighbours = rag, top_k, neighbours

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return scored(self._rag.retrieve(query_bundle.query_str, self.top_k, self.neighbours))

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await in_thread(self._rag.threads.pool(), partial(self._retrieve, query_bundle))
