"""Several users in one folder: each finds, replaces and removes what is theirs."""

import json

import numpy as np
import pytest

from ragkv.errors import ArgumentError, ArgumentTypeError, DocumentError, IncompatibleFolderError
from ragkv.retrieval import Catalogue, Reading, Retriever
from ragkv.retrieval.exchange import packed, unpacked
from ragkv.retrieval.rescue import rescue

from .conftest import HashEmbedder, damaged, put

SAME = ["a boat in the harbour", "the kitten drank milk"]


@pytest.fixture
def shared(tmp_path, embedder):
    with Retriever.open(tmp_path, embedder) as retriever:
        retriever.add("notes", [*SAME, "nobody's own"])
        retriever.add("notes", [*SAME, "of Ada"], namespace="ada")
        retriever.add("notes", [*SAME, "of Bob"], {"kind": "x"}, namespace="bob")
        retriever.add("more", ["a boat of Bob"], namespace="bob")
        yield retriever


def found(retriever, query="a boat in the harbour", top_k=50, **options):
    return sorted(hit.text for hit in retriever.search(query, top_k, **options))


WAYS = {
    "plain": {},
    "hybrid": {"hybrid": True},
    "hops": {"hybrid": True, "hops": 2, "neighbours": 3},
    "reranked": {"rerank": lambda question, texts: [float(len(text)) for text in texts]},
}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_each_finds_their_own(shared, options):
    assert found(shared, **options) == sorted([*SAME, "nobody's own"])
    assert found(shared, namespace="ada", **options) == sorted([*SAME, "of Ada"])
    assert found(shared, namespace="bob", **options) == sorted([*SAME, "of Bob", "a boat of Bob"])
    assert found(shared, namespace="bob", where={"kind": "x"}, **options) == sorted([*SAME, "of Bob"])
    assert found(shared, namespace="bobby", **options) == []


def test_the_nearest_of_theirs_however_many_are_nearer(shared):
    shared.add_many([(f"{number}", [f"a boat in the harbour {number}"], None) for number in range(99)])
    assert found(shared, top_k=1, namespace="ada") == [SAME[0]]
    shared.add_many([("new", ["a boat in the harbour it is"], None)], namespace="ada")
    assert shared.catalogue.get("new", "ada").namespace == "ada" and shared.catalogue.get("new") is None


def test_a_name_is_one_document_in_each(shared, embedder):
    catalogue = shared.catalogue
    ids = {catalogue.get("notes", whose).id for whose in ("", "ada", "bob")}
    assert len(ids) == 3 and all(len(each) == 64 for each in ids)
    shared.add("notes", ["changed"], namespace="ada")
    assert found(shared, namespace="ada") == ["changed"]
    shared.remove("notes", "bob")
    assert found(shared, namespace="bob") == ["a boat of Bob"] and len(found(shared)) == 3
    with pytest.raises(DocumentError, match="no document 'more'"):
        shared.remove("more")
    assert catalogue.rename("more", "less", lambda reading: reading, "bob").namespace == "bob"
    assert catalogue.rename("less", "x", lambda reading: reading, "ada") is None
    assert [document.source for document in catalogue.documents("bob")] == ["less"]
    assert [(each.source, each.namespace) for each in catalogue] == [("less", "bob"), ("notes", ""), ("notes", "ada")]
    assert catalogue.check() == []


def test_nobody_can_tell_what_others_have(shared, embedder):
    """An equal text of another namespace is embedded again."""
    embedder.embedded.clear()
    change = shared.add("copy", SAME, namespace="eve")
    assert change.embedded == 2 and embedder.embedded == SAME
    assert shared.add("copy of it", SAME, namespace="eve").embedded == 0


def test_it_survives_a_restart_and_needs_no_index(shared, tmp_path):
    want = found(shared, namespace="bob", hybrid=True)
    shared.close()
    (tmp_path / "index.safetensors").unlink()
    (tmp_path / "words.sqlite").unlink()
    with Retriever.open(tmp_path, HashEmbedder()) as retriever:
        assert found(retriever, namespace="bob", hybrid=True) == want and retriever.catalogue.check() == []


