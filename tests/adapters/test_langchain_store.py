"""The retriever, the vector store and embeddings: what LangChain's own tests do not ask."""

import gc
import json
import weakref
from functools import partial
from weakref import WeakKeyDictionary

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.indexing import InMemoryRecordManager, index
from langchain_core.runnables import ConfigurableField

from ragkv import (
    RAG,
    ArgumentError,
    ArgumentTypeError,
    DocumentError,
    IncompatibleFolderError,
    PromptTooLongError,
    RetrievalError,
    UnknownArgumentError,
)
from ragkv.adapters.langchain import LangChainEmbedder, RagKVEmbeddings, RagKVRetriever, RagKVVectorStore
from ragkv.adapters.langchain.documents import passages_of
from ragkv.adapters.langchain.members import Members, references
from ragkv.adapters.passages import REFERENCE, hand_over
from ragkv.retrieval import Catalogue, Snapshot
from tests.rag.rags import DOCUMENTS, QUESTION, WordEmbedder, open_rag

TEXTS = ["Clearport lies on the river Exe.", "Mira Lund runs the mill.", "The mill stands in Clearport."]
WHERE = [{"page": 1, "kind": "town"}, {"page": 2, "kind": "mill"}, {"page": 3, "kind": "mill", "tags": ["old"]}]


@pytest.fixture
def store(model):
    with open_rag(model=model) as rag:
        store = RagKVVectorStore(rag)
        store.add_texts(TEXTS, WHERE, ids=["a", "b", "c"])
        yield store


def ids(documents):
    return [document.id for document in documents]


def state(store):
    rag = store.rag
    return sorted((d.source, d.content_hash, str(d.metadata)) for d in rag.retriever.catalogue.documents())


def test_the_retriever_gives_what_the_folder_finds(rag):
    hits = rag.retrieve(QUESTION, top_k=4, neighbours=1)
    documents = RagKVRetriever(rag=rag, k=4, neighbours=1).invoke(QUESTION)
    assert [d.page_content for d in documents] == [hit.text for hit in hits]
    assert [(d.metadata["source"], d.metadata["score"]) for d in documents] == [(h.source, h.score) for h in hits]
    assert len(set(ids(documents))) == len(hits)
    assert json.loads(json.dumps([d.metadata for d in documents])) == [d.metadata for d in documents]
    assert RagKVRetriever(rag=rag).invoke(QUESTION, k=4, neighbours=1) == documents


async def test_the_retriever_in_an_event_loop(rag):
    retriever = RagKVRetriever(rag=rag, k=2)
    assert await retriever.ainvoke(QUESTION) == retriever.invoke(QUESTION)
    assert await retriever.ainvoke(QUESTION, k=3) == retriever.invoke(QUESTION, k=3)


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


def test_a_retriever_is_told_what_is_wrong(rag):
    with pytest.raises(RetrievalError, match="question must be"):
        RagKVRetriever(rag=rag).invoke(" ")
    with pytest.raises(RetrievalError, match="0"):
        RagKVRetriever(rag=rag).invoke(QUESTION, k=0)


def test_kv_are_made_when_documents_are_added(store, reads):
    seen = reads(store.rag.engine)
    assert store.rag.documents()[0].kv_bytes
    store.add_texts(TEXTS, WHERE, ids=["a", "b", "c"])
    assert not seen
    store.add_texts(["Something new."], ids=["d"])
    assert len(seen) == 1


def test_a_text_is_one_passage_as_it_is(store):
    text = "\n A text " + "with many words " * 60 + "\n"
    store.add_texts([text], ids=["long"])
    (document,) = store.get_by_ids(["long"])
    assert document.page_content == text
    assert [d.passages for d in store.rag.documents() if d.source == "langchain:long"] == [1]


def test_filters(store):
    def found(wanted, k=3):
        return ids(store.similarity_search("Clearport mill", k=k, filter=wanted))

    assert set(found({"kind": "mill"})) == {"b", "c"}
    assert found({"kind": "mill", "page": 2}) == ["b"]
    assert found({"tags": ["old"]}) == ["c"]
    assert found({"nothing": None}) == []
    assert found(lambda document: document.metadata["page"] < 2) == ["a"]
    with_score = store.similarity_search_with_score("Clearport", k=1, filter={"page": 2})
    assert ids(document for document, _ in with_score) == ["b"]
    retriever = store.as_retriever(search_kwargs={"k": 1, "filter": {"page": 3}})
    assert ids(retriever.invoke("Mira Lund")) == ["c"]


