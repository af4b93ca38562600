import pytest

from ragkv.adapters.langchain import RagKVVectorStore
from tests.rag.rags import open_rag

from .stored import TEXTS, WHERE


@pytest.fixture
def store(model):
    with open_rag(model=model) as rag:
        store = RagKVVectorStore(rag)
        store.add_texts(TEXTS, WHERE, ids=["a", "b", "c"])
        yield store
