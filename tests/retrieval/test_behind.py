"""Readings that hold passages of other documents: kept as long as these are there, and not a moment longer."""

from ragkv.chunk import digest
from ragkv.retrieval import Catalogue, Reading
from ragkv.retrieval.records import behind_key, passage_key, reading_key, source_key

from .conftest import damaged, lost, put

MODEL = digest("model").hex()


def reading(texts, *behind):
    return Reading(MODEL, [digest("kv", *map(str, behind), text) for text in texts], b"record", behind)


def found(catalogue, source):
    with catalogue.snapshot() as view:
        return view.reading(reading_key(source_key(source), MODEL))


def two(catalogue, embedder=None):
    """Document b is read behind the passages of a."""
    ids = put(catalogue, "a", ["one", "two"], embedder=embedder).document.passage_ids
    put(catalogue, "b", ["three"], embedder=embedder, reading=reading(["three"], *ids))
    return ids


def test_it_goes_with_the_first_passage_that_goes(catalogue):
    ids = two(catalogue)
    assert found(catalogue, "b") == reading(["three"], *ids) and catalogue.check() == []
    put(catalogue, "a", ["one", "two", "more"])
    assert found(catalogue, "b") == reading(["three"], *ids)
    change = put(catalogue, "a", ["one", "more"])
    assert change.unused == tuple(reading(["three"], *ids).keys) and found(catalogue, "b") is None
    with catalogue.snapshot() as view:
        assert not any(view.names(behind_key(passage_id)) for passage_id in ids)
        assert view.get("b") is not None
    assert catalogue.check() == []


def test_one_behind_what_is_gone_is_not_kept(catalogue):
    """Somebody removed it while it was read."""
    ids = two(catalogue)
    listed, known = catalogue.get("b"), reading(["three"], *ids)
    catalogue.remove("a")
    catalogue.keep([(listed, known)])
    assert found(catalogue, "b") is None and catalogue.check() == []
    put(catalogue, "b", ["three"], reading=known)
    assert found(catalogue, "b") is None and catalogue.check() == []


def test_a_moved_neighbour_is_the_same(catalogue):
    ids = two(catalogue)
    catalogue.rename("a", "c", lambda known: known)
    catalogue.rename("b", "d", lambda known: known)
    assert found(catalogue, "d") == reading(["three"], *ids) and catalogue.check() == []
    assert catalogue.remove("c").unused == tuple(reading(["three"], *ids).keys) and found(catalogue, "d") is None


def test_a_neighbour_that_is_damaged_takes_it_along(tmp_path, embedder):
    with Catalogue(tmp_path) as catalogue:
        ids = two(catalogue, embedder)
    damaged(tmp_path, "passages", passage_key(ids[0]))
    with Catalogue(tmp_path) as catalogue:
        assert catalogue.repair(embedder.encode_documents) == ["a: damaged and deleted, add it again"]
        assert found(catalogue, "b") is None and catalogue.get("b") is not None and catalogue.check() == []


def test_a_check_sees_what_is_wrong_with_it(tmp_path):
    with Catalogue(tmp_path) as catalogue:
        ids = two(catalogue)
    lost(tmp_path, "kv", behind_key(ids[0]))
    with Catalogue(tmp_path) as catalogue:
        assert "b: the KV of a passage are not listed" in catalogue.check()
    lost(tmp_path, "passages", passage_key(ids[0]))
    with Catalogue(tmp_path) as catalogue:
        assert "b: it is read behind a passage that is gone" in catalogue.check()
