"""The retriever: what LangChain's own tests do not ask."""

import json

import pytest
from langchain_core.runnables import ConfigurableField

from ragkv import UnknownArgumentError
from ragkv.adapters.langchain import RagKVRetriever
from ragkv.adapters.passages import REFERENCE
from tests.rag.rags import QUESTION, open_rag

from .stored import TEXTS, ids


def test_the_retriever_gives_what_the_folder_finds(rag):
    hits = rag.retrieve(QUESTION, top_k=4, neighbours=1)
    documents = RagKVRetriever(rag=rag, k=4, neighbours=1).invoke(QUESTION)
    assert [d.page_content for d in documents] == [hit.text for hit in hits]
    assert [(d.metadata["source"], d.metadata["score"]) for d in documents] == [(h.source, h.score) for h in hits]
    assert len(set(ids(documents))) == len(hits)
    assert json.loads(json.dumps([d.metadata for d in documents])) == [d.metadata for d in documents]
    assert RagKVRetriever(rag=rag).invoke(QUESTION, k=4, neighbours=1) == documents


def test_the_documents_metadata_come_along(model):
    with open_rag(model=model) as rag:
        rag.add_texts(TEXTS[:1], ["a"], [{"page": 7, REFERENCE: "mine"}])
        (document,) = RagKVRetriever(rag=rag).invoke("Clearport")
        assert document.metadata["page"] == 7 and document.metadata[REFERENCE]["passage"] == 0


def test_a_retriever_whose_fields_a_call_may_say(rag):
    retriever = RagKVRetriever(rag=rag, k=4, neighbours=1)
    by_call = retriever.configurable_fields(k=ConfigurableField("k"), retrieval=ConfigurableField("options"))
    assert by_call.invoke(QUESTION) == retriever.invoke(QUESTION)
    said = {"configurable": {"k": 1, "options": {"neighbours": 0}}}
    assert by_call.invoke(QUESTION, said) == RagKVRetriever(rag=rag, k=1).invoke(QUESTION)
    assert RagKVRetriever(rag=rag, retrieval={"neighbours": 0, "hops": 2}, neighbours=1).retrieval == {
        "neighbours": 1,
        "hops": 2,
    }
    with pytest.raises(UnknownArgumentError, match="retrieval has no option neighbors"):
        by_call.invoke(QUESTION, {"configurable": {"options": {"neighbors": 0}}})
