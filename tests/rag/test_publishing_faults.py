"""Whoever follows a published catalogue takes nothing that is damaged, foreign or forged, and loses nothing by it."""

from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import pytest

from ragkv import PublicationError, RecordError, StoreError, UploadError
from ragkv.publishing import Followed, _wait
from ragkv.store.remote.envelope import ForeignError
from ragkv.store.remote.pool import PoolError

from .rags import QUESTION, TEMPLATE, TEXTS, WordEmbedder, small_model, sources

ONE, TWO, THREE = TEXTS


@pytest.fixture
def catalogue(pool):
    """The file that the catalogue is."""

    def find():
        (file,) = [file for file in pool.glob("catalogues/*/*") if file.is_file()]
        return file

    return find


def spoil(txn, database, key):
    txn.put(database, key, txn.get(database, key)[:-3] + b"???")


def test_a_document_under_the_key_of_another_namespace_is_refused(machine, filled):
    """Whoever may write the pool of one namespace could place documents in another."""
    filled.add_texts(["A forgery."], ["forged"], namespace="mine")
    publications, documents = filled.engine.store.remote.publications, filled.engine.documents
    assert publications.get("mine", documents.within("mine").setting) is None
    filled.publish(namespace="mine")
    taken = publications.take("mine", documents.within("mine").setting, lambda found: list(found.parts))
    publications.put("", documents.setting, taken[0].facts, taken[1])
    rag = machine()
    with pytest.raises(RecordError, match="of another namespace"):
        rag.follow()
    assert sources(rag) == {}


def test_what_differs_is_named(machine, filled, tmp_path):
    with pytest.raises(PublicationError, match=r"for this model; .* differs in: .*weights"):
        machine(other=small_model(seed=1)).follow()
    with pytest.raises(PublicationError, match="differs in: template prefix"):
        machine(template=replace(TEMPLATE, prefix="Other.\n")).follow()
    with pytest.raises(PublicationError, match="differs in: context"):
        machine(context="chunk").follow()
    with pytest.raises(PublicationError, match="made with the embedder words, got others"):
        machine(embedder=WordEmbedder("others")).follow()
    rag = machine()
    facts = filled.engine.store.remote.publications.get("", rag.engine.documents.setting).facts
    parts = {bytes(32): b""}
    filled.engine.store.remote.publications.put("", rag.engine.documents.setting, {**facts, "format": 2}, parts)
    with pytest.raises(PublicationError, match="of version 2, this version of ragkv reads 1"):
        rag.follow()


def test_facts_that_cannot_be_are_an_error_that_says_what_is_wrong(machine):
    rag, publications = machine(), machine(reads=False).engine.store.remote.publications
    publications.put("", "a", {"read_with": 5, "defaults": [1]}, {bytes(32): b""})
    with pytest.raises(PublicationError, match=r"nothing is published .* for this model"):
        rag.follow()
    publications.put("", rag.engine.documents.setting, {"format": 1, "embedder": "x"}, {bytes(32): b""})
    with pytest.raises(PublicationError, match="made with the embedder unknown, got words"):
        rag.follow()


def test_vectors_of_another_size_are_refused(machine, filled):
    wide = WordEmbedder()
    wide.dimension = 64
    rag = machine(embedder=wide)
    with pytest.raises(RecordError, match="its vectors of another embedder"):
        rag.follow()
    assert sources(rag) == {}


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


def test_a_damaged_catalogue_is_an_error_and_nothing_is_lost(machine, filled, catalogue):
    rag, new = machine("follows", follow=True), machine()
    before, file = sources(rag), catalogue()
    filled.remove(ONE)
    filled.add_texts(["Another text."], [TWO])
    filled.publish()
    whole = file.read_bytes()
    size = 36 + int.from_bytes(whole[24:28], "little")
    documents = size + 32 * len(filled.engine.store)  # behind the keys of KV, for which only prune looks
    for damaged in (
        *(flipped(whole, at) for at in (2, 20, 30, 60, size - 5, *range(documents, len(whole), 1500))),
        *(whole[:cut] for cut in (0, 20, size - 1, size + 1, len(whole) - 1)),
        b"what somebody else put there" * 99,
    ):
        file.write_bytes(damaged)
        with pytest.raises((RecordError, ForeignError)):
            new.follow()
        assert sources(new) == {}
        with suppress(RecordError, ForeignError):  # damage of what has not changed need not be seen
            rag.follow()
        assert sources(rag) in (before, sources(filled))
    file.write_bytes(whole)
    new.follow()
    assert rag.follow().documents == 2 and sources(rag) == sources(new) == sources(filled)
    file.unlink()
    with pytest.raises(PublicationError, match="nothing is published"):
        rag.follow()
    assert sources(rag) == sources(filled)


