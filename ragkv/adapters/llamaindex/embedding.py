"""A folder's embedder as LlamaIndex's embedding model, where an index asks for one: nothing is fetched."""

from __future__ import annotations

from functools import partial
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import PrivateAttr

from ragkv.errors import instance
from ragkv.rag import RAG
from ragkv.streaming import in_thread


class RagKVEmbedding(BaseEmbedding):
    """What turns a folder's passages and questions into vectors, as a LlamaIndex ``BaseEmbedding``.

    Args:
        rag: whose embedder it is; its threads keep the event loop free.
        **fields: of LlamaIndex's ``BaseEmbedding`` (``embed_batch_size``, ``callback_manager``, ...).
    """

    _rag: RAG = PrivateAttr()

    def __init__(self, rag: RAG, **fields: Any):
        instance("rag", rag, RAG, "a ragkv.RAG, as ragkv.RAG.open('kv/')")
        super().__init__(**{"model_name": rag.retriever.embedder.name, **fields})
        self._rag = rag

    @classmethod
    def class_name(cls) -> str:
        """LlamaIndex's name of the class."""
        return "RagKVEmbedding"

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._rag.retriever.embedder.encode_query(query).tolist()

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._rag.retriever.embedder.encode_documents(texts).tolist()

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await in_thread(self._rag.threads.pool(), partial(self._get_query_embedding, query))

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return (await self._aget_text_embeddings([text]))[0]

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await in_thread(self._rag.threads.pool(), partial(self._get_text_embeddings, texts))
