import gc
import logging
import threading
import warnings

import numpy as np
import pytest
import torch

from ragkv.errors import DocumentError, IncompatibleFolderError, RecordError, RetrievalError
from ragkv.retrieval import Catalogue, FaissIndex, Retriever

from .conftest import HashEmbedder, damaged

TEXTS = {
    "cats.md": ["a cat sat on the mat", "the kitten drank milk"],
    "boats.md": ["the harbour sold rope", "a boat came in the night", "tar is black"],
}


@pytest.fixture
def retriever(embedder):
    with Retriever.open(None, embedder) as retriever:
        for source, passages in TEXTS.items():
            retriever.add(source, passages, {"title": source.split(".")[0]})
        yield retriever


def sources(hits):
    return [(hit.source, hit.position) for hit in hits]


def test_hits_say_where_they_are_from(retriever):
    hit = retriever.search("a boat came in the night", 1)[0]
    assert (hit.text, hit.source, hit.position) == ("a boat came in the night", "boats.md", 1)
    assert hit.metadata == {"title": "boats"} and hit.score == pytest.approx(1, abs=1e-5)
    document = retriever.catalogue.get("boats.md")
    assert hit.document_id == document.id and hit.passage_id == document.passage_ids[1]
    assert retriever.catalogue.texts(hit.source)[hit.position] == hit.text


