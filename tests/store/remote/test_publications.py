"""Catalogues in a pool: put in the place of one another, read in parts, each part verified; and pools that are only read."""

from __future__ import annotations

import pytest

from ragkv.errors import PublicationError, RecordError, StoreError
from ragkv.store import RemoteTier, TieredStore
from ragkv.store.remote.publications import KEYS

SECRET = bytes(range(32))
PARTS = {KEYS: bytes(range(64)), bytes([1]) * 32: b"", bytes([2]) * 32: b"two" * 30_000, bytes([3]) * 32: b"three" * 9}


@pytest.fixture
def pool(url):
    """Opens tiers over one pool; all are closed."""
    opened = []

    def make(**options):
        opened.append(RemoteTier(url, **options))
        return opened[-1]

    yield make
    for tier in opened:
        tier.close()


def everything(found):
    return list(found.parts)


@pytest.mark.parametrize("options", [{}, {"encryption_key": SECRET}], ids=["plain", "encrypted"])
def test_what_is_published_is_had_whole_and_in_parts(pool, options, monkeypatch):
    one, two = pool(**options).publications, pool(**options).publications
    assert two.get("", "a") is None and two.id("", "a") == b"" and two.each() == [] and two.ids() == set()
    one.put("", "a", {"says": "ä"}, PARTS)
    found, parts = two.take("", "a", everything)
    assert (found.facts, parts, found.head.id) == ({"says": "ä"}, PARTS, two.id("", "a"))
    monkeypatch.setattr("ragkv.store.remote.publications._GAP_BYTES", 10)
    monkeypatch.setattr("ragkv.store.remote.publications._HEAD_BYTES", 50)
    for names in ([], [bytes([3]) * 32, KEYS], [bytes([1]) * 32], [bytes([2]) * 32]):
        assert two.take("", "a", lambda found, names=names: names)[1] == {name: PARTS[name] for name in names}
    one.put("", "b", {}, {KEYS: bytes(32)})
    one.put("mine", "a", {}, {KEYS: bytes([7]) * 32})
    assert [len(two.each(*namespace)) for namespace in ((), ("",), ("mine",), ("other",))] == [3, 2, 1, 0]
    assert two.keys() == {bytes(range(32)), bytes(range(32, 64)), bytes(32), bytes([7]) * 32}
    before = two.ids()
    one.put("", "a", {}, {KEYS: b""})
    assert len(two.ids() ^ before) == 2 and two.take("", "a", everything)[1] == {KEYS: b""}
    assert two.get("other", "a") is None and two.get("", "c") is None


def test_catalogues_are_no_chunks(pool, url, machine, kv, key):
    store = machine(url)
    store.put(key(1), kv(1))
    store.flush()
    pool().publications.put("", "a", {}, PARTS)
    tier = pool(refresh_s=0.01)
    tier._manifest._list()
    assert tier.counts()[0] == 1 and tier._manifest.holds([key(1)])


@pytest.mark.parametrize("asked", [1, 1000], ids=["listed", "asked for"])
def test_what_a_pool_lacks_is_known_at_once(url, asked, pool, machine, kv, key, monkeypatch):
    monkeypatch.setattr("ragkv.store.remote.tier.MOST_ASKED", asked)
    store, tier = machine(url), pool()
    assert tier.lacking([key(1), key(2)]) == [key(1), key(2)] and tier.lacking([]) == []
    store.put(key(2), kv(2))
    store.flush()
    assert tier.lacking([key(1), key(2), key(3), key(1)]) == [key(1), key(3)]


def test_one_that_belongs_elsewhere_is_refused(tmp_path):
    """Whoever may write the pool copies a namespace's catalogue to the name of another's."""
    tier = RemoteTier(f"file://{tmp_path}/pool")
    publications = tier.publications
    publications.put("mine", "a", {}, PARTS)
    (file,) = (file for file in (tmp_path / "pool").rglob("*") if file.is_file())
    publications.put("", "a", {}, PARTS)
    (other,) = (each for each in (tmp_path / "pool").rglob("*") if each.is_file() and each != file)
    other.write_bytes(file.read_bytes())
    with pytest.raises(RecordError, match="damaged"):
        publications.get("", "a")
    with pytest.raises(RecordError):
        publications.keys()
    assert publications.get("mine", "a") is not None
    tier.close()


