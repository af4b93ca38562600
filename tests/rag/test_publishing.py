"""One machine fills and publishes, others answer without having read anything, and follow what changes."""

from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import pytest

from ragkv import (
    RAG,
    ArgumentError,
    ArgumentTypeError,
    Engine,
    PublicationError,
    RecordError,
    Reuse,
    StoreError,
    TieredStore,
    UploadError,
)
from ragkv.defaults import kept_in
from ragkv.publishing import Followed, _wait, published_defaults
from ragkv.retrieval import Retriever, TokenChunker
from ragkv.store import RemoteTier
from ragkv.store.remote.envelope import ForeignError
from ragkv.store.remote.objects import ObjectPool
from ragkv.store.remote.pool import PoolError

from .rags import DOCUMENTS, QUESTION, TEMPLATE, TOKENIZER, WordEmbedder, small_model

TEXTS = dict(list(DOCUMENTS.items())[:3])
ONE, TWO, THREE = TEXTS


@pytest.fixture
def pool(tmp_path):
    """The folder that is the pool."""
    return tmp_path / "pool"


@pytest.fixture
def machine(tmp_path, model, pool):
    """Opens RAGs over one pool, each with a folder of its own, or none; all are closed."""
    opened = []

    def make(folder=None, *, reads=True, embedder=None, other=None, template=TEMPLATE, secret=None, **options):
        path = folder and tmp_path / folder
        tier = RemoteTier(f"file://{pool}", readonly=reads, encryption_key=secret)
        store = TieredStore(path and path / "kv", cpu_bytes=64 << 20, remote=tier)
        engine = Engine(other or model, TOKENIZER, template=template, store=store, method=Reuse(), **options)
        retriever = Retriever.open(path and path / "documents", embedder or WordEmbedder())
        opened.append(RAG(engine, retriever, TokenChunker(TOKENIZER, 48)))
        return opened[-1]

    yield make
    for rag in opened:
        rag.close()


@pytest.fixture
def filled(machine):
    """Whoever fills the pool, with three documents published."""
    rag = machine("fills", reads=False)
    rag.add_texts(list(TEXTS.values()), list(TEXTS), [{"n": number} for number in range(3)])
    published = rag.publish()
    assert (published.documents, published.unread) == (3, 0) and published.passages == len(rag.engine.store)
    return rag


@pytest.fixture
def catalogue(pool):
    """The file that the catalogue is."""

    def find():
        (file,) = [file for file in pool.glob("catalogues/*/*") if file.is_file()]
        return file

    return find


def files(pool):
    return {file: file.read_bytes() for file in pool.rglob("*") if file.is_file()}


def sources(rag):
    assert rag.retriever.catalogue.check() == []
    return {document.source: rag.retriever.catalogue.texts(document.source) for document in rag.retriever.catalogue}


def unchanged(*given, **more):
    raise AssertionError(f"nothing may be embedded, got {given!r:.60}")


@pytest.mark.parametrize("folder", [None, "follows"], ids=["in memory", "in a folder"])
def test_a_new_machine_answers_its_first_question_from_the_pool(folder, machine, filled, pool, reads, monkeypatch):
    want, before = filled.ask(QUESTION, max_new_tokens=4), files(pool)
    monkeypatch.setattr(WordEmbedder, "encode_documents", unchanged)
    rag = machine(folder)
    passes, said, encode = reads(rag.engine), [], rag.engine.encoder.ids
    monkeypatch.setattr(rag.engine.encoder, "ids", lambda text, **more: said.append(text) or encode(text, **more))
    assert rag.follow() == Followed(3, 3) and rag.follow() == Followed(3)
    got = rag.ask(QUESTION, max_new_tokens=4)
    assert (got.token_ids, got.report.fusion.hits) == (want.token_ids, {"remote": 5})
    assert said == [QUESTION] and not passes, "something was tokenised or read"
    assert [(hit.source, hit.text, hit.metadata, hit.span) for hit in got.sources] == [
        (hit.source, hit.text, hit.metadata, hit.span) for hit in want.sources
    ]
    assert sources(rag) == sources(filled) and files(pool) == before


