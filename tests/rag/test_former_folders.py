"""Folders and archives made before documents had namespaces: nothing of them is lost, nothing is read again."""

import json

import pytest

from ragkv.exchange import export_folder, import_folder
from ragkv.folder import seal, unseal
from ragkv.retrieval import Catalogue, Snapshot
from ragkv.retrieval.changes import renamed
from ragkv.retrieval.records import document_payload, source_id

from .rags import DOCUMENTS, QUESTION, open_rag, tokens_of


def former(folder, namespace):
    """Makes a folder what it was before documents had namespaces, which only KV had, and records."""
    with Catalogue(folder / "documents") as catalogue:
        catalogue.keep_defaults({"namespace": namespace})
        with catalogue._environment.transaction(write=True) as txn:
            for document in list(Snapshot(txn).documents()):
                own, then = document.id, source_id(document.source)
                readings = [
                    reading._replace(record=reading.record.replace(own.encode(), then.encode()))
                    for reading in Snapshot(txn).readings(document)
                ]
                assert readings and readings[0].record.count(then.encode()) == 1
                renamed(txn, document, document.source, readings, "")
            for key, record in list(txn.items("documents")):
                facts = json.loads(unseal(key, record))
                for name in ("namespace", "pages", "headings"):
                    del facts[name]
                txn.put("documents", key, seal(key, json.dumps(facts).encode()))
            txn.put("meta", b"format", b"ragkv.catalogue/2")
            txn.delete("meta", b"undivided")


@pytest.mark.parametrize("way", ["folder", "archive"])
def test_a_former_folder_with_a_namespace_is_not_read_again(tmp_path, model, reads, way, monkeypatch):
    """Nor is what was repaired, whose KV only its record names."""
    with open_rag(tmp_path / "one", model, namespace="ada") as rag:
        rag.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS))
        rag._intake.repair_tokens = 4
        changed = DOCUMENTS["clearport.md"].replace("the", "a", 1)
        assert 0 < rag.add_texts([changed], ["clearport.md"]).tokens_read < tokens_of(rag, changed)
        want = rag.ask(QUESTION, max_new_tokens=4)
    former(tmp_path / "one", "ada")
    if way == "archive":
        with monkeypatch.context() as then:
            then.setattr("ragkv.retrieval.upkeep.FORMAT", b"ragkv.catalogue/2")
            then.setattr("ragkv.retrieval.exchange.document_payload", without_namespace)
            export_folder(tmp_path / "one", tmp_path / "all.tar")
        assert import_folder(tmp_path / "two", tmp_path / "all.tar", disk_bytes=1 << 30).documents == len(DOCUMENTS)
    with open_rag(tmp_path / ("one" if way == "folder" else "two"), model, namespace="ada") as rag:
        assert rag.retriever.catalogue.check() == []
        assert [each.tokens is not None for each in rag.documents()] == [True] * len(DOCUMENTS)
        seen = reads(rag.engine)
        got = rag.ask(QUESTION, max_new_tokens=4)
        assert got.token_ids == want.token_ids
        assert [(hit.source, hit.text) for hit in got.sources] == [(hit.source, hit.text) for hit in want.sources]
        assert rag.refresh() == sum(seen) == 0
        rag.remove("clearport.md")
        assert rag.retriever.catalogue.check() == []


def without_namespace(document):
    """A document's facts as they were written before it had a namespace."""
    facts = json.loads(document_payload(document))
    for name in ("namespace", "pages", "headings"):
        del facts[name]
    return json.dumps(facts).encode()
