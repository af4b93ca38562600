"""A catalogue's folder: restarts, what it was made with, what is full, foreign or damaged."""

import gc
import json

import lmdb
import numpy as np
import pytest

from ragkv.errors import IncompatibleFolderError, RecordError, RetrievalError, StoreError, StoreFullError
from ragkv.retrieval import Catalogue, Reading, Retriever
from ragkv.retrieval.records import reading_key, source_key
from ragkv.store import TieredStore

from .conftest import HashEmbedder, damaged, emptied, put


def test_it_is_there_after_a_restart(tmp_path):
    with Catalogue(tmp_path / "deep" / "folder") as catalogue:
        document = put(catalogue, "a", ["one", "two"], {"x": 1}).document
        state = catalogue.state
    with Catalogue(tmp_path / "deep" / "folder") as catalogue:
        assert catalogue.get("a") == document and catalogue.state == state and catalogue.texts("a") == ["one", "two"]
        assert put(catalogue, "b", ["three"]).new[0] not in document.passage_ids
    catalogue.close()
    with pytest.raises(RetrievalError, match="is closed"):
        catalogue.get("a")


def test_what_was_changed_survives_a_power_cut(tmp_path, monkeypatch):
    seen, real = [], lmdb.open
    monkeypatch.setattr(lmdb, "open", lambda *args, **flags: (seen.append(flags), real(*args, **flags))[1])
    for path in (tmp_path / "folder", None):
        with Catalogue(path) as catalogue:
            put(catalogue, "a", ["one"])
    assert [(flags["sync"], flags["metasync"]) for flags in seen] == [(True, True), (False, False)], (
        "None: it is dropped"
    )


def test_a_child_does_not_delete_its_parents_temporary_one(forked):
    def child():
        catalogue.close()
        return "ok"

    with Catalogue() as catalogue:
        assert forked(child) == "ok"
        assert catalogue.path.exists() and put(catalogue, "a", ["one"]).new


def test_a_temporary_one_leaves_nothing():
    catalogue = Catalogue()
    path = catalogue.path
    put(catalogue, "a", ["one"])
    assert path.exists()
    catalogue.close()
    assert not path.exists()
    forgotten = Catalogue()
    path = forgotten.path
    del forgotten
    gc.collect()
    assert not path.exists()


def test_a_folder_belongs_to_what_it_was_made_with(tmp_path):
    with Catalogue(tmp_path) as catalogue:
        catalogue.require("embedder", "123", "first")
        catalogue.require("embedder", "456", "second")  # no documents yet: nothing is lost
        put(catalogue, "a", ["one"])
    with Catalogue(tmp_path) as catalogue:
        catalogue.require("embedder", "456", "second under another name")
        with pytest.raises(IncompatibleFolderError) as caught:
            catalogue.require("embedder", "123", "first")
        for part in (str(tmp_path), "embedder second", "(456)", "first (123)", "another folder"):
            assert part in str(caught.value)


def test_a_full_map_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("ragkv.folder.environment.MIN_MAP_BYTES", 1 << 20)
    with Catalogue(tmp_path) as catalogue:
        put(catalogue, "a", ["one"])
        with pytest.raises(StoreFullError, match="full"):
            put(catalogue, "b", ["x" * 1000 + str(i) for i in range(2000)])
        assert catalogue.check() == [] and [document.source for document in catalogue] == ["a"]
        put(catalogue, "b", ["two"])


def test_foreign_folders_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="cannot be made"):
        Catalogue(tmp_path / "file")
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "data.mdb").write_bytes(b"junk" * 5000)
    with pytest.raises(RecordError, match="is damaged"):
        Catalogue(tmp_path / "junk")
    with Catalogue(tmp_path / "new") as catalogue, catalogue._environment.transaction(write=True) as txn:
        txn.put("meta", b"format", b"ragkv.catalogue/99")
    with pytest.raises(RecordError, match="catalogue/99, this version reads ragkv"):
        Catalogue(tmp_path / "new")


@pytest.fixture
def folder(tmp_path):
    with Catalogue(tmp_path) as catalogue:
        put(catalogue, "a", ["one", "two"])
        put(catalogue, "b", ["two", "three"])
    return tmp_path


def test_a_damaged_text_is_never_served(folder, embedder):
    damaged(folder, "passages", (0).to_bytes(8, "big"))
    with Catalogue(folder) as catalogue:
        with pytest.raises(RecordError, match=r"passage 0 is damaged: Catalogue.repair\(\)"):
            catalogue.texts("a")
        assert "a: the catalogue's record of passage 0" in catalogue.check()[0]
        assert catalogue.repair(embedder.encode_documents) == ["a: damaged and deleted, add it again"]
        assert catalogue.check() == [] and catalogue.texts("b") == ["two", "three"] and "a" not in catalogue
        assert embedder.embedded == []
        put(catalogue, "a", ["one", "two"])
        assert catalogue.check() == []