def test_what_changed_and_what_was_removed_is_followed_and_the_rest_is_not_read(machine, filled, monkeypatch):
    rag, other = machine("follows"), machine()
    rag.follow()
    other.follow()
    filled.add_texts(["Clearport lies on no river.", "A new one."], [TWO, "new"])
    filled.remove(ONE)
    assert set(sources(rag)) == set(TEXTS), "it is followed when it is asked to be"
    assert filled.publish().documents == 3
    read, begin = [], rag.engine.store.remote.publications._pool.begin
    monkeypatch.setattr(
        rag.engine.store.remote.publications._pool,
        "begin",
        lambda name, start, stop: read.append(stop - start) or begin(name, start, stop),
    )
    assert rag.follow() == other.follow() == Followed(3, 2, (ONE,))
    assert sources(rag) == sources(other) == sources(filled)
    assert rag.ask(QUESTION, max_new_tokens=4).token_ids == filled.ask(QUESTION, max_new_tokens=4).token_ids
    assert rag.engine.store.missing(rag._keys(TWO)) == []
    for source in list(sources(filled)):
        filled.remove(source)
    assert filled.publish().documents == 0
    assert set(rag.follow().removed) == {"new", TWO, THREE} and sources(rag) == {}


def test_what_is_read_behind_neighbours_counts_as_unread(machine):
    """Others do not have the neighbours of that moment, and read it alone."""
    filled = machine("fills", reads=False)
    filled.behind = 1
    filled.add_texts(list(TEXTS.values()), list(TEXTS))
    filled.refresh()
    published = filled.publish()
    assert published.unread == published.passages > 0
    rag = machine()
    rag.follow()
    assert set(rag.ask(QUESTION, max_new_tokens=1).report.fusion.hits) == {"computed"}


def test_documents_of_the_folders_own_stay(machine, filled, pool):
    rag = machine("follows")
    rag.add_texts(["Mine.", "My version.", TEXTS[THREE]], ["mine", TWO, THREE], [{}, {}, {"n": 2}])
    assert rag.follow() == Followed(3, 1, (), (TWO,)) and rag.follow() == Followed(3)
    rag.add_texts(["Another version."], [ONE])
    filled.remove(ONE)
    filled.remove(THREE)
    filled.publish()
    assert rag.follow() == Followed(1, 0, (), (TWO,))
    assert sources(rag).keys() == {"mine", ONE, TWO, THREE} and sources(rag)[ONE] == ["Another version."]
    before = files(pool)
    rag.remove("mine")
    assert files(pool) == before and rag.engine.store.stats().pools["remote"].pending == 0


def test_whoever_follows_writes_nothing_and_deletes_nothing(machine, filled, pool):
    rag = machine("follows")
    rag.follow()
    damaged = next(file for file in pool.glob("??/*") if file.name == rag._keys(ONE)[0].hex())
    damaged.write_bytes(damaged.read_bytes()[:-9])
    before = files(pool)
    rag.engine.store.remove_many(rag._keys(TWO))
    assert rag.ask(TEXTS[ONE][:40], max_new_tokens=1).report.fusion.hits["computed"], "what is damaged is read"
    rag.add_texts(["One of its own."], ["own"])
    rag.remove("own")
    rag.remove(TWO)
    rag.engine.store.share()
    rag.engine.store.flush()
    with pytest.raises(ArgumentError, match="may be written to"):
        rag.publish()
    with pytest.raises(ArgumentError, match="never writes"):
        filled.follow()
    rag.close()
    assert files(pool) == before


def test_the_last_who_publishes_counts(machine, filled):
    rag, second = machine(), machine("second", reads=False)
    rag.follow()
    second.add_texts(["What the second says."], ["second"])
    second.publish()
    assert rag.follow() == Followed(1, 1, tuple(sorted(TEXTS))) and set(sources(rag)) == {"second"}
    filled.publish()
    assert rag.follow().removed == ("second",) and set(sources(rag)) == set(TEXTS)


