"""The vector store: what LangChain's own tests do not ask."""

import math

import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding

from ragkv import (
    RAG,
    ArgumentError,
    ArgumentTypeError,
    DocumentError,
    IncompatibleFolderError,
    PromptTooLongError,
    UnknownArgumentError,
)
from ragkv.adapters.langchain import LangChainEmbedder, RagKVEmbeddings, RagKVRetriever, RagKVVectorStore
from ragkv.adapters.langchain.documents import passages_of
from tests.rag.rags import DOCUMENTS, QUESTION, WordEmbedder, open_rag

from .stored import PARTS, TEXTS, WHERE, contexts, ids, parts


def state(store):
    rag = store.rag
    return sorted((d.source, d.content_hash, str(d.metadata)) for d in rag.retriever.catalogue.documents())


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


def test_a_document_that_lost_its_id_is_known_by_its_text(store):
    """LangChain's compressors make other documents of those that they are given."""
    store.add_documents(parts())
    found = store.similarity_search(PARTS[2], k=2)
    lost = [Document(page_content=document.page_content, metadata=document.metadata) for document in found]
    assert PARTS[2] in [document.page_content for document in lost] and contexts(store, lost) == contexts(store, found)
    other = [Document(page_content=PARTS[2], id="of another store"), Document(page_content="Found by others.")]
    assert [passage.reference for passage in passages_of(other, store.rag.engine, "")] == [None, None]


def test_filters(store):
    def found(wanted, k=3):
        return ids(store.similarity_search("Clearport mill", k=k, filter=wanted))

    assert set(found({"kind": "mill"})) == {"b", "c"}
    assert found({"kind": "mill", "page": 2}) == ["b"]
    assert found({"tags": ["old"]}) == ["c"]
    assert found({"nothing": None}) == []
    for other in ({"page": {"$gt": 1}}, {"$and": [{"page": 1}]}):  # as other stores write it
        with pytest.raises(ArgumentError, match=r"filter takes values that are equal, or a function, and no \$"):
            found(other)
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
    for wrong in (-0.1, 7, math.nan):
        with pytest.raises(ArgumentError, match="lambda_mult must be a number, 0 to 1, got"):
            store.max_marginal_relevance_search("x", lambda_mult=wrong)


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
