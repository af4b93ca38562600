"""LangChain's documents that say their source and their place in it are passages of one document of the folder."""

import gc
import weakref
from functools import partial
from weakref import WeakKeyDictionary

import pytest
from langchain_core.documents import Document
from langchain_core.indexing import InMemoryRecordManager, index

from ragkv.adapters.langchain import RagKVRetriever, RagKVVectorStore
from ragkv.adapters.langchain.members import Members, references
from ragkv.adapters.parts import changing
from ragkv.retrieval import Catalogue, Snapshot
from tests.rag.rags import open_rag

from .stored import PARTS, TEXTS, contexts, ids, parts


def texts_of(store, source="langchain-source:port.md"):
    return store.rag.retriever.catalogue.texts(source)


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


def test_places_that_are_counted_from_a_section_order_nothing(store):
    """A splitter behind one of headings begins at 0 in each section: they stay as they were added, pages in their order."""
    texts, starts = [*PARTS, "It is old."], (0, 40, 0, 40)
    for pages, want in (({}, {}, {}, {}), texts), (({"page": 2},) * 2 + ({"page": 1},) * 2, texts[2:] + texts[:2]):
        where = [{"source": "port.md", "start_index": start, **page} for start, page in zip(starts, pages, strict=True)]
        store.delete()
        store.add_texts(texts[:3], where[:3], ids=["0", "1", "2"])
        store.add_texts(texts[3:], where[3:], ids=["3"])
        assert texts_of(store) == want
        store.add_texts(texts[1:2], where[1:2], ids=["1"])
        assert texts_of(store) == want


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
    lock, opened, snapshot = changing(store.rag.retriever.catalogue), [], Catalogue.snapshot

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
    done = index(changed[1:], manager, store, **options | {"cleanup": "full"})
    assert (done["num_skipped"], done["num_deleted"], len(store.rag.documents())) == (2, 1, 4)