def test_a_damaged_vector_is_computed_again(folder, embedder):
    damaged(folder, "vectors", (1).to_bytes(8, "big"))
    with Catalogue(folder) as catalogue:
        with catalogue.snapshot() as view, pytest.raises(RecordError, match="vector of passage 1"):
            view.vector(1)
        assert len(catalogue.check()) == 1
        assert catalogue.repair(embedder.encode_documents) == ["passage 1: its vector was computed again"]
        with catalogue.snapshot() as view:
            np.testing.assert_array_equal(view.vector(1), embedder.encode_query("two"))
        assert catalogue.check() == [] and embedder.embedded == ["two"]


@pytest.mark.parametrize("harm", [damaged, emptied])
def test_a_damaged_document_is_deleted(folder, embedder, harm):
    harm(folder, "documents", source_key("a"))
    with Catalogue(folder) as catalogue:
        with pytest.raises(RecordError, match="a document is damaged"):
            catalogue.get("a")
        assert catalogue.repair(embedder.encode_documents) == [
            "a document whose name is lost: damaged and deleted, add it again"
        ]
        assert [document.source for document in catalogue] == ["b"] and catalogue.check() == []


def test_check_finds_what_does_not_belong(catalogue, embedder):
    put(catalogue, "a", ["one"], embedder=embedder)
    with catalogue._environment.transaction(write=True) as txn:
        txn.put("uses", b"x" * 32, (7).to_bytes(8, "big"))
    assert catalogue.check() == ["2 records in uses, its documents have 1"]
    assert catalogue.repair(embedder.encode_documents) == [] and catalogue.check() == []


@pytest.mark.parametrize("harm", [damaged, emptied])
def test_a_damaged_reading_is_none_and_is_mended(folder, embedder, harm):
    reading = Reading("ab" * 32, [bytes([number]) * 32 for number in range(2)], b"what a model read")
    with Catalogue(folder) as catalogue:
        passages = catalogue.texts("a")
        put(catalogue, "a", passages, reading=reading)
    key = reading_key(source_key("a"), reading.setting)
    harm(folder, "readings", key)
    with Catalogue(folder) as catalogue:
        with catalogue.snapshot() as view:
            assert view.reading(key) is None
        assert catalogue.check() == ["a: how a model reads it is damaged"]
        assert catalogue.repair(embedder.encode_documents) == [] and catalogue.check() == []
        with catalogue.snapshot() as view:
            assert not view.names(reading.keys[0])


def test_a_folder_of_the_former_format_is_migrated(folder, embedder):
    """It listed passages behind those before them too, and belonged to one model. Texts, vectors and ids stay."""
    with Catalogue(folder) as catalogue:
        before = [(document, catalogue.texts(document.source)) for document in catalogue]
        with catalogue._environment.transaction(write=True) as txn:
            txn.put("meta", b"format", b"ragkv.catalogue/1")
            txn.put("uses", b"lineage key of 32 bytes, as it was", (1).to_bytes(8, "big"))
            model = {"fingerprint": "123", "name": "a model"}
            txn.put("meta", b"settings", json.dumps({**catalogue.settings, "model": model}).encode())
    with Catalogue(folder) as catalogue:
        assert [(document, catalogue.texts(document.source)) for document in catalogue] == before
        assert catalogue.check() == [] and "model" not in catalogue.settings
        put(catalogue, "c", ["one"], embedder=embedder)
        assert embedder.embedded == [], "its text has a vector"


def test_a_folder_stays_where_it_is_wherever_the_process_goes(tmp_path, monkeypatch):
    """A service that goes to another working folder once it has begun writes to the one that it opened."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with TieredStore("kv") as store, Retriever.open("documents", HashEmbedder()) as retriever:
        monkeypatch.chdir("elsewhere")
        store.put_many([], facts={"name": b"fact"})
        retriever.add("a", ["one"])
        assert [hit.source for hit in retriever.search("one", hybrid=True)] == ["a"]
    assert {file.name for file in (tmp_path / "documents").iterdir()} >= {"index.safetensors", "words.sqlite"}
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_path_from_a_working_folder_that_is_deleted(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for opened in (Catalogue, TieredStore):
        with pytest.raises(StoreError, match="working folder, which is deleted"):
            opened("kv")
    Catalogue(tmp_path / "there").close()