def test_a_filter_looks_as_far_as_it_has_to(store):
    store.add_texts([f"Clearport {n}" for n in range(30)], [{"page": 0}] * 30)
    assert ids(store.similarity_search("Clearport", k=1, filter={"page": 2})) == ["b"]


def test_scores_are_cosines_and_relevance_lies_between_0_and_1(store):
    scores = store.similarity_search_with_score(TEXTS[1], k=3)
    vectors = store.rag.retriever.embedder.encode_documents(TEXTS)
    want = sorted((vectors @ vectors[1]).tolist(), reverse=True)
    assert [score for _, score in scores] == pytest.approx(want, abs=1e-6) and scores[0][0].id == "b"
    relevant = store.similarity_search_with_relevance_scores(TEXTS[1], k=3, score_threshold=0.9)
    assert ids(document for document, _ in relevant) == ["b"]


def test_relevance_of_opposite_vectors():
    class Signed(DeterministicFakeEmbedding):
        def embed_query(self, text):
            return [-1.0, 0.0] if text == "no" else [3.0, 0.0]

        def embed_documents(self, texts):
            return [self.embed_query(text) for text in texts]

    with open_rag(embedder=LangChainEmbedder(Signed(size=2))) as rag:
        store = RagKVVectorStore(rag)
        store.add_texts(["yes", "no"])
        found = store.similarity_search_with_relevance_scores("yes", k=2)
        assert [score for _, score in found] == [1.0, 0.0]


def test_maximal_marginal_relevance(store):
    store.add_texts([TEXTS[0] + " Indeed."], ids=["again"])
    assert ids(store.similarity_search(TEXTS[0], k=2)) == ["a", "again"]
    assert ids(store.max_marginal_relevance_search(TEXTS[0], k=2, lambda_mult=0.1))[0] == "a"
    assert "again" not in ids(store.max_marginal_relevance_search(TEXTS[0], k=2, lambda_mult=0.1))
    assert store.max_marginal_relevance_search("x", filter={"page": 9}) == []


def test_an_id_is_overwritten_and_its_kv_go(store):
    before = store.rag.documents()
    store.add_texts(["Another text."], [{"page": 9}], ids=["a"])
    assert store.get_by_ids(["a", "a", "none"]) == [
        Document(id="a", page_content="Another text.", metadata={"page": 9})
    ]
    assert len(store.rag.documents()) == len(before)
    assert len(store.rag.engine.store) == 3


def test_an_id_that_is_no_unicode_is_nowhere(store):
    with pytest.raises(DocumentError, match="not valid Unicode"):
        store.add_texts(TEXTS[:1], ids=["\ud800"])
    assert store.get_by_ids(["\ud800"]) == [] and store.delete(["\ud800"])
    found = [Document(id="\ud800", page_content=TEXTS[0])]
    assert passages_of(found, store.rag.engine, "")[0].reference is None


def test_one_text_is_no_list(store):
    store.add_texts(TEXTS, ids=["a", "b", "ab"])
    for call in (
        lambda: store.delete("ab"),
        lambda: store.get_by_ids("ab"),
        lambda: store.add_texts("ab"),
        lambda: store.add_texts(TEXTS[:2], ids="ab"),
    ):
        with pytest.raises(ArgumentTypeError, match="must be a list of "):
            call()
    assert [document.id for document in store.get_by_ids(["a", "b", "ab"])] == ["a", "b", "ab"]


def test_delete(store, rag):
    assert store.delete(["a", "none"]) and ids(store.get_by_ids(["a", "b"])) == ["b"]
    both = RagKVVectorStore(rag)
    both.add_texts(TEXTS, ids=["a", "b", "c"])
    assert both.delete() and {d.source for d in rag.documents()} == set(DOCUMENTS)


def test_an_id_is_no_file_of_the_folder(rag):
    """What was added as a file is neither overwritten nor removed by an id that is called as it is."""
    name, before = next(iter(DOCUMENTS)), len(rag.documents())
    store = RagKVVectorStore(rag)
    store.add_texts(TEXTS[:1], ids=[name])
    assert len(rag.documents()) == before + 1
    store.delete([name, "clearport"])
    assert len(rag.documents()) == before and store.get_by_ids([name]) == []
    found = store.similarity_search(QUESTION, k=2)
    assert found == RagKVRetriever(rag=rag).invoke(QUESTION, k=2)


PARTS = ["Clearport lies on the river Exe.", "It sells tar by the barrel.", "She runs the harbour there."]


