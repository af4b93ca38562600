"""LlamaIndex's nodes in a folder of ours, by themselves and under a VectorStoreIndex."""

import asyncio
import threading

import pytest
from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.node_parser import TokenTextSplitter
from llama_index.core.schema import Document, MetadataMode, NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
)
from llama_index.core.vector_stores.types import VectorStoreQueryMode

from ragkv import ArgumentError, ArgumentTypeError, DocumentError, PromptTooLongError
from ragkv.adapters.llamaindex import RagKVEmbedding, RagKVLLM, RagKVRetriever, RagKVSynthesizer, RagKVVectorStore
from ragkv.adapters.llamaindex.nodes import passage_of
from ragkv.adapters.passages import hand_over
from tests.rag.rags import DOCUMENTS, QUESTION, open_rag

TEXTS = ["Clearport lies on the river Exe.", "It sells tar by the barrel.", "She runs the harbour there."]


def node(text, name, document="", **fields):
    source = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id=document)} if document else {}
    return TextNode(text=text, id_=name, relationships=source, **fields)


def three(document="port"):
    return [
        node(text, f"{document} {number}", document, metadata={"year": 1790 + number})
        for number, text in enumerate(TEXTS)
    ]


def asked(question=QUESTION, top_k=5, **more):
    return VectorStoreQuery(query_str=question, similarity_top_k=top_k, **more)


def plain(nodes):
    """Nodes as they were added."""
    return [(node.node_id, node.text, {k: v for k, v in node.metadata.items() if k != "ragkv"}) for node in nodes]


@pytest.fixture
def empty(model):
    with open_rag(model=model) as rag:
        yield rag


@pytest.fixture
def store(empty):
    return RagKVVectorStore(empty)


def test_nodes_of_a_document_are_read_behind_each_other(store, empty):
    nodes = three()
    assert store.add(nodes) == [node.node_id for node in nodes]
    found = RagKVRetriever(empty, 5).retrieve(QUESTION)
    assert plain(hit.node for hit in found) == plain(nodes)
    chunks = hand_over(empty.engine, map(passage_of, found)).chunks
    shown = [node.get_content(metadata_mode=MetadataMode.LLM) for node in nodes]
    assert shown[0].startswith("year: 1790\n")
    want = empty.engine.documents.cut(shown, chunks[0].document)
    assert [(chunk.ids, chunk.context) for chunk in chunks] == [(chunk.ids, chunk.context) for chunk in want]
    assert not empty.engine.documents.missing(chunks)


@pytest.mark.parametrize("side", ["PREVIOUS", "NEXT"])
def test_nodes_stand_in_the_order_that_they_say(store, side):
    first, second, third = nodes = three()
    for one, two in ((first, second), (second, third)):
        link, other = (two, one) if side == "PREVIOUS" else (one, two)
        link.relationships[NodeRelationship[side]] = RelatedNodeInfo(node_id=other.node_id)
    store.add([third, *three("other"), first])
    assert plain(store.get_nodes(["port 0", "port 2"])) == plain([third, first]), "nothing says how"
    store.add([second])
    assert plain(store.get_nodes([node.node_id for node in nodes])) == plain(nodes)


def test_nodes_behind_each_other_in_a_circle_are_all_there(store):
    nodes = three()
    for at, made in enumerate(nodes):
        made.relationships[NodeRelationship.PREVIOUS] = RelatedNodeInfo(node_id=nodes[at - 1].node_id)
    store.add(nodes)
    assert sorted(node.node_id for node in store.get_nodes()) == ["port 0", "port 1", "port 2"]


def test_query_gives_the_nearest_first(store):
    store.add(three())
    result = store.query(asked(TEXTS[1], 2))
    assert result.nodes[0].text == TEXTS[1] and result.ids[0] == "port 1"
    assert len(result.nodes) == 2 and result.similarities == sorted(result.similarities, reverse=True)


