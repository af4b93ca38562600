"""What is known to be in a pool is not asked for, and what is surely not there neither."""

from __future__ import annotations

from concurrent.futures import Future

import pytest
import torch

from ragkv.store import RemoteTier
from ragkv.store.remote.manifest import Manifest
from ragkv.store.remote.objects import ObjectPool
from ragkv.store.remote.pool import PoolError
from ragkv.store.remote.records import key_of, name_of


class Counting(ObjectPool):
    """A pool that is slow to ask, and counts."""

    def __init__(self, url):
        store = ObjectPool.open(url, 1.0, 4)
        super().__init__(store._store, url)
        self.asked, self.listings = [], 0

    def begin(self, name, start, stop):
        self.asked.append(name)
        return super().begin(name, start, stop)

    def which(self, names):
        self.asked += names
        return super().which(names)

    def names(self):
        self.listings += 1
        return super().names()


@pytest.fixture
def pool(tmp_path):
    made = Counting(f"file://{tmp_path}/pool")
    yield made
    made.close()


def manifest_of(store):
    return store._tiers.behind[0]._manifest


def test_a_miss_costs_no_request_once_the_pool_was_listed(pool, tmp_path, machine, kv, key, soon, same):
    one = machine(f"file://{tmp_path}/pool")
    one.put(key(1), kv(1))
    one.flush()
    store = machine(RemoteTier(pool))
    assert store.missing([key(1), key(2)]) == [key(2)], "before the listing is there the pool is asked"
    assert pool.asked == [name_of(key(1)), name_of(key(2)), name_of(key(1))], "and what is there is looked into, once"
    soon(lambda: manifest_of(store).fresh)
    del pool.asked[:]
    assert store.missing([key(1), key(2)]) == [key(2)] and store.get(key(3)) is None
    assert not pool.asked and pool.listings == 1
    same(store.get(key(1)), kv(1))
    assert pool.asked == [name_of(key(1))], "header and all that is small in one request"
    assert store.stats().entries["remote"] == 1


def test_of_a_document_that_is_there_a_few_chunks_are_looked_into_once(pool, tmp_path, machine, kv, key, soon):
    one, keys = machine(f"file://{tmp_path}/pool"), [key(number) for number in range(30)]
    one.put_many([(each, kv(number), 0.0) for number, each in enumerate(keys)])
    one.flush()
    store = machine(RemoteTier(pool))
    store.missing(keys[:1])
    soon(lambda: manifest_of(store).fresh)
    for most in (8, 0):
        del pool.asked[:]
        assert store.missing(keys) == [] and len(pool.asked) <= most


def test_what_this_process_did_is_known_at_once(pool, machine, kv, key, soon):
    store = machine(RemoteTier(pool))
    store.missing([key(1)])
    soon(lambda: manifest_of(store).fresh)
    store.put(key(1), kv(1))
    store.flush()
    tier = store._tiers.behind[0]
    assert tier.missing([key(1)]) == []
    store.remove(key(1))
    assert tier.missing([key(1)]) == [key(1)]


def test_what_was_to_be_sent_and_is_there_already_is_known_to_be(pool, tmp_path, machine, kv, key, soon):
    store, one = machine(RemoteTier(pool)), machine(f"file://{tmp_path}/pool")
    store.missing([key(1)])
    soon(lambda: manifest_of(store).fresh)
    for each in (one, store):
        each.put(key(1), kv(1))
        each.flush()
    assert store.stats().pools["remote"].skipped == 1
    assert store.remote.missing([key(1)]) == [], "though it was not there when the pool was listed"


def test_of_what_was_read_the_last_few_thousand_are_remembered(pool, machine, kv, key, monkeypatch):
    monkeypatch.setattr("ragkv.store.remote.heads.MOST_KNOWN", 3)
    one, store, keys = machine(pool.name), machine(RemoteTier(pool)), [key(number) for number in range(6)]
    one.put_many([(each, kv(number), 0.0) for number, each in enumerate(keys)])
    one.flush()
    for each in keys:
        store.remote.find([each])
    assert [each for each in keys if store.remote.row(each)] == keys[-3:]


def test_what_a_listing_named_and_is_gone_is_a_miss(pool, tmp_path, machine, kv, key, soon):
    one = machine(f"file://{tmp_path}/pool")
    one.put(key(1), kv(1))
    one.flush()
    store = machine(RemoteTier(pool))
    store.missing([key(1)])
    soon(lambda: manifest_of(store).fresh)
    one.remove(key(1))
    one.flush()
    assert store.get(key(1)) is None
    del pool.asked[:]
    assert store.get(key(1)) is None and not pool.asked


