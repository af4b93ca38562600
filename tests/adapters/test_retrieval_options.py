"""The options of ragkv.Retrieval are the same in every framework: when a retriever is made, and for one call."""

import asyncio

import pytest
from langchain_core.runnables import RunnableLambda

from ragkv import ArgumentError, ArgumentTypeError, RetrievalError, UnknownArgumentError
from ragkv.adapters import haystack, langchain, llamaindex
from tests.rag.rags import DOCUMENTS, QUESTION

SOURCE = list(DOCUMENTS)[2]
OPTIONS = [
    {"hybrid": True},
    {"hops": 2},
    {"where": {"source": SOURCE}},
    {"where": lambda document: document.source == SOURCE},
    {"min_score": 0.15},
    {"max_context_tokens": 60},
    {"neighbours": 1},
    {"order": "best-last"},
    {"rerank": lambda question, texts: [-len(text) for text in texts]},
]
NAMES = [next(iter(options)) for options in OPTIONS]
WRONG = [({"hops": 0}, RetrievalError), ({"hybrid": 1}, ArgumentTypeError), ({"nonsense": 1}, UnknownArgumentError)]


def texts(found):
    return [getattr(each, "page_content", None) or getattr(each, "content", None) or each.text for each in found]


@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
def test_options(rag, options):
    want = texts(rag.retrieve(QUESTION, **options))
    assert want and want != texts(rag.retrieve(QUESTION))  # each option does something
    assert texts(langchain.RagKVRetriever(rag=rag, **options).invoke(QUESTION)) == want
    assert texts(langchain.RagKVRetriever(rag=rag).invoke(QUESTION, **options)) == want
    assert texts(asyncio.run(langchain.RagKVRetriever(rag=rag).ainvoke(QUESTION, **options))) == want
    assert texts(llamaindex.RagKVRetriever(rag, **options).retrieve(QUESTION)) == want
    assert texts(haystack.RagKVRetriever(rag, **options).run(QUESTION)["documents"]) == want
    assert texts(haystack.RagKVRetriever(rag).run(QUESTION, retrieval=options)["documents"]) == want
    made = langchain.create_ragkv_chain(langchain.RagKVRetriever(rag=rag), rag, max_new_tokens=1, **options)
    assert texts(made.invoke(QUESTION)["context"]) == want
    called = langchain.create_ragkv_chain(langchain.RagKVRetriever(rag=rag), rag, max_new_tokens=1)
    assert texts(called.invoke(QUESTION, **options)["context"]) == want
    engine = llamaindex.RagKVQueryEngine(rag, max_new_tokens=1, **options)
    assert texts(node.node for node in engine.query(QUESTION).source_nodes) == want


def test_a_passage_says_for_which_others_it_stands(rag):
    asked = DOCUMENTS[SOURCE][:200]
    rag.add_texts([DOCUMENTS[SOURCE]], ["copy.md"])
    first = langchain.RagKVRetriever(rag=rag, where={"source": SOURCE}).invoke(asked)
    assert not any("copies" in document.metadata for document in first)
    told = [
        [document.metadata for document in langchain.RagKVRetriever(rag=rag, k=9).invoke(asked)],
        [node.metadata for node in llamaindex.RagKVRetriever(rag, top_k=9).retrieve(asked)],
        [document.meta for document in haystack.RagKVRetriever(rag, 9).run(asked)["documents"]],
    ]
    for each in told:
        pairs = {(metadata["source"], *metadata["copies"]) for metadata in each if "copies" in metadata}
        assert pairs and pairs <= {(SOURCE, "copy.md"), ("copy.md", SOURCE)}


@pytest.mark.parametrize(("options", "error"), WRONG)
def test_wrong_options(rag, options, error):
    retriever = langchain.RagKVRetriever(rag=rag)
    for make in (
        lambda: langchain.RagKVRetriever(rag=rag, **options),
        lambda: retriever.invoke(QUESTION, **options),
        lambda: llamaindex.RagKVRetriever(rag, **options),
        lambda: haystack.RagKVRetriever(rag, **options),
        lambda: haystack.RagKVRetriever(rag).run(QUESTION, retrieval=options),
    ):
        with pytest.raises(error):
            make()


def test_a_retriever_of_others_has_no_options_of_ours(rag):
    with pytest.raises(ArgumentError, match=r"hops, k: only a RagKVRetriever"):
        langchain.create_ragkv_chain(RunnableLambda(lambda _: []), rag, hops=2, k=3)
    chain = langchain.create_ragkv_chain(langchain.RagKVRetriever(rag=rag), rag, k=2, max_new_tokens=1)
    assert len(chain.invoke(QUESTION)["context"]) == 2 and len(chain.invoke(QUESTION, k=3)["context"]) == 3


def test_haystack_writes_them(tmp_path, rag):
    made = haystack.RagKVRetriever(str(tmp_path), 3, hops=2, hybrid=True, where={"year": {"$gte": 2020}})
    written = made.to_dict()
    assert written["init_parameters"]["where"] == {"year": {"$gte": 2020}}
    assert haystack.RagKVRetriever.from_dict(written).to_dict() == written
    with pytest.raises(ArgumentError, match=r"where= cannot be written into a file"):
        haystack.RagKVRetriever(str(tmp_path), where=lambda document: True).to_dict()


def test_haystack_filters_are_on_metadata_and_go_with_where(rag):
    among = {"field": "meta.source", "operator": "in", "value": list(DOCUMENTS)[:3]}
    found = haystack.RagKVRetriever(rag, 9, filters=among, where={"source": {"$ne": SOURCE}}).run(QUESTION)
    assert {document.meta["source"] for document in found["documents"]} == set(list(DOCUMENTS)[:2])
    text = {"operator": "AND", "conditions": [among, {"field": "content", "operator": "==", "value": "x"}]}
    with pytest.raises(ArgumentError, match=r"filters must be on meta, as 'meta.source', got content"):
        haystack.RagKVRetriever(rag).run(QUESTION, text)