def test_a_namespace_has_nothing_of_another(machine, filled):
    filled.add_texts(["A secret."], ["secret"], namespace="mine")
    filled.publish(namespace="mine")
    rag = machine()
    rag.follow()
    assert set(sources(rag)) == set(TEXTS)
    with pytest.raises(PublicationError, match=r"nothing is published .* of the namespace 'other'"):
        rag.follow(namespace="other")
    assert rag.follow(namespace="mine") == Followed(1, 1)
    assert [hit.source for hit in rag.ask("A secret?", namespace="mine", max_new_tokens=1).sources] == ["secret"]
    assert not [hit for hit in rag.ask("A secret?", max_new_tokens=1).sources if hit.source == "secret"]
    filled.remove(ONE)
    filled.publish()
    rag.follow()
    assert rag.retriever.catalogue.get("secret", "mine") is not None


def test_a_document_under_the_key_of_another_namespace_is_refused(machine, filled):
    """Whoever may write the pool of one namespace could place documents in another."""
    filled.add_texts(["A forgery."], ["forged"], namespace="mine")
    publications, documents = filled.engine.store.remote.publications, filled.engine.documents
    found = publications.get("mine", documents.within("mine").setting)
    assert found is None
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


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


def test_a_damaged_catalogue_is_an_error_and_nothing_is_lost(machine, filled, catalogue):
    rag, new = machine("follows"), machine()
    rag.follow()
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


def test_all_that_is_taken_is_of_one_moment(machine, filled, monkeypatch):
    """Published anew while it is read: between the header and the rest."""
    rag = machine()
    publications = rag.engine.store.remote.publications
    read, times = publications._read, iter(range(2))

    def replaced(found, names):
        if next(times, None) is not None:
            filled.add_texts([f"Version {len(sources(filled)[ONE][0])}."], [ONE])
            filled.publish()
        return read(found, names)

    monkeypatch.setattr(publications, "_read", replaced)
    rag.follow()
    assert sources(rag) == sources(filled) and sources(rag)[ONE] != [TEXTS[ONE]]


def test_two_processes_that_follow_in_one_folder_end_in_one_state(machine, filled, monkeypatch):
    """The slower one has read an older publication, and must not put it over the newer."""
    rag, other = machine("follows"), machine()
    rag.follow()
    catalogue, follow, done = rag.retriever.catalogue, rag.retriever.catalogue.follow, []

    def slow(*given):
        if not done:
            done.append(True)
            filled.add_texts(["The newest."], [ONE])
            filled.publish()
            rag.follow()
        return follow(*given)

    filled.add_texts(["An older one."], [ONE])
    filled.publish()
    monkeypatch.setattr(catalogue, "follow", slow)
    rag.follow()
    other.follow()
    assert done and sources(rag) == sources(other) == sources(filled)


def test_what_a_repair_lost_is_taken_again(machine, filled):
    rag = machine("follows")
    rag.follow()
    catalogue = rag.retriever.catalogue
    with catalogue._environment.transaction(write=True) as txn:
        key = catalogue.get(ONE).passage_ids[0].to_bytes(8, "big")
        txn.put("passages", key, txn.get("passages", key)[:-3] + b"???")
    catalogue.repair(WordEmbedder().encode_documents)
    assert ONE not in sources(rag)
    rag.follow()
    assert sources(rag) == sources(filled)
    with catalogue._environment.transaction(write=True) as txn:
        key = catalogue.get(ONE).key + bytes.fromhex(rag.engine.documents.setting)
        txn.put("readings", key, txn.get("readings", key)[:-3] + b"???")
        key = catalogue.get(TWO).passage_ids[0].to_bytes(8, "big")
        txn.put("passages", key, txn.get("passages", key)[:-3] + b"???")
    catalogue.repair(WordEmbedder().encode_documents)
    filled.remove(TWO)
    filled.publish()
    assert rag.follow() == Followed(2, 2) and sources(rag) == sources(filled)
    assert set(rag.ask(QUESTION, max_new_tokens=1).report.fusion.hits) == {"remote"}, "what it had is read anew"
    assert catalogue.seen().documents.keys() == {document.key for document in catalogue}