def parts(source="port.md", numbers=(0, 1, 2), **more):
    return [
        Document(id=f"{source} {n}", page_content=PARTS[n], metadata={"source": source, "start_index": 100 * n, **more})
        for n in numbers
    ]


def texts_of(store, source="langchain-source:port.md"):
    return store.rag.retriever.catalogue.texts(source)


def contexts(store, documents):
    """What answers with these documents takes: ids and contexts of stored chunks."""
    engine = store.rag.engine
    chunks = hand_over(engine, passages_of(documents, engine, "")).chunks
    assert not engine.documents.missing(chunks)
    return [(chunk.ids, chunk.context) for chunk in chunks]


def in_a_document(store, texts):
    return [(chunk.ids, chunk.context) for chunk in store.rag.engine.documents.cut(texts, "any")]


def test_parts_of_one_source_are_read_behind_each_other(store):
    """In the order that they say, whatever the order in which they are added, and over several calls."""
    first, second, third = given = parts(kind="port")
    assert store.add_documents([third, first]) == [third.id, first.id]
    assert contexts(store, [first, third]) == in_a_document(store, [PARTS[0], PARTS[2]])
    store.add_documents([second, *parts("other.md", [1])])
    assert contexts(store, given) == in_a_document(store, PARTS) and texts_of(store) == PARTS
    assert store.get_by_ids([third.id, "other.md 1", "a", first.id])[::3] == [third, first]
    found = store.similarity_search(PARTS[1], k=7)
    assert [d for d in given if d in found] == given and {"a", "b", "c"} <= set(ids(found))
    assert store.similarity_search(PARTS[1], k=6, filter={"start_index": 200}) == [third]
    retrieved = RagKVRetriever(rag=store.rag, k=6, where={"kind": "port"}).invoke(PARTS[1])
    assert sorted(d.metadata["start_index"] for d in retrieved) == [0, 100, 200]
    assert contexts(store, sorted(retrieved, key=lambda d: d.metadata["start_index"])) == in_a_document(store, PARTS)


@pytest.mark.parametrize(
    "metadata",
    [{"source": "news"}, {"start_index": 0}, {"source": " ", "page": 1}, {"source": "news", "page": True}],
    ids=["no place", "no source", "blank", "no number"],
)
def test_texts_that_do_not_say_where_they_stand_are_read_alone(store, metadata):
    documents = [Document(id=str(n), page_content=text, metadata=metadata) for n, text in enumerate(PARTS)]
    store.add_documents(documents)
    assert contexts(store, documents) == [in_a_document(store, [text])[0] for text in PARTS]


def test_pages_come_before_places_on_a_page(store):
    places = [(1, 0), (0, 100), (0, 0)]
    where = [{"source": "port.md", "page": page, "start_index": start} for page, start in places]
    store.add_texts(PARTS, where)
    assert texts_of(store) == [PARTS[2], PARTS[1], PARTS[0]]


def test_where_parts_are_cut_is_seen_where_together_they_say_the_same(store):
    for texts in (["One.\n\nTwo.", "Three."], ["One.", "Two.\n\nThree."]):
        store.add_texts(texts, [{"source": "port.md", "page": page} for page in (1, 2)], ids=["1", "2"])
        assert texts_of(store) == texts


def test_a_part_that_goes_leaves_nothing_behind(store):
    """What stood behind it knew its text: it is read again without."""
    first, second, third = given = parts()
    store.add_documents(given)
    before = len(store.rag.engine.store)
    assert store.delete([second.id, "none"]) and store.get_by_ids([second.id]) == []
    assert contexts(store, [first, third]) == in_a_document(store, [PARTS[0], PARTS[2]])
    assert len(store.rag.engine.store) == before - 1
    store.add_documents([Document(id=first.id, page_content="New.", metadata=first.metadata)])
    assert texts_of(store) == ["New.", PARTS[2]]
    store.delete([first.id, third.id])
    assert len(store.rag.documents()) == 3 and store.get_by_ids([third.id]) == []


def test_an_id_moves_to_where_it_says_that_it_stands(store):
    store.add_documents(parts())
    moved = Document(id="port.md 1", page_content=PARTS[1], metadata={"source": "other.md", "page": 1})
    store.add_documents([moved, Document(id="port.md 2", page_content=PARTS[2])])
    assert texts_of(store) == PARTS[:1] and texts_of(store, "langchain-source:other.md") == [PARTS[1]]
    store.add_documents(
        [*parts(numbers=[1]), Document(id="a", page_content=TEXTS[0], metadata={"source": "a", "page": 1})]
    )
    assert texts_of(store) == PARTS[:2] and {d.source for d in store.rag.documents()} == {
        *("langchain:b", "langchain:c", "langchain:port.md 2"),
        *("langchain-source:port.md", "langchain-source:a"),
    }
    assert len(store.get_by_ids(["a", "b", "c", "port.md 0", "port.md 1", "port.md 2"])) == 6
    assert store.delete() and store.rag.documents() == []