def test_a_listing_is_made_again_and_trusted_for_a_while(pool, key, soon):
    now = [0.0]
    manifest = Manifest(pool, 60.0, key_of, lambda: now[0])
    assert not manifest.fresh
    soon(lambda: manifest.fresh)
    pool.write(name_of(key(1)), b"x", 9.0)
    assert manifest.holds([key(1)]) == set()
    now[0] = 61.0
    assert manifest.fresh, "it is trusted while the next one is made"
    soon(lambda: manifest.holds([key(1)]) == {key(1)})
    now[0] = 200.0
    assert not manifest.fresh, "older than two turns"


def test_what_is_done_while_a_listing_is_made_holds_beside_it(pool, key, monkeypatch, soon):
    manifest = Manifest(pool, 60.0, key_of)

    def names():
        manifest.note([key(1)], True)
        manifest.note([key(2)], False)
        return iter([(name_of(key(2)), 1)])

    manifest.note([key(3)], True)
    monkeypatch.setattr(pool, "names", names)
    soon(lambda: manifest.fresh)
    assert manifest.holds([key(1), key(2), key(3)]) == {key(1)}, "what was done before it is in it"


def test_a_pool_that_cannot_be_listed_is_asked(pool, machine, kv, key, monkeypatch, caplog, soon):
    def fails():
        raise PoolError("listing is not allowed")

    monkeypatch.setattr(pool, "names", fails)
    store = machine(RemoteTier(pool))
    assert store.missing([key(1)]) == [key(1)]
    soon(lambda: "not allowed" in caplog.text)
    store.put(key(1), kv(1))
    store.flush()
    assert store._tiers.behind[0].missing([key(1)]) == []


def test_a_listing_that_comes_in_the_middle_of_a_question_makes_nothing_up(pool, machine, key, monkeypatch):
    """Else what was about to be asked for is taken to be in the listing that has just come."""
    turns = iter([False, *[True] * 9])
    monkeypatch.setattr(Manifest, "fresh", property(lambda self: next(turns)))
    assert machine(RemoteTier(pool)).missing([key(1)]) == [key(1)]


def test_only_names_of_chunks_are_keys(key):
    assert key_of(name_of(key(1))) == key(1)
    assert [key_of(name) for name in ("readme.txt", "ab/abcd", "ab/", "", "zz/zz", "cd/abcd")] == [
        None,
        b"\xab\xcd",
        *[None] * 4,
    ]


def test_what_is_on_its_way_is_not_asked_for_again(pool, tmp_path, machine, kv, key, same):
    """A batch that is read while the same chunks are prefetched, or by another thread, joins it."""
    one = machine(f"file://{tmp_path}/pool")
    for number in range(3):
        one.put(key(number), kv(number, tokens=900))
    one.flush()
    store, keys = machine(RemoteTier(pool), cpu_bytes=1 << 24), [key(number) for number in range(3)]
    with store.read(keys) as batch, store.read(keys) as other:
        assert store.prefetch(keys).result(10) > 0
        for number in range(3):
            same(batch.kv(number), kv(number, tokens=900))
            batch.done(number)
            same(other.kv(number), kv(number, tokens=900))
    assert sorted(pool.asked) == sorted(2 * [name_of(name) for name in keys]), "a header and a range each"


def test_first_layers_are_used_before_the_others_come_and_all_chunks_are_asked_for(
    pool, tmp_path, machine, kv, key, monkeypatch
):
    one, keys = machine(f"file://{tmp_path}/pool"), [key(number) for number in range(3)]
    one.put_many([(name, kv(number, tokens=900, layers=9), 0.0) for number, name in enumerate(keys)])
    one.flush()
    store, whole = machine(RemoteTier(pool, range_bytes=100_000)), pool.begin

    def begin(name, start, stop):
        future = whole(name, start, stop)
        if start > 500_000:
            future = Future()
            future.set_exception(PoolError("it does not come"))
        return future

    monkeypatch.setattr(pool, "begin", begin)
    with store.read(keys) as batch:
        del pool.asked[:]
        assert torch.equal(batch.layer(0, 0)[0], kv(0, tokens=900, layers=9).keys[0])
        assert set(pool.asked) == set(map(name_of, keys))