@pytest.mark.parametrize(
    ("filters", "years"),
    [
        ([("year", ">", 1790)], {1791, 1792, 1800}),
        ([("year", "in", [1790, 1792])], {1790, 1792}),
        ([("year", ">", 1790), ("year", "<", 1792)], {1791}),
        ([("ref_doc_id", "==", "other")], {1800}),
        ([("year", "==", 5)], set()),
    ],
)
def test_filters(store, filters, years):
    store.add([*three(), node("Northwich lies inland.", "n", "other", metadata={"year": 1800})])
    made = MetadataFilters(filters=[MetadataFilter(key=k, operator=FilterOperator(o), value=v) for k, o, v in filters])
    for found in (store.query(asked(filters=made)).nodes, store.get_nodes(filters=made)):
        assert {found.metadata["year"] for found in found} == years
    if years == {1791}:
        made.condition = FilterCondition.OR
        assert len(store.query(asked(filters=made)).nodes) == 4


def test_a_filter_looks_further_than_top_k(store):
    """The nearest ones are not wanted."""
    store.add([node(f"{TEXTS[0]} Number {n}.", f"near {n}", metadata={"wanted": 0}) for n in range(20)])
    store.add([node("Something else.", "far", metadata={"wanted": 1})])
    wanted = MetadataFilters(filters=[MetadataFilter(key="wanted", value=1)])
    assert store.query(asked(TEXTS[0], 1, filters=wanted)).ids == ["far"]


def test_ids_and_documents(store):
    store.add([*three(), *three("other")])
    assert set(store.query(asked(doc_ids=["other"])).ids) == {"other 0", "other 1", "other 2"}
    assert store.query(asked(node_ids=["port 1"])).ids == ["port 1"]
    assert len(store.query(asked(top_k=9, node_ids=[], doc_ids=[])).ids) == 6  # what an index says that has no ids
    assert plain(store.get_nodes(["other 1", "gone"])) == plain(three("other")[1:2])


def test_a_known_id_is_replaced_in_its_place(store, reads, empty):
    store.add(three())
    seen = reads(empty.engine)
    store.add(three())
    assert seen == []
    store.add([node("It sells rope.", "port 1", "port"), node("A last one.", "port 3", "port")])
    assert [found.text for found in store.get_nodes()] == [TEXTS[0], "It sells rope.", TEXTS[2], "A last one."]
    assert empty.retriever.search("It sells rope.", 1)[0].text == "It sells rope."
    assert len(store.query(asked(top_k=9)).nodes) == 4


def test_metadata_alone_may_change(store, empty, reads):
    quiet = {"excluded_llm_metadata_keys": ["year"]}
    store.add([node(TEXTS[0], "a", metadata={"year": 1}, **quiet)])
    seen = reads(empty.engine)
    store.add([node(TEXTS[0], "a", metadata={"year": 2}, **quiet)])
    assert store.query(asked()).nodes[0].metadata["year"] == 2 and seen == []


def test_delete(store, empty):
    empty.add_texts([DOCUMENTS["clearport.md"]], ["port"])  # called as the document of the nodes is
    files = len(empty.retriever.search(QUESTION, 99))
    store.add([*three(), node("Alone.", "alone"), *three("other")])
    store.delete("gone")
    store.delete("other")
    store.delete("alone")
    assert plain(store.get_nodes()) == plain(three())
    store.delete_nodes(["port 0"])
    assert plain(store.get_nodes()) == plain(three()[1:])
    above = MetadataFilters(filters=[MetadataFilter(key="year", operator=FilterOperator.GT, value=1791)])
    store.delete_nodes(filters=above)
    assert plain(store.get_nodes()) == plain(three()[1:2])
    store.clear()
    assert store.get_nodes() == [] and len(empty.retriever.search(QUESTION, 99)) == files
    assert [document.source for document in empty.documents()] == ["port"]


def test_what_is_in_the_folder_otherwise_is_found_too(store, empty):
    empty.add_texts([DOCUMENTS["clearport.md"]], ["clearport.md"])
    (found,) = store.query(asked(top_k=1)).nodes
    assert (found.ref_doc_id, found.metadata["source"]) == ("clearport.md", "clearport.md")
    assert store.get_nodes() == []


