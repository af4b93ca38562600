"""A namespace is kept apart in every adapter: who asks finds, and refers to, only what is its own."""

import pytest
from haystack import Document as HaystackDocument
from llama_index.core.schema import TextNode
from llama_index.core.vector_stores import VectorStoreQuery

from ragkv.adapters import haystack, langchain, llamaindex
from ragkv.adapters.langchain.documents import passages_of
from ragkv.adapters.langchain.members import ADDED
from ragkv.adapters.passages import REFERENCE, Passage, hand_over, known_chunks, reference
from ragkv.retrieval.records import source_id
from tests.rag.rags import DOCUMENTS, QUESTION, open_rag

TEXTS = ["She runs the harbour.", "Clearport lies on the river Exe."]


@pytest.fixture(params=["a", ""])
def two(request, tmp_path, model):
    """Two namespaces of one folder."""
    with open_rag(tmp_path, model, namespace="b") as theirs:
        theirs.add_texts(["Mira Lund is the secret name.\n\n" + TEXTS[0]], ["port.md"])
        llamaindex.RagKVVectorStore(theirs).add([TextNode(text=text, id_=text) for text in TEXTS])
    with open_rag(tmp_path, model, namespace=request.param) as ours, open_rag(tmp_path, model, namespace="b") as theirs:
        yield ours, theirs


def test_llama_index(two):
    ours, theirs = two
    store, query = llamaindex.RagKVVectorStore(ours), VectorStoreQuery(query_str=QUESTION, similarity_top_k=9)
    assert store.get_nodes() == [] and store.query(query).nodes == []
    assert llamaindex.RagKVRetriever(ours).retrieve(QUESTION) == []
    store.add([TextNode(text="Ours.", id_=TEXTS[0])])
    assert [node.text for node in store.query(query).nodes] == ["Ours."] == [node.text for node in store.get_nodes()]
    store.delete(TEXTS[1])
    store.clear()
    assert {node.text for node in llamaindex.RagKVVectorStore(theirs).get_nodes()} == set(TEXTS)


def test_langchain(two):
    ours, theirs = two
    store, other = langchain.RagKVVectorStore(ours), langchain.RagKVVectorStore(theirs)
    other.add_texts(TEXTS, ids=["1", "2"])
    assert store.similarity_search(QUESTION, 9) == [] and store.get_by_ids(["1"]) == []
    assert langchain.RagKVRetriever(rag=ours).invoke(QUESTION) == []
    store.add_texts(["Ours."], ids=["1"])
    assert [found.page_content for found in store.similarity_search(QUESTION, 9)] == ["Ours."]
    store.add_texts(["Ours too."], ids=["3"])
    for wanted in (["Ours."], ["Ours too."], []):  # has to look further for some of them
        found = store.similarity_search(QUESTION, 1, filter=lambda document: document.page_content in wanted)  # noqa: B023
        assert [document.page_content for document in found] == wanted
    store.delete(["2"])
    store.delete()
    assert store.get_by_ids(["1"]) == [] and len(other.get_by_ids(["1", "2"])) == 2
    assert len(other.similarity_search(QUESTION, 9)) > 2


def test_haystack(two):
    ours, theirs = two
    every = {"field": "meta.source", "operator": "!=", "value": "x"}
    for filters in (None, every):
        assert haystack.RagKVRetriever(ours).run(QUESTION, filters)["documents"] == []
        assert haystack.RagKVRetriever(theirs).run(QUESTION, filters)["documents"]
    (found,) = haystack.RagKVRetriever(theirs, 1).run(TEXTS[1])["documents"]
    said = haystack.RagKVGenerator(ours, {"max_new_tokens": 4}).run(QUESTION, [found])
    alone = haystack.RagKVGenerator(ours, {"max_new_tokens": 4}).run(
        QUESTION, [HaystackDocument(content=found.content)]
    )
    assert said["replies"] == alone["replies"]


def test_a_reference_into_another_namespace_is_none(two):
    ours, theirs = two
    hits = [hit for hit in theirs.retriever.search(TEXTS[0], 9, namespace="b") if hit.source == "port.md"]
    assert hits
    handed = hand_over(ours.engine, [Passage(hit.text, reference=reference(hit)) for hit in hits])
    assert [chunk.to_dict() for chunk in handed.chunks] == [
        ours.engine.documents.passage(hit.text).to_dict() for hit in hits
    ]


def test_what_a_vector_store_gives_is_known_in_its_own_namespace(two):
    """Its documents come back without a reference: the folder's KV are theirs all the same."""
    ours, theirs = two
    for rag in two:
        langchain.RagKVVectorStore(rag).add_texts(
            [*TEXTS, rag.engine.documents.namespace or "none"], ids=["1", "2", "3"]
        )
    found = langchain.RagKVVectorStore(theirs).get_by_ids(["1", "2", "3"])
    given = passages_of(found, theirs.engine, "b")
    want = [source_id(f"{ADDED}{number}", "b") for number in (1, 2, 3)]
    assert [chunk.document for chunk in known_chunks(theirs.engine, given).values()] == want
    other = known_chunks(ours.engine, passages_of(found, ours.engine, ours.engine.documents.namespace))
    assert list(other) == [0, 1] and not {chunk.document for chunk in other.values()} & set(want)
    assert theirs.engine.documents.missing(hand_over(theirs.engine, given).chunks) == []


def test_passages_stand_where_the_answer_is_asked_for(two):
    """An engine that answers in another namespace takes that one's KV, whichever framework names it."""
    ours, theirs = two
    theirs.add_texts([DOCUMENTS["clearport.md"]], ["clearport.md"])
    options = {"max_new_tokens": 2, "namespace": "b"}
    found = haystack.RagKVRetriever(theirs, 9).run(TEXTS[0])["documents"]
    said = haystack.RagKVGenerator(ours, options).run(QUESTION, found)["meta"][0]
    assert said["report"]["fusion"]["hits"] == {"disk": len(found)} and len(found) > 3
    nodes = llamaindex.RagKVRetriever(theirs, 9).retrieve(TEXTS[0])
    answer = llamaindex.RagKVSynthesizer(ours, max_new_tokens=2).synthesize(QUESTION, nodes, namespace="b")
    assert answer.metadata[REFERENCE]["report"]["fusion"]["hits"] == {"cpu": len(nodes)}


def test_passages_stand_where_the_past_does(two):
    """Whoever goes on from an answer takes KV of its namespace."""
    ours, theirs = two
    theirs.add_texts([DOCUMENTS["clearport.md"]], ["clearport.md"])
    found = haystack.RagKVRetriever(theirs, 9).run(TEXTS[0])["documents"]
    past = ours.ask(QUESTION, top_k=1, namespace="b", max_new_tokens=2, keep_past=True).past
    said = haystack.RagKVGenerator(ours, {"max_new_tokens": 2, "past": past}).run(QUESTION, found)["meta"][0]
    assert "computed" not in said["report"]["fusion"]["hits"] and len(found) > 3
