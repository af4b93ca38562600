import builtins
import os
import threading

import numpy as np
import pytest
from safetensors.numpy import load, save

from ragkv.errors import MissingPackageError, RecordError, RetrievalError
from ragkv.retrieval import FaissIndex, VectorIndex
from ragkv.retrieval.index import faiss_here

D = 6


@pytest.fixture
def vectors():
    return np.random.default_rng(0).standard_normal((20, D)).astype(np.float32)


@pytest.fixture
def index(vectors):
    index = FaissIndex(D)
    index.add(np.arange(20) * 7 + 2**40, vectors)
    return index


def oracle(query, vectors, ids, k):
    scores = vectors @ query
    order = np.argsort(-scores, kind="stable")[:k]
    return np.asarray(ids)[order], scores[order]


@pytest.mark.parametrize("k", [1, 5, 20, 1000])
def test_search_is_exact(index, vectors, k):
    query = np.random.default_rng(1).standard_normal(D).astype(np.float32)
    ids, scores = index.search(query, k)
    want_ids, want_scores = oracle(query, vectors, np.arange(20) * 7 + 2**40, k)
    np.testing.assert_array_equal(ids, want_ids)
    np.testing.assert_allclose(scores, want_scores, rtol=1e-5, atol=1e-6)
    assert ids.dtype == np.int64 and scores.dtype == np.float32 and len(ids) == min(k, 20)


def test_it_is_a_vector_index(index):
    assert isinstance(index, VectorIndex)


def test_equals_come_by_id():
    index = FaissIndex(2)
    index.add([9, 3, 5], [[1, 0]] * 3)
    assert index.search([1, 0], 3)[0].tolist() == [3, 5, 9]


def test_nothing_in_it():
    ids, scores = FaissIndex(D).search(np.ones(D), 3)
    assert ids.tolist() == [] and scores.tolist() == []


def test_removed_is_not_found(index, vectors):
    gone = np.arange(0, 20, 2) * 7 + 2**40
    assert index.remove([*gone.tolist(), 1, 2]) == 10
    assert len(index) == 10 and not set(gone) & set(index.ids())
    assert not set(index.search(vectors[0], 20)[0]) & set(gone)
    index.add(gone[:1], vectors[:1])
    assert gone[0] in index.search(vectors[0], 20)[0]
    assert index.remove([]) == 0
    index.clear()
    assert len(index) == 0 and index.search(vectors[0], 1)[0].size == 0


@pytest.mark.parametrize(
    ("ids", "rows", "message"),
    [
        ([2**40], np.ones((1, D)), "is in the index already"),
        ([1, 1], np.ones((2, D)), "given twice"),
        ([1], np.ones((1, D + 1)), r"shape \[6\]|shape \['n', 6\], got \(1, 7\)"),
        ([1], np.ones(D), "got \\(6,\\)"),
        ([1, 2], np.ones((1, D)), "got 2 ids for 1 vectors"),
        ([1], np.full((1, D), np.nan), "not finite"),
        ([-1], np.ones((1, D)), "at least 0"),
        ([2**64 - 1], np.ones((1, D)), "fit int64"),
        ([1.5], np.ones((1, D)), "whole numbers"),
        ([[1]], np.ones((1, D)), "shape"),
        ([[1], [2, 3]], np.ones((2, D)), "whole numbers"),
        ([1], [[10**400] * D], "vectors must be numbers"),
    ],
)
def test_bad_vectors_change_nothing(index, ids, rows, message):
    with pytest.raises(RetrievalError, match=message):
        index.add(ids, rows)
    assert len(index) == len(index.ids()) == 20


def test_bad_searches(index):
    with pytest.raises(RetrievalError, match="got \\(5,\\)"):
        index.search(np.ones(D - 1), 1)
    with pytest.raises(RetrievalError, match="not finite"):
        index.search(np.full(D, np.inf), 1)
    for k in (0, -1, 1.5, None, True):
        with pytest.raises(RetrievalError, match="at least 1"):
            index.search(np.ones(D), k)
    for dimension in (0, -1, 2.5):
        with pytest.raises(RetrievalError, match="positive whole number"):
            FaissIndex(dimension)


