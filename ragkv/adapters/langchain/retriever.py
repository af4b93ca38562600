"""The retriever."""

from __future__ import annotations

from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import run_in_executor
from pydantic import Field

from ragkv.adapters.langchain.documents import document_of, remember
from ragkv.errors import instance
from ragkv.rag import RAG
from ragkv.retrieval import Retrieval


class RagKVRetriever(BaseRetriever):
    """Finds passages of a ragkv folder, in the order of the prompt: documents by their best passage, each in its own order.

    Each document's metadata say which stored chunk it is: what answers with ragkv needs no more to take its KV.

    Args:
        rag: whose documents; whoever made it closes it.
        k: passages to find; 5 by default, or as many as ``max_context_tokens`` takes.
        retrieval: options of :class:`ragkv.Retrieval` as a dict, for ``configurable_fields``; those that are named come first.
        **options: of :class:`ragkv.Retrieval` (``neighbours``, ``hybrid``, ``hops``, ``where``, ...), and of LangChain's
            ``BaseRetriever``. Those of retrieval, and ``k``, hold for one call too: ``invoke(question, k=3, hops=2)``.

    Attributes:
        retrieval: the options of retrieval.

    Raises:
        UnknownArgumentError: there is no such option.
        RetrievalError, ArgumentTypeError: one is out of range, or of another type.
    """

    rag: RAG
    k: int | None = None
    retrieval: dict[str, Any] = Field(default_factory=dict)

    def __init__(
        self, *, rag: RAG, k: int | None = None, retrieval: dict[str, Any] | None = None, **options: Any
    ) -> None:
        fields: dict[str, Any] = {name: options.pop(name) for name in BaseRetriever.model_fields if name in options}
        instance("retrieval", retrieval, dict | None, "a dict of options of ragkv.Retrieval")
        options = {**(retrieval or {}), **options}
        Retrieval.of(top_k=k, **options)
        fields |= {"rag": rag, "k": k, "retrieval": options}
        super().__init__(**fields)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, **options: Any
    ) -> list[Document]:
        asked = {**self.retrieval, **options}
        hits = self.rag.retrieve(query, asked.pop("k", self.k), **asked)
        remember(self.rag, hits)
        return [document_of(hit) for hit in hits]

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, **options: Any
    ) -> list[Document]:
        find = self._get_relevant_documents
        return await run_in_executor(None, find, query, run_manager=run_manager.get_sync(), **options)