def test_what_a_repair_lost_is_taken_again(machine, filled):
    rag = machine("follows", follow=True)
    catalogue = rag.retriever.catalogue
    with catalogue._environment.transaction(write=True) as txn:
        spoil(txn, "passages", catalogue.get(ONE).passage_ids[0].to_bytes(8, "big"))
    catalogue.repair(WordEmbedder().encode_documents)
    assert ONE not in sources(rag)
    rag.follow()
    assert sources(rag) == sources(filled)
    with catalogue._environment.transaction(write=True) as txn:
        spoil(txn, "readings", catalogue.get(ONE).key + bytes.fromhex(rag.engine.documents.setting))
        spoil(txn, "passages", catalogue.get(TWO).passage_ids[0].to_bytes(8, "big"))
    catalogue.repair(WordEmbedder().encode_documents)
    filled.remove(TWO)
    filled.publish()
    assert rag.follow() == Followed(2, 2) and sources(rag) == sources(filled)
    assert set(rag.ask(QUESTION, max_new_tokens=1).report.fusion.hits) == {"remote"}, "what it had is read anew"
    assert catalogue.seen().documents.keys() == {document.key for document in catalogue}


def test_a_catalogue_is_encrypted_as_chunks_are(machine, pool, catalogue):
    secret, other = bytes(range(32)), bytes(32)
    filled = machine("fills", reads=False, secret=secret)
    filled.add_texts(["What nobody else may read."], ["a name"])
    filled.publish()
    data = catalogue().read_bytes()
    assert b"nobody" not in data and b"a name" not in data and b"words" not in data
    for wrong, said in ((None, "no key was given"), (other, "another key")):
        with pytest.raises(ForeignError, match=said):
            machine(secret=wrong).follow()
    assert machine(secret=secret).follow() == Followed(1, 1)
    publisher = machine("forger", reads=False)
    publisher.add_texts(["A forgery."])
    publisher.publish()
    with pytest.raises(ForeignError, match="not encrypted"):
        machine(secret=secret).follow()


def test_tenants_with_a_key_each_take_their_own_alone(machine):
    one, two = bytes(range(32)), bytes(32)
    filled = machine("fills", reads=False, secret={"one": one, "two": two})
    for name in ("one", "two"):
        filled.add_texts([f"What {name} may read."], [name], namespace=name)
        assert filled.publish(namespace=name).unread == 0
    filled.add_texts(["Of nobody."], ["nobody's"])
    with pytest.raises(StoreError, match="no key for the namespace"):
        filled.publish()
    tenant = machine(secret={"one": one}, namespace="one")
    tenant.follow()
    assert tenant.ask("What?", max_new_tokens=1).report.fusion.hits == {"remote": 1}
    for name in ("two", ""):
        with pytest.raises((ForeignError, PublicationError)):
            tenant.follow(namespace=name)
    assert {document.source for document in tenant.retriever.catalogue} == {"one"}


def test_a_pool_that_takes_less_is_an_error_and_what_was_published_stays(machine, filled, catalogue, monkeypatch):
    before = catalogue().read_bytes()
    filled.add_texts(["More."], ["more"])
    filled.engine.store.flush()
    monkeypatch.setattr(filled.engine.store.remote._pool, "most_bytes", 1000, raising=False)
    with pytest.raises(PublicationError, match=r"takes values of 1,000"):
        filled.publish()
    assert catalogue().read_bytes() == before


def test_kv_come_first_and_a_pool_that_is_away_gets_no_catalogue(machine, model, tmp_path):
    rag = machine("fills", reads=False)
    rag.add_texts(["A text."], ["a"])
    pool = rag.engine.store.remote._pool
    real, pool.write = pool.write, lambda name, *rest: (_ for _ in ()).throw(PoolError("away"))
    with pytest.raises(StoreError):
        rag.publish(limit_s=0.3)
    pool.write = real
    with pytest.raises(PublicationError, match="nothing is published"):
        machine().follow()
    assert rag.publish().unread == 0 and machine().follow() == Followed(1, 1)
    (chunk,) = (tmp_path / "pool").glob("??/*")
    chunk.unlink()
    assert rag.publish().unread == 0 and chunk.exists(), "what the pool had lost was not sent again"


def test_publishing_waits_as_long_as_something_arrives():
    def publishing(pending, failing):
        pending, late = iter(pending), iter(range(failing))

        def flush(limit_s):
            if next(late, None) is not None:
                raise UploadError("too late")

        _wait(SimpleNamespace(flush=flush), SimpleNamespace(pool=lambda: SimpleNamespace(pending=next(pending))), 1.0)

    publishing([3, 2, 1], 2)
    with pytest.raises(UploadError):
        publishing([3, 2, 2], 2)
