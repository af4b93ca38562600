"""An index in memory and files: what a model of it in memory says, through any changes; recall; damage."""

import logging
import os

import numpy as np
import pytest

from ragkv.errors import RecordError, RetrievalError
from ragkv.retrieval import FaissIndex, Retriever
from ragkv.retrieval.segments import SegmentedIndex

from .conftest import HashEmbedder

D = 16


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def vectors():
    """Clusters, as texts have: 20 of them."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((20, D))
    return unit(centres[random.integers(0, 20, 2000)] + 0.3 * random.standard_normal((2000, D))).astype(np.float32)


@pytest.fixture
def pair(tmp_path, vectors):
    """An index of three files and some in memory, and an exact one, of the same vectors."""
    index, exact = SegmentedIndex(D, tmp_path, segment=500), FaissIndex(D)
    for at in range(0, 2000, 167):
        for each in (index, exact):
            each.add(np.arange(at, min(at + 167, 2000)) * 3, vectors[at : at + 167])
    assert len(list(tmp_path.glob("segment-*"))) == 3
    return index, exact


def recall(index, exact, queries, k=10, among=None):
    got = [set(index.search(query, k, among)[0]) for query in queries]
    want = [set(exact.search(query, k, among)[0]) for query in queries]
    return np.mean([len(a & b) / max(1, len(b)) for a, b in zip(got, want, strict=True)])


def test_it_finds_nearly_what_an_exact_one_does(pair, vectors):
    index, exact = pair
    assert len(index) == 2000 and sorted(index.ids()) == sorted(exact.ids())
    assert recall(index, exact, vectors[::20]) > 0.95
    for query in vectors[::100]:
        ids, scores = index.search(query, 10)
        assert len(ids) == 10 == len(set(ids)) and list(scores) == sorted(scores, reverse=True)
        np.testing.assert_allclose(scores, vectors[ids // 3] @ query, atol=1e-5)
        assert ids[0] == exact.search(query, 1)[0][0]
    assert len(index.search(vectors[0], 5000)[0]) == 2000, "all, where all are asked for"


def test_few_that_may_be_found_are_found_wherever_they_are(pair, vectors):
    index, exact = pair
    among = np.arange(0, 2000, 97) * 3
    for query in vectors[::50]:
        np.testing.assert_array_equal(index.search(query, 5, among)[0], exact.search(query, 5, among)[0])
    far = exact.search(vectors[0], 2000)[0][-300:]  # in no cluster near the question
    assert recall(index, exact, vectors[:1], 5, far) == 1
    assert len(index.search(vectors[0], 5, [])[0]) == 0 == len(index.search(vectors[0], 5, [1, 2])[0])


def test_changes_are_those_of_an_exact_one(pair, vectors, tmp_path):
    index, exact = pair
    random = np.random.default_rng(1)
    for step in range(12):
        gone = random.choice(exact.ids(), 120, replace=False)
        assert index.remove([*gone, 1]) == exact.remove([*gone, 1]) == 120
        for each in (index, exact):
            each.add(gone[:60], vectors[gone[:60] // 3])
        assert sorted(index.ids()) == sorted(exact.ids()) and len(index) == len(exact)
        assert recall(index, exact, vectors[::200]) > 0.9, step
        if step == 6:
            index.save(tmp_path / "index", "state")
            index = SegmentedIndex(D, tmp_path, segment=500)
            assert index.load(tmp_path / "index") == "state"
    taken = next(int(each) for each in index.ids() if each not in index._tail.ids())
    with pytest.raises(RetrievalError, match=f"id {taken} is in the index already"):
        index.add([5000, taken], vectors[:2])
    for wrong in (["x", "y"], [0.5, 1.5], [[5000], [5001]], [-1, 5000]):
        with pytest.raises(RetrievalError, match="ids must be"):
            index.add(wrong, vectors[:2])
    assert len(index) == len(exact), "none was added"
    index.remove(index.ids())
    assert len(index) == 0 == len(index.search(vectors[0], 3)[0]) and index._segments == []


def test_a_small_one_is_exact_and_needs_no_file(tmp_path, vectors):
    for folder in (tmp_path, None):
        index, exact = SegmentedIndex(D, folder, segment=500 if folder else 5), FaissIndex(D)
        for each in (index, exact):
            each.add(np.arange(400), vectors[:400])
        assert recall(index, exact, vectors[:50]) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_index_of_the_former_kind_is_read(tmp_path, vectors):
    exact = FaissIndex(D)
    exact.add(np.arange(400), vectors[:400])
    exact.save(tmp_path / "index", "state")
    index = SegmentedIndex(D, tmp_path)
    assert index.load(tmp_path / "index") == "state" and recall(index, exact, vectors[:50]) == 1


def test_part_of_one_is_not_taken_for_all(pair, tmp_path):
    pair[0].save(tmp_path / "index", "state")
    with pytest.raises(RecordError, match="part of a larger index"):
        FaissIndex(D).load(tmp_path / "index")
    with pytest.raises(RecordError, match="shape"):
        SegmentedIndex(D + 1, tmp_path).load(tmp_path / "index")


def test_files_of_nobody_go_and_lost_ones_are_noticed(pair, tmp_path, caplog):
    index, _ = pair
    left, new = tmp_path / "segment-left.safetensors", tmp_path / "segment-new.safetensors"
    left.touch()
    new.touch()
    os.utime(left, (0, 0))
    index.save(tmp_path / "index", "state")
    assert not left.exists() and new.exists() and len(list(tmp_path.glob("segment-*"))) == 4
    index._segments[0].path.unlink()
    with caplog.at_level(logging.WARNING, "ragkv.retrieval"):
        index.save(tmp_path / "index", "another")
    assert "is not written" in caplog.text
    with pytest.raises(RecordError, match="nothing can be read"):
        SegmentedIndex(D, tmp_path).load(tmp_path / "index")


def test_files_that_another_process_deletes_meanwhile(pair, tmp_path, monkeypatch):
    """What a listing still named when an index was saved, as the unfinished file of another one."""
    index, _ = pair
    glob = type(tmp_path).glob
    monkeypatch.setattr(type(tmp_path), "glob", lambda self, what: [*glob(self, what), self / "segment-1.tmp"])
    index.save(tmp_path / "index", "state")
    assert index.load(tmp_path / "index") == "state"


@pytest.mark.parametrize("share", np.linspace(0, 0.999, 40).tolist())
def test_damage_is_found_when_it_is_read(pair, tmp_path, vectors, share):
    index, _ = pair
    index.save(tmp_path / "index", "state")
    path = index._segments[1].path
    data = bytearray(path.read_bytes())
    data[int(share * len(data))] ^= 4
    path.write_bytes(data)
    other = SegmentedIndex(D, tmp_path)
    with pytest.raises(RecordError, match=path.name):
        other.load(tmp_path / "index")
        for query in vectors[::4]:
            other.search(query, 2000)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr("ragkv.retrieval.segments.SegmentedIndex.__init__.__defaults__", (None, 50))


@pytest.mark.parametrize("harm", ["none", "gone", "zeros", "index"])
def test_a_folder_with_files_opens_whatever_happened_to_them(small, tmp_path, harm, caplog):
    texts = [f"number {number} is a word w{number}" for number in range(200)]
    with Retriever.open(tmp_path, HashEmbedder()) as retriever:
        retriever.add_many([(text, [text], {"n": number}) for number, text in enumerate(texts)])
        want = {hit.text: hit.score for hit in retriever.search("w77", 200)}  # all: a few depend on the clusters
        assert len(retriever.index._segments) == 3
    parts = sorted(tmp_path.glob("segment-*"))
    if harm == "gone":
        parts[0].unlink()
    elif harm == "zeros":
        data = parts[0].read_bytes()
        parts[0].write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    elif harm == "index":
        (tmp_path / "index.safetensors").write_bytes(b"x" * 100)
    embedder = HashEmbedder()
    with Retriever.open(tmp_path, embedder) as retriever, caplog.at_level(logging.WARNING, "ragkv.retrieval"):
        assert {hit.text: hit.score for hit in retriever.search("w77", 200)} == pytest.approx(want, abs=1e-5)
        assert embedder.embedded == []
        assert ("filled again" in caplog.text) is (harm != "none")
        retriever.remove(texts[3])
        assert texts[3] not in {hit.text for hit in retriever.search("w3", 200)}
        assert [hit.metadata["n"] for hit in retriever.search("w77", 9, where={"n": [5, 150]}, hybrid=True)].count(
            5
        ) == 1