def test_nodes_survive(model, tmp_path):
    with open_rag(tmp_path, model) as rag:
        RagKVVectorStore(rag).add(three())
    with open_rag(tmp_path, model) as rag:
        assert plain(RagKVVectorStore(rag).get_nodes()) == plain(three())
        assert RagKVSynthesizer(rag, max_new_tokens=2).synthesize(
            QUESTION, RagKVRetriever(rag, 2).retrieve(QUESTION)
        ).metadata["ragkv"]["report"]["fusion"]["hits"] == {"disk": 2}


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ([node(" ", "x")], "node x has no text"),
        ([node("X.", "x", metadata={"at": object()})], "node x has metadata that JSON cannot hold"),
        ([node("X.", "x"), node("Y.", "x")], "two nodes have the id 'x'"),
        ([node("X.", "x", "one"), node("X.", "x", "two")], "two nodes have the id 'x'"),
    ],
    ids=["blank", "no json", "clash", "clash of documents"],
)
def test_what_cannot_be_added_adds_nothing(store, bad, said):
    store.add(three())
    with pytest.raises(DocumentError, match=said):
        store.add([*three("other"), *bad])
    assert plain(store.get_nodes()) == plain(three())


def test_a_node_that_is_too_long_adds_nothing(model):
    with open_rag(model=model, document_tokens=64) as rag:
        store = RagKVVectorStore(rag)
        with pytest.raises(PromptTooLongError, match="split it into smaller parts"):
            store.add([*three(), node(TEXTS[0] * 40, "long")])
        assert store.get_nodes() == []


def test_what_cannot_be_asked(store):
    store.add([*three(), node("Untold.", "u", metadata={"year": "long ago"})])
    with pytest.raises(ArgumentError, match="mode must be 'default'"):
        store.query(asked(mode=VectorStoreQueryMode.HYBRID))
    with pytest.raises(ArgumentError, match="query_str must be the question's text"):
        store.query(VectorStoreQuery(query_embedding=[1.0]))
    later = MetadataFilters(filters=[MetadataFilter(key="year", operator=FilterOperator.GT, value=1)])
    with pytest.raises(ArgumentError, match="filters cannot be applied to node u"):
        store.query(asked(filters=later))
    with pytest.raises(ArgumentTypeError, match="filters must be LlamaIndex's MetadataFilters"):
        store.query(VectorStoreQuery(query_str="Anna", filters={"a": 1}))
    with pytest.raises(ArgumentTypeError, match=r"rag must be a ragkv.RAG"):
        RagKVVectorStore("kv/")


def test_ids_that_are_no_unicode_are_nowhere(store):
    with pytest.raises(DocumentError, match="not valid Unicode"):
        store.add([TextNode(id_="\ud800", text="Tar.")])
    store.add([TextNode(id_="tar", text="Tar.")])
    store.delete("\ud800")
    store.delete_nodes(["\ud800"])
    assert store.get_nodes(["\ud800"]) == [] and len(store.get_nodes()) == 1


def test_one_text_is_no_list(store):
    one = node("Tar.", "ab")
    store.add([node("Tar is black.", "a"), one])
    for call in (
        lambda: store.delete_nodes("ab"),
        lambda: store.get_nodes("ab"),
        lambda: store.query(asked(node_ids="ab")),
        lambda: store.query(asked(doc_ids="ab")),
        lambda: store.add(one),
        lambda: store.add(["ab"]),
    ):
        with pytest.raises(ArgumentTypeError, match="must be a list of "):
            call()
    assert {found.node_id for found in store.get_nodes()} == {"a", "ab"}
    store.delete_nodes(iter(["ab"]))
    assert [found.node_id for found in store.get_nodes()] == ["a"]