def test_order_is_that_of_the_scores(retriever, embedder):
    hits = retriever.search("the kitten and the rope", 99)
    assert len(hits) == 5 and [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    query = embedder.encode_query("the kitten and the rope")
    for hit in hits:
        assert hit.score == pytest.approx(float(query @ embedder.encode_query(hit.text)), abs=1e-5)


def test_adding_again_embeds_nothing(retriever, embedder):
    embedder.embedded.clear()
    retriever.add("cats.md", TEXTS["cats.md"], {"title": "cats"})
    retriever.add("copy.md", TEXTS["cats.md"])
    assert embedder.embedded == []
    retriever.add("cats.md", ["a cat sat on the mat", "the dog barked"])
    assert embedder.embedded == ["the dog barked"]
    assert sources(retriever.search("the kitten drank milk", 1)) == [("copy.md", 1)]


def test_removed_is_not_found(retriever):
    retriever.remove("boats.md")
    assert {hit.source for hit in retriever.search("a boat came in the night", 9)} == {"cats.md"}
    with pytest.raises(DocumentError, match=r"no document 'boats.md'"):
        retriever.remove("boats.md")


def test_many_at_once_are_embedded_together(embedder):
    with Retriever.open(None, embedder) as retriever:
        retriever.add("a", ["one"])
        calls, encode = [], embedder.encode_documents
        embedder.encode_documents = lambda texts: calls.append(list(texts)) or encode(texts)
        changes = retriever.add_many(
            [("a", ["one", "two"], None), ("b", ["two", "three"], {"x": 1}), ("c", ["one"], None)]
        )
        assert calls == [["two", "three"]]
        assert [change.document.source for change in changes] == ["a", "b", "c"]
        assert sources(retriever.search("three", 1)) == [("b", 1)]
        with pytest.raises(DocumentError, match="e: passage 0 is blank"):
            retriever.add_many([("d", ["fine"], None), ("e", [" "], None)])
        assert "d" not in retriever.catalogue
        assert retriever.add_many([]) == []


def test_it_is_there_after_a_restart(tmp_path, embedder):
    with Retriever.open(tmp_path, embedder) as retriever:
        retriever.add("a", ["one two", "three four"])
        before = retriever.search("three", 2)
    embedder.embedded.clear()
    with Retriever.open(tmp_path, embedder) as retriever:
        assert retriever.search("three", 2) == before
    assert embedder.embedded == [] and (tmp_path / "index.safetensors").exists()


@pytest.mark.parametrize("harm", ["gone", "damaged", "stale", "of another dimension"])
def test_an_index_that_does_not_fit_is_filled_again(tmp_path, embedder, harm, caplog):
    with Retriever.open(tmp_path, embedder) as retriever:
        retriever.add("a", ["one two", "three four"])
        before = retriever.search("three", 2)
    path = tmp_path / "index.safetensors"
    data = path.read_bytes()
    if harm == "gone":
        path.unlink()
    elif harm == "damaged":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif harm == "stale":
        with Retriever.open(tmp_path, embedder) as retriever:
            retriever.add("b", ["five"])
            retriever.remove("a")
            retriever.add("a", ["one two", "three four"])
            retriever.remove("b")
            before = retriever.search("three", 2)
        path.write_bytes(data)
    else:
        FaissIndex(3).save(path, "state")
    embedder.embedded.clear()
    with caplog.at_level(logging.WARNING, "ragkv.retrieval"), Retriever.open(tmp_path, embedder) as retriever:
        assert retriever.search("three", 2) == before
    assert bool(caplog.records) == (harm in ("damaged", "of another dimension"))
    assert embedder.embedded == []
    with Retriever.open(tmp_path, embedder) as retriever:
        assert FaissIndex(64).load(path) == retriever.catalogue.state


def test_no_file_is_left_open(tmp_path, embedder):
    """Whoever takes warnings for errors, as many tests do, would be told of one."""
    with Retriever.open(tmp_path, embedder) as retriever:
        retriever.add("a", ["one"])
    gc.collect()  # what others left is not ours
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        Retriever.open(tmp_path, embedder).close()
        gc.collect()
    assert not said


def test_another_embedder_is_refused(tmp_path, embedder):
    with Retriever.open(tmp_path, embedder) as retriever:
        retriever.add("a", ["one"])
    with pytest.raises(
        IncompatibleFolderError, match=r"made with the embedder hash \(hash/64\), got other \(other/64\)"
    ):
        Retriever.open(tmp_path, HashEmbedder(name="other"))
    Retriever.open(tmp_path, embedder).close()


def test_a_damaged_vector_is_named_and_mended(tmp_path, embedder):
    with Retriever.open(tmp_path, embedder) as retriever:
        retriever.add("a", ["one", "two"])
    (tmp_path / "index.safetensors").unlink()
    damaged(tmp_path, "vectors", (1).to_bytes(8, "big"))
    with pytest.raises(RecordError, match=r"Catalogue.repair\(\)"):
        Retriever.open(tmp_path, embedder)
    with Catalogue(tmp_path) as catalogue:
        catalogue.repair(embedder.encode_documents)
    with Retriever.open(tmp_path, embedder) as retriever:
        assert sources(retriever.search("two", 1)) == [("a", 1)]


def test_threads_may_share_it(retriever):
    errors = []

    def work(name):
        try:
            for i in range(10):
                retriever.add(name, [f"{name} text {i}", "the harbour sold rope"])
                hits = retriever.search(f"{name} text {i}", 3)
                assert len(hits) == 3 and hits[0].text
            retriever.remove(name)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(f"thread{n}",)) for n in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not errors
    assert len(retriever.search("rope", 99)) == 5 and retriever.catalogue.check() == []


def test_a_change_is_in_the_index_at_once(retriever):
    retriever.search("rope")
    change = retriever.add("cats.md", ["a cat sat on the mat", "the dog barked"])
    assert set(change.new) <= set(retriever.index.ids()) and not set(change.removed) & set(retriever.index.ids())
    retriever.remove("boats.md")
    assert len(retriever.index) == 2
    retriever.catalogue.remove("cats.md")  # behind its back
    assert len(retriever.index) == 2 and retriever.search("rope") == [] and len(retriever.index) == 0