def test_saved_and_loaded(index, vectors, tmp_path):
    path = tmp_path / "index.safetensors"
    index.save(path, "state 1")
    other = FaissIndex(D)
    other.add([1], np.ones((1, D)))
    assert other.load(path) == "state 1"
    assert sorted(other.ids()) == sorted(index.ids())
    for row in vectors:
        np.testing.assert_array_equal(other.search(row, 5)[0], index.search(row, 5)[0])
    FaissIndex(D).save(path, "empty")
    assert other.load(path) == "empty" and len(other) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["index.safetensors"]


def test_damage_is_found_at_every_byte(index, tmp_path):
    path = tmp_path / "index"
    index.save(path, "state")
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    # A byte of the header may be one that nobody reads; whatever is read must be what was written.
    for at in [*range(header, len(data), 13), len(data) - 1, *range(header)]:
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        other = FaissIndex(D)
        try:
            state = other.load(path)
        except RecordError:
            assert len(other) == 0
        else:
            assert at < header and state == "state" and sorted(other.ids()) == sorted(index.ids())
    for length in (0, 7, header, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(RecordError, match="nothing can be read"):
            FaissIndex(D).load(path)


def test_what_is_no_index_is_refused(index, tmp_path):
    path = tmp_path / "index"
    with pytest.raises(RecordError, match="nothing can be read"):
        FaissIndex(D).load(path)
    path.write_bytes(save({"ids": np.zeros(1, np.int64)}))
    with pytest.raises(RecordError, match="of format None"):
        FaissIndex(D).load(path)
    index.save(path, "state")
    with pytest.raises(RecordError, match=r"expected \[n, 3\]"):
        FaissIndex(3).load(path)
    assert load(path.read_bytes())["vectors"].shape == (20, D)


def test_a_failed_save_leaves_the_old_file(index, tmp_path, monkeypatch):
    path = tmp_path / "index"
    index.save(path, "old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(RetrievalError, match="cannot be written"):
        index.save(path, "new")
    assert FaissIndex(D).load(path) == "old" and len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_process_was_writing_goes(index, tmp_path):
    path = tmp_path / "index"
    for process in (2**31 - 1, 1, os.getppid()):
        (tmp_path / f"index.{process}.tmp").write_bytes(b"part")
    index.save(path, "state")
    left = {file.name for file in tmp_path.iterdir()}
    assert left == {"index", "index.1.tmp", f"index.{os.getppid()}.tmp"}


def test_two_that_save_at_once_write_files_of_their_own(index, tmp_path, monkeypatch):
    """As two retrievers of one folder do, when both are closed."""
    path, both, sync, errors = tmp_path / "index", threading.Barrier(2), os.fsync, []

    def together(file):
        both.wait(60)  # both have written, and neither has put its file in place
        sync(file)

    def work(state):
        try:
            index.save(path, state)
        except Exception as error:
            errors.append(error)

    monkeypatch.setattr("os.fsync", together)
    threads = [threading.Thread(target=work, args=(state,)) for state in ("one", "two")]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert errors == [] and FaissIndex(D).load(path) in ("one", "two")
    assert [file.name for file in tmp_path.iterdir()] == ["index"]


def test_threads_may_share_it(vectors):
    index, errors = FaissIndex(D), []

    def work(base):
        try:
            for i in range(50):
                index.add([base + i], vectors[i % 20][None])
                ids, _ = index.search(vectors[0], 3)
                assert (ids >= 0).all()
                if i % 2:
                    index.remove([base + i])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(1000 * n,)) for n in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not errors and len(index) == 100


def test_without_faiss_the_command_is_named(monkeypatch):
    real = builtins.__import__

    def blocked(name, *args, **kwargs):
        if name == "faiss":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", blocked)
    faiss_here.cache_clear()
    with pytest.raises(MissingPackageError, match="pip install faiss-cpu"):
        FaissIndex(D)
