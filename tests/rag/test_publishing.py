"""One machine fills and publishes, others answer without having read anything, and follow what changes."""

import pytest

from ragkv import RAG, ArgumentError, ArgumentTypeError, PublicationError, Reuse
from ragkv.defaults import kept_in
from ragkv.publishing import Followed, published_defaults
from ragkv.store import RemoteTier
from ragkv.store.remote.objects import ObjectPool
from ragkv.store.remote.pool import PoolError

from .rags import QUESTION, TEXTS, WordEmbedder, files, small_model, sources

ONE, TWO, THREE = TEXTS


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
    rag, other = machine("follows", follow=True), machine()
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
    rag = machine(follow=True)
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
    rag = machine("follows", follow=True)
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
    rag, second = machine(follow=True), machine("second", reads=False)
    second.add_texts(["What the second says."], ["second"])
    second.publish()
    assert rag.follow() == Followed(1, 1, tuple(sorted(TEXTS))) and set(sources(rag)) == {"second"}
    filled.publish()
    assert rag.follow().removed == ("second",) and set(sources(rag)) == set(TEXTS)


def test_a_namespace_has_nothing_of_another(machine, filled):
    filled.add_texts(["A secret."], ["secret"], namespace="mine")
    filled.publish(namespace="mine")
    rag = machine(follow=True)
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
    rag, other = machine("follows", follow=True), machine()
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
    rag = machine(follow=True)
    rag.retriever.catalogue.rename(ONE, "renamed", lambda reading: None)
    filled.add_texts(["Another text."], [TWO])
    filled.publish()
    assert rag.follow() == Followed(3, 2)
    assert sources(rag) == sources(filled) | {"renamed": sources(filled)[ONE]}


def test_kv_that_nothing_names_any_more_go_and_what_moved_keeps_its(machine, filled, monkeypatch):
    rag, dropped = machine(follow=True), []
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


def test_a_new_folder_is_opened_as_was_published_last(machine):
    tier = machine(reads=False).engine.store.remote
    for setting, tokens, created_s in (("a", 1, 1.0), ("b", 2, 3.0), ("c", 3, "never")):
        facts = {"created_s": created_s, "defaults": {"chunk_tokens": tokens}}
        tier.publications.put("", setting, facts, {bytes(32): b""})
    assert published_defaults(tier, "") == {"chunk_tokens": 2, "namespace": ""}


def test_a_folder_with_options_of_its_own_keeps_them(machine, filled):
    rag = machine()
    rag.retriever.catalogue.keep_defaults({"chunk_tokens": 7})
    rag.follow()
    assert rag.retriever.catalogue.defaults == {"chunk_tokens": 7}
