"""Embeddings of LangChain as ours, and ours as LangChain's."""

import numpy as np
import pytest
from langchain_core.embeddings import DeterministicFakeEmbedding

from ragkv import ArgumentTypeError, RetrievalError
from ragkv.adapters.langchain import LangChainEmbedder, RagKVEmbeddings
from tests.rag.rags import WordEmbedder


def test_embeddings_are_told_apart():
    class Named(DeterministicFakeEmbedding):
        model: str = ""

    one, two = LangChainEmbedder(Named(size=6, model="one")), LangChainEmbedder(Named(size=6, model="two"))
    assert (one.name, one.dimension) == ("one", 6) and np.linalg.norm(one.encode_query("x")) == pytest.approx(1)
    plain = DeterministicFakeEmbedding(size=6)
    prints = [one.fingerprint, two.fingerprint, LangChainEmbedder(plain).fingerprint]
    assert len(set(prints)) == 3 and prints[2] == LangChainEmbedder(DeterministicFakeEmbedding(size=6)).fingerprint
    assert LangChainEmbedder(plain, "mine").fingerprint == "mine"
    assert one.encode_documents([]).shape == (0, 6)


def test_embeddings_that_are_none():
    class Broken(DeterministicFakeEmbedding):
        answer: object = None

        def embed_query(self, text):
            return self.answer

    for answer, error in (([float("nan")], RetrievalError), ([], RetrievalError), (["x"], ArgumentTypeError)):
        with pytest.raises(error, match="embeddings must give"):
            LangChainEmbedder(Broken(size=1, answer=answer))
    with pytest.raises(ArgumentTypeError, match="Embeddings"):
        LangChainEmbedder("name")
    with pytest.raises(ArgumentTypeError, match=r"ragkv\.retrieval\.Embedder"):
        RagKVEmbeddings("name")
    assert RagKVEmbeddings(WordEmbedder()).embed_documents([]) == []