def test_another_store_sees_what_changed(store, monkeypatch):
    """Also where it is another process's, which follows nothing."""
    store.add_documents(parts())
    monkeypatch.setattr(Members, "_all", WeakKeyDictionary())
    other = RagKVVectorStore(store.rag)
    assert len(other.get_by_ids(["port.md 1", "port.md 2"])) == 2
    store.delete(["port.md 1"])
    assert ids(other.get_by_ids(["port.md 1", "port.md 2"])) == ["port.md 2"]
    other.add_documents(parts(numbers=[1]))
    assert ids(store.get_by_ids(["port.md 1", "port.md 2"])) == ["port.md 1", "port.md 2"]


def test_what_another_process_adds_meanwhile_is_seen(store, monkeypatch):
    monkeypatch.setattr(Members, "_all", WeakKeyDictionary())
    other, add = RagKVVectorStore(store.rag), store.rag.add_texts

    def late(*args, **options):
        monkeypatch.setattr(store.rag, "add_texts", add)
        other.add_documents(parts("other.md"))
        return add(*args, **options)

    monkeypatch.setattr(store.rag, "add_texts", late)
    store.add_documents(parts())
    assert ids(store.get_by_ids(["other.md 1", "port.md 1"])) == ["other.md 1", "port.md 1"]


def test_a_folder_that_nobody_has_any_more_is_forgotten(model):
    with open_rag(model=model) as rag:
        RagKVVectorStore(rag).add_documents(parts())
        gone = weakref.ref(rag.retriever.catalogue)
    del rag
    gc.collect()
    assert gone() is None


def test_nobody_waits_for_members_in_a_snapshot(store, monkeypatch):
    """That would keep a fork, and whoever closes the folder, from ever coming to an end."""
    store.add_documents(parts())
    lock, opened, snapshot = Members.of(store.rag.retriever.catalogue, "").lock, [], Catalogue.snapshot

    def seen(catalogue):
        opened.append(lock._is_owned())
        return snapshot(catalogue)

    monkeypatch.setattr(Catalogue, "snapshot", seen)
    assert len(store.get_by_ids(["a", "port.md 1"])) == 2 and opened == [True]
    assert len(references(store.rag.engine, "", ["a", "port.md 1"])) == 2 and opened == [True] * 2


def test_a_fork_beside_somebody_who_adds(store, forked_amid):
    add = partial(store.add_documents, parts())
    assert forked_amid(add, store.rag, "add_texts", add) == str([document.id for document in parts()])


def test_adding_one_by_one_looks_through_the_folder_once(store, monkeypatch):
    looked, look = [], Snapshot.documents
    monkeypatch.setattr(Snapshot, "documents", lambda *args, **more: looked.append(1) or look(*args, **more))
    for document in parts():
        store.add_documents([document])
        store.delete(["a"])
    assert len(looked) <= 1


def test_parts_that_cannot_be_added_add_nothing(store):
    store.add_documents(parts())
    before = state(store)
    for text, said in ((" ", "blank"), ("\ud800", "not valid Unicode")):
        bad = Document(id="bad", page_content=text, metadata={"source": "port.md", "page": 9})
        with pytest.raises(DocumentError, match=said):
            store.add_documents([Document(id="fine", page_content="fine"), bad])
        assert state(store) == before


def test_langchains_indexing_of_parts(store):
    documents = parts()
    manager = InMemoryRecordManager("test")
    options = {"cleanup": "incremental", "source_id_key": "source", "key_encoder": "sha256", "batch_size": 2}
    assert index(documents, manager, store, **options)["num_added"] == 3
    assert texts_of(store) == [document.page_content for document in documents]
    changed = [*documents[:-1], Document(page_content="The end.", metadata=documents[-1].metadata)]
    done = index(changed, manager, store, **options)
    assert (done["num_added"], done["num_deleted"]) == (1, 1)
    assert texts_of(store) == [document.page_content for document in changed]