def test_a_repaired_folder_keeps_them_apart(shared, tmp_path, embedder):
    key = shared.catalogue.get("notes", "ada").key
    shared.close()
    damaged(tmp_path, "documents", key)
    with Catalogue(tmp_path) as catalogue:
        assert len(catalogue.repair(embedder.encode_documents)) == 1 and catalogue.check() == []
    rescue(tmp_path)
    with Retriever.open(tmp_path, HashEmbedder()) as retriever:
        assert found(retriever, namespace="ada") == []
        assert len(found(retriever, namespace="bob")) == 4 and len(found(retriever)) == 3


@pytest.mark.parametrize("mark", [None, b"1"])
def test_a_wrong_or_lost_mark_is_found_and_mended(shared, embedder, mark):
    """Without namespaces nothing is looked at for each document: a note in the catalogue says so."""
    with shared.catalogue._environment.transaction(write=True) as txn:
        if mark:
            txn.put("meta", b"undivided", mark)
    assert bool(shared.catalogue.check()) == (mark is not None)
    shared.catalogue.repair(embedder.encode_documents)
    assert shared.catalogue.check() == [] and len(found(shared)) == 3


def test_an_archive_carries_them(shared):
    with Catalogue() as other:
        with shared.catalogue.snapshot() as view:
            members = [packed(view, document) for document in view.documents()]
        for member in members:
            assert not other.merge(unpacked(member)).kept
        assert [(each.source, each.namespace) for each in other] == [
            (each.source, each.namespace) for each in shared.catalogue
        ]
        assert other.texts("notes", "ada") == [*SAME, "of Ada"] and other.check() == []
        with other.snapshot() as view:
            assert not view.all_within("") and not view.all_within("ada")


@pytest.mark.parametrize("namespace", ["", "ada"])
def test_a_former_folder_is_of_the_namespace_it_was_opened_with(tmp_path, embedder, namespace, monkeypatch):
    with Catalogue(tmp_path) as catalogue:
        put(catalogue, "notes", SAME, reading=Reading("0" * 64, [b"k" * 32] * 2, b"as another model reads it"))
        catalogue.keep_defaults({"namespace": namespace} if namespace else {})
        with catalogue._environment.transaction(write=True) as txn:
            txn.put("meta", b"format", b"ragkv.catalogue/2")
            txn.delete("meta", b"undivided")
    with monkeypatch.context() as only_reading:
        only_reading.setattr(Catalogue, "readonly", True)
        if namespace:
            with pytest.raises(IncompatibleFolderError, match="open it once where it may be written to"):
                Catalogue(tmp_path)
        else:
            with Retriever.open(tmp_path, embedder) as retriever:
                assert found(retriever) == SAME and found(retriever, namespace="x") == []
    with Retriever.open(tmp_path, embedder) as retriever:
        assert found(retriever, namespace=namespace) == SAME == found(retriever, namespace=namespace, hybrid=True)
        assert found(retriever, namespace="" if namespace else "ada") == []
        assert retriever.catalogue.check() == []
        assert retriever.catalogue.get("notes", namespace).metadata == {}


def test_bad_namespaces(shared):
    for namespace in (None, 3, b"x"):
        with pytest.raises(ArgumentTypeError, match="namespace must be a str"):
            shared.add("x", ["x"], namespace=namespace)
        with pytest.raises(ArgumentTypeError, match="namespace must be a str"):
            shared.search("x", namespace=namespace)
    with pytest.raises(ArgumentError, match="namespace must be valid Unicode"):
        shared.add("x", ["x"], namespace="\ud800")


def test_records_without_a_namespace_are_of_none(catalogue):
    """As they were written before."""
    from ragkv.retrieval.records import document_from, document_payload

    document = put(catalogue, "a", ["one"]).document
    fields = json.loads(document_payload(document))
    del fields["namespace"]
    assert document_from(json.dumps(fields).encode()) == document
    with catalogue.snapshot() as view:
        assert view.all_within("") and np.array_equal(view.vector_of("one"), view.vector(document.passage_ids[0]))