def test_equal_documents(store):
    """The same words, cut in one and in two."""
    store.add([node("a b", "1", "x"), node("c d", "2", "x"), node("a b\n\nc d", "3", "y")])
    assert [found.text for found in store.get_nodes()] == ["a b", "c d", "a b\n\nc d"]
    store.add([node("a b\n\nc d", "1", "z")])
    store.delete("z")
    store.add([node("a b", "1", "z"), node("c d", "2", "z")])
    assert [found.text for found in store.get_nodes() if found.ref_doc_id == "z"] == ["a b", "c d"]


def test_a_fork_beside_somebody_who_adds(store, forked_amid):
    assert (
        forked_amid(lambda: store.add(three()), store.client, "add_texts", lambda: store.add(three()[:1]))
        == "['port 0']"
    )


def test_adding_from_threads_loses_nothing(empty, store):
    """Each through a store of its own: they are the same folder's."""

    def add(number):
        RagKVVectorStore(empty).add([node(f"Number {number}.", f"{number}", "shared")])

    threads = [threading.Thread(target=add, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {found.node_id for found in store.get_nodes()} == {str(number) for number in range(6)}


def index_over(rag, documents=(), **options):
    context = StorageContext.from_defaults(vector_store=RagKVVectorStore(rag))
    splitter = TokenTextSplitter(chunk_size=32, chunk_overlap=0, tokenizer=str.split)
    return VectorStoreIndex.from_documents(
        documents, storage_context=context, embed_model=RagKVEmbedding(rag), transformations=[splitter], **options
    )


@pytest.mark.parametrize("use_async", [False, True])
def test_an_index_over_it(empty, reads, use_async):
    hidden = {"excluded_llm_metadata_keys": ["file"], "excluded_embed_metadata_keys": ["file"]}
    documents = [Document(text=text, id_=name, metadata={"file": name}, **hidden) for name, text in DOCUMENTS.items()]
    index = index_over(empty, documents, use_async=use_async)
    assert {found.ref_doc_id for found in index.vector_store.get_nodes()} == DOCUMENTS.keys()
    seen = reads(empty.engine)
    engine = index.as_query_engine(
        llm=RagKVLLM(empty),
        response_synthesizer=RagKVSynthesizer(empty, max_new_tokens=4),
        similarity_top_k=3,
    )
    response = engine.query(QUESTION)
    assert seen == [] and len(response.source_nodes) == 3
    assert response.metadata["ragkv"]["report"]["fusion"]["hits"] == {"cpu": 3}
    assert response.source_nodes[0].node.metadata["file"] == "clearport.md"
    assert str(asyncio.run(engine.aquery(QUESTION))) == str(response) and seen == []

    again = VectorStoreIndex.from_vector_store(RagKVVectorStore(empty), embed_model=RagKVEmbedding(empty))
    assert plain(hit.node for hit in again.as_retriever(similarity_top_k=3).retrieve(QUESTION)) == plain(
        hit.node for hit in response.source_nodes
    )
    again.delete_ref_doc("clearport.md")
    assert {found.ref_doc_id for found in again.vector_store.get_nodes()} == DOCUMENTS.keys() - {"clearport.md"}
    again.insert(Document(text="Clearport again.", id_="clearport.md"))
    assert "clearport.md" in {hit.node.ref_doc_id for hit in again.as_retriever().retrieve("Clearport again.")}


async def test_in_an_event_loop(store, monkeypatch):
    worked = []

    def noted(name, work):
        def work_noted(*given):
            worked.append((name, threading.current_thread() is threading.main_thread()))
            return work(*given)

        monkeypatch.setattr(RagKVVectorStore, name, work_noted)

    for name in (names := ["add", "query", "delete_nodes", "get_nodes", "delete", "clear"]):
        noted(name, getattr(RagKVVectorStore, name))
    await store.async_add(three())
    assert len((await store.aquery(asked())).nodes) == 3
    await store.adelete_nodes(["port 0"])
    assert len(await store.aget_nodes()) == 2
    await store.adelete("port")
    await store.async_add(three())
    await store.aclear()
    assert store.get_nodes() == []
    assert {name for name, _ in worked} == set(names) and [name for name, main in worked if main] == ["get_nodes"]
