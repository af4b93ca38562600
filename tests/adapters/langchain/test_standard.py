"""LangChain's own tests for what stands in for its parts."""

from collections.abc import Iterator

import pytest
from langchain_tests.integration_tests import (
    EmbeddingsIntegrationTests,
    RetrieversIntegrationTests,
    VectorStoreIntegrationTests,
)
from langchain_tests.unit_tests import EmbeddingsUnitTests

from ragkv.adapters.langchain import LangChainEmbedder, RagKVEmbeddings, RagKVRetriever, RagKVVectorStore
from tests.rag.rags import QUESTION, WordEmbedder, open_rag


class Embeds:
    """What is known of these embeddings."""

    @property
    def embeddings_class(self):
        return RagKVEmbeddings

    @property
    def embedding_model_params(self):
        return {"embedder": WordEmbedder()}


class TestEmbeddingsUnit(Embeds, EmbeddingsUnitTests):
    pass


class TestEmbeddings(Embeds, EmbeddingsIntegrationTests):
    pass


class TestRetriever(RetrieversIntegrationTests):
    @pytest.fixture(autouse=True)
    def over(self, rag):
        self.rag = rag

    @property
    def retriever_constructor(self):
        return RagKVRetriever

    @property
    def retriever_constructor_params(self):
        return {"rag": self.rag}

    @property
    def retriever_query_example(self):
        return QUESTION


class TestVectorStore(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, model) -> Iterator[RagKVVectorStore]:
        with open_rag(model=model, embedder=LangChainEmbedder(self.get_embeddings())) as rag:
            yield RagKVVectorStore(rag)