def test_a_pool_that_takes_less_is_an_error_and_what_was_published_stays(machine, filled, pool, monkeypatch):
    before = files(pool)
    filled.add_texts(["More."], ["more"])
    filled.engine.store.flush()
    monkeypatch.setattr(filled.engine.store.remote._pool, "most_bytes", 1000, raising=False)
    with pytest.raises(PublicationError, match=r"takes values of 1,000"):
        filled.publish()
    assert {file: data for file, data in files(pool).items() if "catalogues" in str(file)} == {
        file: data for file, data in before.items() if "catalogues" in str(file)
    }


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


def test_another_model_publishes_beside_and_the_former_may_be_withdrawn(machine, filled, model):
    new, other = small_model(seed=1), machine("other", reads=False, other=small_model(seed=1))
    other.add_texts(["Read by another model."], ["theirs"])
    other.add_texts(["Of a namespace."], ["theirs"], namespace="mine")
    assert filled.publish(namespace="mine").documents == 0 and other.publish(namespace="mine").withdrawn == 0
    assert other.publish().withdrawn == 0 and machine().follow().documents == 3
    assert other.publish(only=True).withdrawn == 1
    with pytest.raises(PublicationError, match=r"for this model; .*weights"):
        machine().follow()
    follower = machine(other=new)
    assert follower.follow().documents == 1 and follower.follow(namespace="mine").documents == 1
    assert machine().follow(namespace="mine").documents == 0, "another namespace's are none of it"


def test_what_was_renamed_is_the_folders_own_and_what_is_published_comes_again(machine, filled):
    rag = machine()
    rag.follow()
    rag.retriever.catalogue.rename(ONE, "renamed", lambda reading: None)
    filled.add_texts(["Another text."], [TWO])
    filled.publish()
    assert rag.follow() == Followed(3, 2)
    assert sources(rag) == sources(filled) | {"renamed": sources(filled)[ONE]}


def test_kv_that_nothing_names_any_more_go_and_what_moved_keeps_its(machine, filled, monkeypatch):
    rag, dropped = machine(), []
    rag.follow()
    one, two = rag._keys(ONE), rag._keys(TWO)
    monkeypatch.setattr(type(rag.engine.documents), "drop", lambda documents, keys: dropped.extend(keys))
    filled.retriever.catalogue.rename(ONE, "moved", lambda reading: reading)
    assert filled.publish().unread == 0
    assert rag.follow() == Followed(3, 1, (ONE,)) and not set(dropped) & set(one)
    filled.retriever.catalogue.remove(TWO)
    filled.publish()
    dropped.clear()
    assert rag.follow().removed == (TWO,) and set(dropped) == set(two)


def test_what_is_taken_along_is_for_the_model_that_is_published_for(machine, filled):
    catalogue, rag = filled.retriever.catalogue, machine()
    document = catalogue.get(ONE)
    with catalogue.snapshot() as view:
        (reading,) = view.readings(document)
    catalogue.keep([(document, reading._replace(setting="ab" * 32))])
    catalogue.keep_defaults({"method": "calibrated", "chunk_tokens": 48})
    filled.publish()
    rag.follow()
    with rag.retriever.catalogue.snapshot() as view:
        assert view.read_for(document.key) == [reading.setting]
    assert rag.retriever.catalogue.defaults == {"chunk_tokens": 48, "namespace": ""}, "what was calibrated elsewhere"


def test_a_folder_with_options_of_its_own_keeps_them(machine, filled):
    rag = machine()
    rag.retriever.catalogue.keep_defaults({"chunk_tokens": 7})
    rag.follow()
    assert rag.retriever.catalogue.defaults == {"chunk_tokens": 7}


def test_a_new_folder_is_opened_as_was_published_last(machine):
    tier = machine(reads=False).engine.store.remote
    for setting, tokens, created_s in (("a", 1, 1.0), ("b", 2, 3.0), ("c", 3, "never")):
        facts = {"created_s": created_s, "defaults": {"chunk_tokens": tokens}}
        tier.publications.put("", setting, facts, {bytes(32): b""})
    assert published_defaults(tier, "") == {"chunk_tokens": 2, "namespace": ""}


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


