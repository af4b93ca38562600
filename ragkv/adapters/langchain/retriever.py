"""The retriever."""

from __future__ import annotations

from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import run_in_executor

from ragkv.adapters.langchain.documents import document_of, remember
from ragkv.rag import RAG


class RagKVRetriever(BaseRetriever):
    """Finds passages of a ragkv folder, in the order of the prompt: documents by their best passage, each in its own order.

    Each document's metadata say which stored chunk it is: what answers with ragkv needs no more to take its KV.

    Attributes:
        rag: whose documents; whoever made it closes it.
        k: passages to find. ``invoke(question, k=3)`` overrides it, and so on for the others.
        neighbours: passages to take along on either side of each, see :meth:`ragkv.RAG.retrieve`.
    """

    rag: RAG
    k: int = 5
    neighbours: int = 0

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        k: int | None = None,
        neighbours: int | None = None,
    ) -> list[Document]:
        top_k, beside = self.k if k is None else k, self.neighbours if neighbours is None else neighbours
        hits = self.rag.retrieve(query, top_k, beside)
        remember(self.rag, hits)
        return [document_of(hit) for hit in hits]

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, **options: Any
    ) -> list[Document]:
        find = self._get_relevant_documents
        return await run_in_executor(None, find, query, run_manager=run_manager.get_sync(), **options)