def test_a_header_that_is_replaced_while_it_is_read_is_read_again(pool, monkeypatch):
    tier = pool()
    tier.publications.put("", "a", {"first": True}, PARTS)
    monkeypatch.setattr("ragkv.store.remote.publications._HEAD_BYTES", 50)
    read, again = tier._pool.read, []

    def reading(name, start, stop):
        if not again:
            again.append(True)
            tier.publications.put("", "a", {"first": False}, PARTS)
        return read(name, start, stop)

    monkeypatch.setattr(tier._pool, "read", reading)
    assert tier.publications.get("", "a").facts == {"first": False} and again


def test_what_is_too_large_for_a_value_is_not_published(pool, monkeypatch):
    tier = pool()
    tier.publications.put("", "a", {"first": True}, PARTS)
    monkeypatch.setattr(tier._pool, "most_bytes", 50_000, raising=False)
    with pytest.raises(PublicationError, match=r"takes values of 50,000"):
        tier.publications.put("", "a", {}, PARTS)
    monkeypatch.setattr("ragkv.store.remote.publications.MOST_HEADER_BYTES", 100)
    with pytest.raises(PublicationError, match="3 documents are too many"):
        tier.publications.put("", "a", {}, PARTS)
    assert tier.publications.get("", "a").facts == {"first": True}


@pytest.mark.parametrize("how", ["tier", "store", "memory"])
def test_a_pool_for_reading_only_is_not_written(url, how, machine, kv, key, same, tmp_path):
    """Nor deleted from, whatever is put, removed or found damaged."""
    one = machine(url)
    one.put_many([(key(number), kv(number), 0.0) for number in range(3)])
    one.flush()
    names = dict(one.remote._pool.names())
    damaged = one.remote._pool.read(next(name for name in names if key(1).hex() in name), 0, 1 << 20)
    one.remote._pool.write(f"{key(1).hex()[:2]}/{key(1).hex()}", bytes(damaged)[:-9], float("inf"))
    names = dict(one.remote._pool.names())
    if how == "tier":
        two = machine(RemoteTier(url, readonly=True), "two")
    elif how == "store":
        TieredStore(tmp_path / "two").close()
        two = machine(url, "two", readonly=True)
    else:
        two = TieredStore(None, readonly=True, remote=url)
    same(two.get(key(0)), kv(0))
    assert two.get(key(1)) is None and two.remote.readonly
    if how != "store":
        two.put(key(5), kv(5))
        two.remove_many([key(0), key(2)])
    two.share()
    two.flush()
    two.close()
    assert dict(one.remote._pool.names()) == names
    if how == "tier":
        again = machine(url, "two")
        again.flush()
        assert not machine(url).contains(key(5)), "what a reader computed was noted to be sent"
        again.share()
        again.flush()
        assert machine(url).contains(key(5)), "what a reader computed may be sent by a writer that asks for it"


def test_whoever_reads_only_leaves_the_notes_to_who_writes(url, machine, kv, key, monkeypatch):
    """What a folder has still to send or to delete stays noted while it is open for reading the pool only."""
    one = machine(url, "one")
    one.put(key(1), kv(1))
    one.flush()
    monkeypatch.setattr(one.remote._pool, "delete", lambda name: (_ for _ in ()).throw(StoreError("away")))
    one.remove(key(1))
    one.close()
    reader = machine(RemoteTier(url, readonly=True), "one")
    assert reader.get(key(1)) is None, "what is to be deleted is served"
    reader.close()
    again = machine(url, "one")
    again.flush()
    assert not machine(url).contains(key(1))