@pytest.fixture
def published(tmp_path):
    """The URL of a pool, filled and published by ``from_pretrained``."""
    url = f"file://{tmp_path}/pool"
    with RAG.from_pretrained(
        "bundled", path=tmp_path / "fills", embedder=WordEmbedder(), remote=url, chunk_tokens=40, method="reuse"
    ) as rag:
        rag.add_texts(list(TEXTS.values()), list(TEXTS))
        rag.publish()
    return url


async def away(*given, **more):
    raise PoolError("away")


def test_opening_takes_what_is_published_and_how_it_was_made(published, pool, tmp_path, monkeypatch, caplog):
    options = {"embedder": WordEmbedder(), "remote": published, "follow": True}
    with RAG.from_pretrained(**options) as rag:  # not even the model is named
        assert set(sources(rag)) == set(TEXTS) and rag.chunker.chunk_tokens == 40 and rag.engine.method == Reuse()
        assert set(rag.ask(QUESTION, max_new_tokens=1).report.fusion.hits) == {"remote"}
    with RAG.from_pretrained(path=tmp_path / "follows", **options) as rag:
        assert rag.refresh() == 0
    assert kept_in(tmp_path / "follows")["chunk_tokens"] == 40 and "remote" not in kept_in(tmp_path / "follows")
    ask = ObjectPool._ask
    monkeypatch.setattr(ObjectPool, "_ask", away)
    with RAG.from_pretrained(path=tmp_path / "follows", **options) as rag:
        assert set(sources(rag)) == set(TEXTS) and "what was published before: away" in caplog.text
        with pytest.raises(PoolError, match="away"):
            rag.follow()
    with pytest.raises(PoolError, match="away"):
        RAG.from_pretrained(**options)
    monkeypatch.setattr(ObjectPool, "_ask", ask)
    for file in files(pool):
        file.unlink()
    with RAG.from_pretrained(path=tmp_path / "follows", **options) as rag:
        assert set(sources(rag)) == set(TEXTS), "what it has it keeps, when the pool has nothing any more"
        assert rag.ask(QUESTION, max_new_tokens=1).sources
    for folder in (None, tmp_path / "new"):
        with pytest.raises(PublicationError, match="nothing is published"):
            RAG.from_pretrained(path=folder, **options)


def test_a_namespace_is_opened_as_it_was_published(published, tmp_path):
    """Whichever the publisher's folder keeps."""
    with RAG.from_pretrained(path=tmp_path / "fills", embedder=WordEmbedder(), remote=published) as rag:
        rag.add_texts(["Of a tenant."], ["theirs"], namespace="mine")
        rag.publish(namespace="mine")
        with pytest.raises(ArgumentTypeError, match="limit_s"):
            rag.publish(limit_s="soon")
    options = {"embedder": WordEmbedder(), "remote": published, "follow": True, "namespace": "mine"}
    for options["namespace"] in ("mine", None):
        with RAG.from_pretrained(path=tmp_path / "follows", **options) as rag:
            assert rag.engine.documents.namespace == "mine"
            assert [document.source for document in rag.retriever.catalogue] == ["theirs"]
            assert set(rag.ask("Whose?", max_new_tokens=1).report.fusion.hits) <= {"remote", "disk"}


def test_what_cannot_follow_is_refused(published, tmp_path):
    options = {"embedder": WordEmbedder(), "follow": True}
    with pytest.raises(ArgumentError, match="takes a pool"):
        RAG.from_pretrained("bundled", **options)
    with pytest.raises(ArgumentError, match="readonly=True"):
        RAG.from_pretrained("bundled", remote=RemoteTier(published), **options)
    with pytest.raises(PublicationError, match=r"nothing is published .* of the namespace 'other'"):
        RAG.from_pretrained(path=tmp_path / "fills", namespace="other", remote=published, **options)
    with pytest.raises(ArgumentError, match="cannot follow"):
        RAG.from_pretrained("bundled", path=tmp_path / "fills", readonly=True, remote=published, **options)
    with RAG.from_pretrained("bundled", remote=RemoteTier(published, readonly=True), **options) as rag:
        assert len(sources(rag)) == 3