BAD = {
    "blank": (["fine", " "], {}, "blank"),
    "no text": (["fine", 7], {}, "must be a list of str"),
    "surrogate": (["fine", "\ud800"], {}, "not valid Unicode"),
    "no JSON": (["fine", "too"], {"metadatas": [{}, {"at": object()}]}, "what JSON can hold"),
    "clash": (["one", "two"], {"ids": ["x", "x"]}, "two documents have the id 'x'"),
    "ids": (["one", "two"], {"ids": ["x"]}, "one each"),
    "metadatas": (["one", "two"], {"metadatas": [{}]}, "one each"),
    "id": (["one"], {"ids": [""]}, "an id must be a str"),
}


@pytest.mark.parametrize(("texts", "options", "said"), BAD.values(), ids=BAD)
def test_what_cannot_be_added_adds_nothing(store, texts, options, said):
    before = state(store)
    with pytest.raises(DocumentError, match=said):
        store.add_texts(texts, **options)
    assert state(store) == before


def test_what_is_too_long_adds_nothing(model):
    with open_rag(model=model, document_tokens=64) as rag:
        store = RagKVVectorStore(rag)
        with pytest.raises(PromptTooLongError, match="split it"):
            store.add_texts(["fine", "word " * 200])
        assert not rag.documents()


def test_the_same_document_twice_is_one(store):
    assert store.add_texts(["one", "one"], ids=["x", "x"]) == ["x", "x"]
    assert ids(store.get_by_ids(["x"])) == ["x"]


def test_no_argument_is_ignored(store):
    for call in (
        lambda: store.add_texts(["x"], nonsense=1),
        lambda: store.delete(["x"], nonsense=1),
        lambda: store.similarity_search("x", nonsense=1),
        lambda: store.similarity_search_with_score("x", nonsense=1),
        lambda: store.max_marginal_relevance_search("x", nonsense=1),
    ):
        with pytest.raises(UnknownArgumentError, match="nonsense"):
            call()


@pytest.mark.parametrize("wrong", ["x", 5, object()])
def test_what_is_no_filter_number_or_list_is_refused(store, wrong):
    store.add_texts(["Draycliff is a town."])
    for ask in (
        lambda: store.similarity_search("town", filter=wrong),
        lambda: store.max_marginal_relevance_search("town", k="x"),
        lambda: store.max_marginal_relevance_search("town", lambda_mult="x"),
        lambda: store.add_texts(["Clearport"], wrong),
        lambda: RagKVRetriever(rag=store.rag, retrieval=wrong),
    ):
        with pytest.raises(ArgumentTypeError, match="must be"):
            ask()


def test_langchains_indexing(store):
    manager = InMemoryRecordManager("test")
    documents = [Document(page_content=text, metadata={"source": "a"}) for text in TEXTS]
    options = {"cleanup": "full", "source_id_key": "source", "key_encoder": "sha256"}
    assert index(documents, manager, store, **options)["num_added"] == 3
    assert index(documents[:2], manager, store, **options) == {
        "num_added": 0,
        "num_updated": 0,
        "num_skipped": 2,
        "num_deleted": 1,
    }
    assert len(store.rag.documents()) == 5


def test_from_texts_in_a_folder(tmp_path):
    store = RagKVVectorStore.from_texts(TEXTS, RagKVEmbeddings(WordEmbedder()), ids=["a", "b", "c"], path=tmp_path)
    store.rag.close()
    with RAG.open(tmp_path, embedder=WordEmbedder()) as rag:
        again = RagKVVectorStore.from_documents([Document(id="d", page_content="More.")], None, rag=rag)
        assert ids(again.similarity_search(TEXTS[1], k=1)) == ["b"] and ids(again.get_by_ids(["a", "d"])) == ["a", "d"]
        assert again.embeddings.embed_query("mill") == WordEmbedder().encode_query("mill").tolist()
        with pytest.raises(ArgumentError, match="leave out embedding"):
            RagKVVectorStore.from_texts(TEXTS, RagKVEmbeddings(WordEmbedder("other")), rag=rag)
        with pytest.raises(ArgumentError, match="path"):
            RagKVVectorStore.from_texts(TEXTS, path=tmp_path, rag=rag)
    with pytest.raises(IncompatibleFolderError):
        RagKVVectorStore.from_texts(TEXTS, DeterministicFakeEmbedding(size=6), path=tmp_path)


async def test_the_vector_store_in_an_event_loop(store):
    assert await store.aadd_texts(["New."], ids=["d"]) == ["d"]
    assert ids(await store.asimilarity_search("Clearport", k=1, filter={"page": 2})) == ["b"]


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
