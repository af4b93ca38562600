"""KV that no published catalogue names goes from a pool, after a while, and nothing else does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ragkv.errors import ArgumentError, ArgumentTypeError, PublicationError, RecordError, StoreError
from ragkv.store import RemoteTier
from ragkv.store.remote.envelope import ForeignError
from ragkv.store.remote.pruning import Pruned
from ragkv.store.remote.publications import KEYS
from ragkv.store.remote.records import name_of

DAY = 86_400.0
SECRET = bytes(range(32))


@pytest.fixture
def filled(url, machine, kv, key, monkeypatch):
    """A pool with chunks 0 to 5, sent ten days ago, of which 0 and 1 are named."""
    return fill(machine(url), kv, key, monkeypatch)


def fill(store, kv, key, monkeypatch):
    write = store.remote._records.write

    def earlier(key, record, payload, row, lifetime_s):
        return write(key, record, payload, replace(row, created_s=row.created_s - 10 * DAY), lifetime_s)

    with monkeypatch.context() as then:
        then.setattr(store.remote._records, "write", earlier)
        store.put_many([(key(number), kv(number), 0.0) for number in range(6)])
        store.flush()
    store.remote.publications.put("", "a", {}, {KEYS: key(0)})
    store.remote.publications.put("mine", "b", {}, {KEYS: key(1) + key(77)})
    return store


def left(store, key):
    names = dict(store.remote._pool.names())
    return [number for number in range(9) if name_of(key(number)) in names]


def test_what_no_catalogue_names_goes_after_the_grace_time(filled, key, kv):
    filled.put(key(7), kv(7))
    filled.flush()
    tier, sizes = filled.remote, dict(filled.remote._pool.names())
    want = Pruned(4, sum(sizes[name_of(key(number))] for number in (2, 3, 4, 5)), needed=2, young=1)
    assert tier.prune(dry_run=True) == want and left(filled, key) == [0, 1, 2, 3, 4, 5, 7]
    assert tier.prune(11 * DAY) == Pruned(0, 0, 2, 5)
    looked = []
    assert tier.prune(progress=looked.append) == want and sum(looked) == 5
    assert left(filled, key) == [0, 1, 7] and len(tier.publications.each()) == 2
    assert tier.prune(0) == Pruned(1, sizes[name_of(key(7))], 2) and left(filled, key) == [0, 1]


def test_without_a_catalogue_nothing_goes_but_by_age(url, machine, kv, key, monkeypatch):
    store = machine(url)
    store.put(key(1), kv(1))
    store.flush()
    with pytest.raises(PublicationError, match="nothing is published"):
        store.remote.prune(0)
    assert store.remote.prune(older_than_s=DAY) == Pruned(young=1)
    assert left(store, key) == [1]
    assert store.remote.prune(older_than_s=0).objects == 1 and left(store, key) == []


def test_what_went_is_missing_at_once(tmp_path, machine, kv, key, monkeypatch):
    """Also where the pool was listed before."""
    store = fill(machine(f"file://{tmp_path}/pool"), kv, key, monkeypatch)
    tier = RemoteTier(f"file://{tmp_path}/pool")
    monkeypatch.setattr(tier._pool, "quick", False)
    tier._manifest._list()
    assert tier.missing([key(0), key(2)]) == []
    assert tier.prune().objects == 4
    assert tier.missing([key(0), key(2)]) == [key(2)]
    tier.close()
    store.close()


def test_by_age_alone_whoever_needs_it(filled, key):
    assert filled.remote.prune(older_than_s=9 * DAY).objects == 6 and left(filled, key) == []
    assert len(filled.remote.publications.each()) == 2


@pytest.mark.parametrize("unreadable", ["encrypted", "damaged"])
def test_where_a_catalogue_cannot_be_read_nothing_goes(unreadable, filled, url, key):
    names = [name for name, _ in filled.remote._pool.names("catalogues/")]
    if unreadable == "encrypted":
        RemoteTier(url, encryption_key=SECRET).publications.put("other", "a", {}, {KEYS: key(2)})
    else:
        data = bytearray(filled.remote._pool.read(names[0], 0, 1 << 20))
        data[-1] ^= 1  # in the list of keys
        filled.remote._pool.write(names[0], bytes(data), float("inf"))
    with pytest.raises((ForeignError, RecordError)):
        filled.remote.prune(0)
    assert left(filled, key) == list(range(6))


def test_what_is_sent_anew_meanwhile_stays(filled, key, kv, monkeypatch, machine, url):
    """Between the look at how old it is, and its deletion."""
    tier, other = RemoteTier(url), machine(url)
    delete = tier._records.delete

    def deleting(name, number):
        if name == key(3):
            filled.remote._records.delete_all([key(3)])
            other.put(key(3), kv(3))
            other.flush()
        return delete(name, number)

    monkeypatch.setattr(tier._records, "delete", deleting)
    assert tier.prune().objects == 3 and left(filled, key) == [0, 1, 3]
    tier.close()


def test_what_is_published_meanwhile_stays(filled, key, monkeypatch, url):
    tier = RemoteTier(url)
    heads = tier._records.heads

    def looking(keys):
        filled.remote.publications.put("", "a", {}, {KEYS: key(0) + key(4)})
        return heads(keys)

    monkeypatch.setattr(tier._records, "heads", looking)
    assert tier.prune().objects == 3 and left(filled, key) == [0, 1, 4]
    tier.close()


def test_what_cannot_be_read_stays_and_is_counted(tmp_path, machine, kv, key, monkeypatch):
    url = f"file://{tmp_path}/pool"
    store = fill(machine(url), kv, key, monkeypatch)
    secret = machine(url, encryption_key=SECRET)
    secret.put(key(8), kv(8))
    secret.flush()
    file = tmp_path / "pool" / name_of(key(2))
    file.write_bytes(file.read_bytes()[:40])
    done = store.remote.prune(0)
    assert (done.objects, done.needed, done.young, done.unreadable) == (3, 2, 0, 2)
    assert left(store, key) == [0, 1, 2, 8]


@pytest.mark.parametrize("refused", [1, 4])
def test_what_the_pool_refuses_stays_and_is_counted(refused, relay, s3, machine, kv, key, monkeypatch):
    """A rule has moved it to an archive: one of them, or all that nobody needs."""
    store = fill(machine(s3), kv, key, monkeypatch)
    moved = [name_of(key(number)) for number in range(2, 2 + refused)]
    relay.fault, relay.when = "403", lambda method, path: method == "GET" and any(map(path.endswith, moved))
    done = store.remote.prune(0)
    assert (done.objects, done.needed, done.young, done.unreadable) == (4 - refused, 2, 0, refused)
    assert left(store, key) == [0, 1, *range(2, 2 + refused)]


def test_an_encrypted_pool_is_pruned_with_its_key(tmp_path, machine, kv, key, monkeypatch):
    url = f"file://{tmp_path}/pool"
    store = fill(machine(url, encryption_key=SECRET), kv, key, monkeypatch)
    assert store.remote.prune().objects == 4 and left(store, key) == [0, 1]


def test_what_is_refused(tmp_path, kv, key):
    tier = RemoteTier(f"file://{tmp_path}/pool", readonly=True)
    with pytest.raises(StoreError, match="for reading only"):
        tier.prune(older_than_s=0)
    for wrong, error in ((-1, ArgumentError), (float("nan"), ArgumentError), ("7d", ArgumentTypeError)):
        with pytest.raises(error, match=r"grace_s|age"):
            tier.prune(wrong)
    tier.close()