def test_closing_without_room_for_the_index(tmp_path, embedder, caplog):
    with Retriever.open(tmp_path / "documents", embedder) as retriever:
        retriever.add("a", ["Tar is sold by the barrel."])
        (tmp_path / "documents" / "index.safetensors").mkdir()
        with pytest.raises(RetrievalError, match="cannot be written"):
            retriever.save()
    assert "the next start fills it again" in caplog.text
    (tmp_path / "documents" / "index.safetensors").rmdir()
    with Retriever.open(tmp_path / "documents", embedder) as retriever:
        assert [hit.source for hit in retriever.search("tar", 1)] == ["a"]


def test_closing_twice_is_no_error(tmp_path, embedder):
    retriever = Retriever.open(tmp_path, embedder)
    retriever.close()
    retriever.close()
    with pytest.raises(RetrievalError, match="is closed"):
        retriever.search("a question")


def test_nothing_to_find(embedder):
    with Retriever.open(None, embedder) as retriever:
        assert retriever.search("anything") == []


@pytest.mark.parametrize("query", ["", " \n", None, 3, b"x"])
def test_bad_questions(retriever, query):
    with pytest.raises(RetrievalError, match="question must be a str that is not blank"):
        retriever.search(query)


@pytest.mark.parametrize("top_k", [0, -1, 1.5, "5"])
def test_bad_numbers(retriever, top_k):
    with pytest.raises(RetrievalError, match="at least 1"):
        retriever.search("a question", top_k)


def test_bad_embedders(embedder):
    with Catalogue() as catalogue:
        with pytest.raises(RetrievalError, match="index has dimension 3, the embedder 'hash' 64"):
            Retriever(embedder, FaissIndex(3), catalogue)
        retriever = Retriever(embedder, FaissIndex(64), catalogue)
        embedder.encode_documents = lambda texts: np.zeros((len(texts), 3))
        with pytest.raises(RetrievalError, match=r"must give vectors of shape \[1, 64\], got \(1, 3\)"):
            retriever.add("a", ["one"])
        for wrong in ("text", None, [[1.0], [1.0, 2.0]], torch.ones(1, 64, requires_grad=True)):
            embedder.encode_documents = lambda texts, wrong=wrong: wrong
            with pytest.raises(RetrievalError, match=r"the embedder (must give|gives)"):
                retriever.add("a", ["one"])
        embedder.encode_query = lambda text: np.zeros(3)
        with pytest.raises(RetrievalError, match=r"got \(3,\)"):
            retriever.search("a question")
        assert len(catalogue) == 0


def test_the_real_embedder_finds_by_meaning(minilm):
    with Retriever.open(None, minilm) as retriever:
        retriever.add("animals", ["A kitten drank milk in the kitchen.", "The dog slept all day."])
        retriever.add("money", ["The bank raised its interest rates.", "Shares fell sharply in New York."])
        assert sources(retriever.search("What did the little cat drink?", 1)) == [("animals", 0)]
        assert sources(retriever.search("What happened on the stock market?", 1)) == [("money", 1)]


def test_index_of_another_history_is_not_used(embedder, tmp_path):
    """As after a backup of the catalogue was put back, whose next ids went to other texts."""
    with Retriever.open(tmp_path, embedder) as retriever:
        retriever.add("cats.md", TEXTS["cats.md"])
    backup = (tmp_path / "data.mdb").read_bytes()
    with Retriever.open(tmp_path, embedder) as retriever:
        retriever.add("boats.md", TEXTS["boats.md"])
    (tmp_path / "data.mdb").write_bytes(backup)
    with Catalogue(tmp_path) as catalogue:  # a process that was killed before it saved its index
        catalogue.put("dogs.md", ["the dog barked", "a bone lay there", "it ran off"], embedder.encode_documents)
    with Retriever.open(tmp_path, embedder) as retriever:
        hits = retriever.search("the dog barked", 1)
        assert sources(hits) == [("dogs.md", 0)] and hits[0].score == pytest.approx(1, abs=1e-5)
        assert {hit.source for hit in retriever.search(TEXTS["boats.md"][0], 9)} == {"cats.md", "dogs.md"}
